"""Strict YAML: what it refuses and how it says so, and that writing is canonical."""

import json
import math
import re

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import NAMES, TEXTS, plans, tiny_plan

from plans.codec import (
    DEPTH_MAX,
    content_hash,
    dump_file,
    dumps,
    json_schema,
    load_file,
    loads,
    plan_error,
)
from plans.errors import InvalidFile
from plans.mesh import Parallelism
from plans.plan import HASH_FREE_FIELDS, Plan
from plans.topology import Link


class Leaf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    latency_s: float = 0.0
    """Time of a message."""
    memory_bytes: int = 0
    name: str = ""
    on: bool = False
    anything: str | float | None = None


class Root(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = {}
    figures: dict[str, float] = {}


def message(text, type_=Root):
    """What reading says, on one line."""
    with pytest.raises(InvalidFile) as caught:
        loads(text, type_, where="a.yaml")
    return str(caught.value)


# --- round trip ---------------------------------------------------------------------------------


@given(plan=plans())
def test_plan_survives_yaml_byte_for_byte(plan):
    text = dumps(plan)
    again = loads(text, Plan)
    assert again == plan
    assert dumps(again) == text


@given(plan=plans())
def test_other_yaml_readers_see_the_same_plan(plan):
    assert yaml.safe_load(dumps(plan)) == json.loads(msgspec.json.encode(plan))


@given(text=TEXTS | NAMES | st.from_regex(r"[-+.0-9eE_:xo]{1,8}", fullmatch=True))
def test_any_text_stays_text(text):
    root = Root(leaves=(Leaf(name=text),), figures={text: 1.0})
    assert loads(dumps(root), Root) == root
    assert yaml.safe_load(dumps(root))["leaves"][0]["name"] == text


@pytest.mark.parametrize(
    "text",
    [
        *("no", "Yes", "on", "OFF", "y", "n", "null", "~", "", "true", "=", "<<"),
        *("1", "0o17", "010", "1:30", "1e3", "1.5", ".5", "2024-01-01", "1_000"),
        *("-", "- a", "a: b", "a #b", " a", "a ", "#", "&a", "*a", "!a", "%a", "@a", "`a"),
        *("[", "{", ",", "|", ">", "'", '"', "\\", "...", "---"),
        *("\n", "a\tb", "\x00", "\x85", "\u2028", "\ufeff", "\U0001f600"),
    ],
)
def test_texts_that_yaml_guesses_at_stay_text(text):
    leaf = Leaf(name=text, anything=text)
    assert loads(dumps(leaf), Leaf) == leaf
    assert yaml.safe_load(dumps(leaf))["name"] == text


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_stays_exact_for_every_reader(number):
    text = dumps(Leaf(latency_s=number))
    back = loads(text, Leaf).latency_s
    other = yaml.safe_load(text)["latency_s"]
    assert (back, math.copysign(1, back)) == (number, math.copysign(1, number))
    assert type(other) is float
    assert other == number


def test_every_field_is_written_in_field_order_and_dicts_by_key():
    root = Root(by_name={"b": Leaf(), "10": Leaf(), "9": Leaf()})
    data = yaml.safe_load(dumps(root))
    assert list(data) == ["leaves", "by_name", "figures"]
    assert list(data["by_name"]) == ["9", "10", "b"]
    assert list(data["by_name"]["b"]) == list(Leaf.__struct_fields__)


def test_long_lists_go_one_a_line_within_the_width():
    lines = dumps(Root(leaves=tuple(Leaf(name="x" * 20) for _ in range(50)))).splitlines()
    assert sum("x" * 20 in line for line in lines) == 50
    assert max(map(len, lines)) <= 100


def test_integers_in_float_fields_become_floats_on_both_ways():
    assert dumps(Leaf(latency_s=1)) == dumps(Leaf(latency_s=1.0))
    assert type(loads("latency_s: 1", Leaf).latency_s) is float


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_only_finite_numbers_are_written(number):
    with pytest.raises(InvalidFile, match="finite"):
        dumps(Leaf(latency_s=number))


def test_values_outside_their_limits_are_not_written():
    with pytest.raises(InvalidFile, match=r"tp: 0 is not allowed: expected int >= 1"):
        dumps(Parallelism(tp=0))


# --- what reading refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("leaves: []\nleaves: []", "leaves: stands twice, each key is allowed once (line 2)"),
        ("leaves: [&a {}, *a]", "leaves[0]: anchor &a is not allowed"),
        ("figures: {a: *b}", "figures.a: alias *b is not allowed"),
        ("leaves: !!seq []", "tag tag:yaml.org,2002:seq is not allowed"),
        ("leaves: [!x {}]", "leaves[0]: tag !x is not allowed"),
        ("leaves: []\n---\nleaves: []", "holds a second document (line 2)"),
        ("figures: {8192: 1.0}", 'figures: key 8192 is not text; write "8192" (line 1)'),
        ("figures: {true: 1.0}", 'key True is not text; write "true"'),
        ("figures: {[a]: 1.0}", "key ['a'] is not text"),
        ("", "a.yaml: is empty"),
        ("# only a comment\n", "a.yaml: is empty"),
        ("---\n", "a.yaml: is empty"),
        ("leaves: [", "is not YAML"),
        ("leaves:\n\t- {}", "is not YAML"),
        ("a\x00b", "is not YAML"),
        ("\ud800", "is not YAML"),
        ("[" * 1000, f"nests deeper than {DEPTH_MAX} levels"),
        ("[]", "[] is not allowed: expected object, got array"),
        ("leaves: [{on: yes}]", "leaves[0].on: 'yes' is not allowed: expected bool, got"),
        ("leaves: [{on: 1}]", "leaves[0].on: 1 is not allowed: expected bool, got int"),
        ("leaves: [{on: True}]", "write true or false"),
        ("leaves: [{name: 0.10}]", "leaves[0].name: 0.1 is not allowed: expected str, got float"),
        ("leaves: [{memory_bytes: 1_000}]", "write decimal digits, without quotes, blanks, _"),
        ("leaves: [{memory_bytes: 010}]", "'010' is not allowed"),
        ("leaves: [{memory_bytes: 0x10}]", "'0x10' is not allowed"),
        ("leaves: [{memory_bytes: 1:30}]", "'1:30' is not allowed"),
        ("leaves: [{memory_bytes: 1.0}]", "1.0 is not allowed: expected int, got float"),
        ("leaves: [{memory_bytes: 1e3}]", "1000.0 is not allowed: expected int, got float"),
        (f"leaves: [{{memory_bytes: {'9' * 5000}}}]", "expected int, got str"),
        ("leaves: [{latency_s: .inf}]", "'.inf' is not allowed: expected float, got str"),
        ("leaves: [{latency_s: 1e999}]", "'1e999' is not allowed"),
        ('leaves: [{latency_s: "1.0"}]', "write it as 0.001 or 1e-3, without quotes"),
        ("leaves: [{latency_s: null}]", "None is not allowed: expected float, got null"),
        ("by_name: {a: {}, b c: {on: 1}}", 'by_name["b c"].on: 1 is not allowed'),
        ("figures: {a: 1.0,\n b: x}", "figures.b: 'x' is not allowed"),
    ],
)  # fmt: skip
def test_hole_is_closed(text, said):
    assert said in message(text)


def test_error_names_file_path_value_rule_and_line():
    text = "leaves:\n  - {}\n  - name: a\n    memory_bytes: -x\n"
    assert message(text) == (
        "a.yaml: leaves[1].memory_bytes: '-x' is not allowed: expected int, got str; write decimal "
        "digits, without quotes, blanks, _ or leading 0 (line 4)"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("leaves: [{latency_ms: 1}]", "latency_ms: unknown field; nearest: latency_s, in seconds"),
        ("leaves: [{memory_gb: 80}]", "memory_gb: unknown field; nearest: memory_bytes, in bytes"),
        ("leaves: [{nmae: a}]", "leaves[0].nmae: unknown field; nearest: name (line 1)"),
        ("zzz: 1", "zzz: unknown field; known: leaves, by_name, figures"),
        ("by_name: {a: {latency: 1.0}}", "by_name.a.latency: unknown field; nearest: latency_s"),
        ("<<: {}", '["<<"]: unknown field'),
    ],
)  # fmt: skip
def test_unknown_field_names_the_nearest_and_its_unit(text, said):
    assert said in message(text)


def test_missing_field_and_wrong_word_are_named():
    link = "{kind: nvlnk, scope: node, bandwidth_bytes_per_s: 1.0, efficiency: 1, latency_s: 1.0}"
    assert "kind: 'nvlnk' is not allowed: expected one of 'infiniband'" in message(link, Link)
    assert "nearest: nvlink" in message(link, Link)
    assert "source: is missing" in message(link.replace("nvlnk", "nvlink"), Link)


def test_exponent_without_point_is_a_float():
    assert loads("latency_s: 1e-3", Leaf).latency_s == 1e-3
    assert loads("latency_s: 2E+1", Leaf).latency_s == 20.0


@given(data=st.binary(max_size=60), text=st.text(max_size=60))
def test_garbage_is_an_invalid_file_and_nothing_else(data, text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "garbage.yaml"
    path.write_bytes(data)
    with pytest.raises(InvalidFile, match=re.escape(str(path))):
        load_file(path, Plan)
    with pytest.raises(InvalidFile):
        loads(text, Plan)


# --- files --------------------------------------------------------------------------------------


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidFile, match="no such file"):
        load_file(tmp_path / "none.yaml", Root)
    with pytest.raises(InvalidFile, match="is a folder"):
        load_file(tmp_path, Root)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(InvalidFile, match=r"latin\.yaml: is not UTF-8 text \(byte 6\)"):
        load_file(tmp_path / "latin.yaml", Root)


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "plan.yaml"
    dump_file(path, tiny_plan())
    text = path.read_text()
    with pytest.raises(InvalidFile):
        dump_file(path, Parallelism(tp=0))
    assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["plan.yaml"]
    assert load_file(path, Plan) == tiny_plan()


# --- hash, schema, errors -----------------------------------------------------------------------


def test_hash_covers_every_field_but_the_free_ones():
    plan = tiny_plan()
    other = msgspec.structs.replace(
        plan,
        name="other",
        made_by=msgspec.structs.replace(plan.made_by, seed=7),
        predicted=msgspec.structs.replace(plan.predicted, capacity_rps=9.0),
    )
    assert content_hash(other) == content_hash(plan)
    assert re.fullmatch(r"[0-9a-f]{64}", content_hash(plan))
    covered = set(Plan.__struct_fields__) - set(HASH_FREE_FIELDS)
    assert set(plan.hashed()) == covered
    slower = msgspec.structs.replace(plan.step_time, overhead_s=0.002)
    assert content_hash(msgspec.structs.replace(plan, step_time=slower)) != content_hash(plan)


def test_schema_describes_fields_by_their_docstrings():
    schema = json_schema(Plan)["$defs"]
    assert schema["Parallelism"]["properties"]["kvp"]["description"].startswith("Groups that share")
    assert schema["Placement"]["description"] == "Which device each rank runs on."
    assert json_schema(Leaf)["$defs"]["Leaf"]["properties"]["latency_s"] == {
        "description": "Time of a message.",
        "type": "number",
        "default": 0.0,
    }


def test_error_about_a_plan_shows_the_value_at_the_path():
    error = plan_error(tiny_plan(), ("prefill", "chunks", 1, "until_tokens"), "is too far")
    assert str(error) == "plan: prefill.chunks[1].until_tokens: 1024: is too far"
