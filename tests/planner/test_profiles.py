"""Profile files: read back as written, and refused by name for whatever is wrong in them."""

import dataclasses

import pytest
from msgspec import structs

from planner import profiles
from planner.profiles import (
    KEYS,
    NAMES,
    About,
    Row,
    catalog_device,
    load_profile,
    read_profile,
    read_table,
    write_table,
)
from plans.codec import dump_file
from plans.errors import InvalidFile

ABOUT = About(
    device="NVIDIA Test",
    driver="1",
    torch="2",
    triton="3",
    made="2026-11-27",
    command="medha-tune --profile",
)
PRODUCTS = (
    Row(key=("linear", 64, 32, 1), role="fit", us=1.5, spread_us=0.1),
    Row(key=("linear", 64, 32, 10), role="check", us=2.25, spread_us=0.0),
    Row(key=("linear", 64, 32, 100), role="fit", us=12.0, spread_us=0.5),
)


def test_a_table_is_read_as_it_was_written_whatever_the_order(tmp_path):
    path = write_table(tmp_path, "gemm", reversed(PRODUCTS))
    assert read_table(path) == PRODUCTS


def test_a_profile_tells_its_ranges(tmp_path):
    write_table(tmp_path, "gemm", PRODUCTS)
    dump_file(tmp_path / "about.yaml", ABOUT)
    profile = read_profile(tmp_path)
    assert profile.about == ABOUT
    assert profile.rows("gemm") == PRODUCTS[::2]
    assert profile.rows("gemm", "check") == PRODUCTS[1:2]
    assert profile.rows("rows") == ()
    (line,) = profile.ranges()
    for part in ("gemm", "3 rows", "1 kept for checks", "op linear", "n 64", "tokens 1 to 100"):
        assert part in line


HEAD = "op,n,k,tokens,role,us,spread_us\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("n,k,tokens,role,us,spread_us\n", "line 1: columns n, k"),
        (HEAD, "no row of role fit"),
        (HEAD + "linear,64,32,1,check,1.5,0\n", "no row of role fit"),
        (HEAD + "linear,64,32,1,fit,1.5\n", "line 2: 6 columns instead of 7"),
        (HEAD + "linear,64,x,1,fit,1.5,0\n", "line 2: k: 'x' is no whole number"),
        (HEAD + "linear,64,-2,1,fit,1.5,0\n", "line 2: k: '-2' is no whole number"),
        (HEAD + "linear,64,0,1,fit,1.5,0\n", "line 2: k: '0' is no whole number from 1"),
        (HEAD + f"linear,64,{'9' * 5000},1,fit,1.5,0\n", "line 2: k: '999"),
        (HEAD + f"{'x' * 200000},64,32,1,fit,1.5,0\n", "is no CSV: field larger"),
        (HEAD + "linear,64,32,1,fitted,1.5,0\n", "line 2: role: 'fitted'"),
        (HEAD + "linear,64,32,1,fit,0,0\n", "line 2: us: '0' is no time above 0"),
        (HEAD + "linear,64,32,1,fit,nan,0\n", "line 2: us: 'nan'"),
        (HEAD + "linear,64,32,1,fit,1.5,-1\n", "line 2: spread_us: '-1'"),
        (HEAD + 2 * "linear,64,32,1,fit,1.5,0\n", "line 3: measures"),
    ],
)
def test_a_bad_table_is_refused_by_file_and_place(tmp_path, text, complaint):
    path = tmp_path / "gemm.csv"
    path.write_text(text)
    with pytest.raises(InvalidFile) as error:
        read_table(path)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)


def test_a_table_that_is_no_text_or_no_file_is_refused(tmp_path):
    path = tmp_path / "gemm.csv"
    path.write_bytes(HEAD.encode() + b"linear\xff,64,32,1,fit,1.5,0\n")
    with pytest.raises(InvalidFile, match=r"gemm\.csv: is not UTF-8 text \(byte 38\)"):
        read_table(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidFile, match=r"gemm\.csv: cannot be read: Is a directory"):
        read_table(path)


def test_a_folder_with_a_strange_table_or_none_is_refused(tmp_path):
    dump_file(tmp_path / "about.yaml", ABOUT)
    with pytest.raises(InvalidFile, match="holds no table"):
        read_profile(tmp_path)
    (tmp_path / "gems.csv").write_text("x\n")
    with pytest.raises(InvalidFile, match=r"gems\.csv: is no table"):
        read_profile(tmp_path)


def test_a_profile_without_its_origin_is_refused(tmp_path):
    write_table(tmp_path, "gemm", PRODUCTS)
    with pytest.raises(InvalidFile, match=r"about\.yaml: no such file"):
        read_profile(tmp_path)


def test_every_table_can_hold_a_row(tmp_path):
    for table, keys in KEYS.items():
        key = tuple(NAMES[table][0] if name in {"op", "what"} else 7 for name in keys)
        row = Row(key=key, role="fit", us=1.0, spread_us=0.0)
        assert read_table(write_table(tmp_path, table, [row])) == (row,)
        assert dataclasses.replace(row, key=key) == row


@pytest.mark.parametrize("table", NAMES)
def test_a_name_that_nobody_reads_is_refused_with_the_nearest(tmp_path, table):
    known = NAMES[table][0]
    key = tuple(known[:-1] if name in {"op", "what"} else 7 for name in KEYS[table])
    path = write_table(tmp_path, table, [Row(key=key, role="fit", us=1.0, spread_us=0.0)])
    with pytest.raises(InvalidFile, match=rf"{table}\.csv: line 2: .*nearest: {known}"):
        read_table(path)


@pytest.mark.parametrize("hot", [{"zz": 2.0}, {"rows": 2.0}, {"gemm": -1.0}, {"gemm": 0.5}])
def test_a_factor_that_nothing_uses_or_no_heat_makes_names_the_file(tmp_path, hot):
    dump_file(tmp_path / "about.yaml", structs.replace(ABOUT, hot=hot))
    write_table(tmp_path, "gemm", PRODUCTS)
    with pytest.raises(InvalidFile, match=rf"about\.yaml: hot\.{next(iter(hot))}: "):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("device", "torch_name", "good"),
    [
        ("h100-sxm-80gb", "NVIDIA H100 80GB HBM3", True),
        ("h200-sxm-141gb", "NVIDIA H200", True),
        ("h100-sxm-80gb", "NVIDIA H200", False),
        ("h100-sxm-80gb", "NVIDIA H100 NVL", False),
        ("h200-sxm-141gb", "NVIDIA H100 80GB HBM3", False),
        ("h100-sxm-80gb", "NVIDIA Unheard 9000", False),
    ],
)
def test_a_profile_of_another_device_is_refused_in_the_catalog(
    tmp_path, monkeypatch, device, torch_name, good
):
    folder = tmp_path / device
    folder.mkdir()
    dump_file(folder / "about.yaml", structs.replace(ABOUT, device=torch_name))
    write_table(folder, "gemm", PRODUCTS)
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    load = load_profile.__wrapped__  # each case anew
    if good:
        assert load(device).tables["gemm"] == PRODUCTS
    else:
        with pytest.raises(InvalidFile, match=rf"about\.yaml: device: .* is not {device}"):
            load(device)


def test_parts_of_a_step_that_were_not_measured_are_named(tmp_path):
    dump_file(tmp_path / "about.yaml", ABOUT)
    rows = [Row(key=(name,), role="fit", us=1.0, spread_us=0.0) for name in NAMES["step"]]
    write_table(tmp_path, "step", rows)
    assert read_profile(tmp_path).gaps() == []
    write_table(tmp_path, "step", [row for row in rows if row.key != ("decode_list",)])
    (line,) = read_profile(tmp_path).gaps()
    assert "step.csv has no decode_list" in line


@pytest.mark.parametrize(
    ("torch_name", "memory", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 84943044608, "h100-sxm-80gb"),
        ("NVIDIA H200", 150108897280, "h200-sxm-141gb"),
        ("NVIDIA A100-SXM4-80GB", 84986036224, "a100-sxm-80gb"),
        ("NVIDIA A100-SXM4-40GB", 42 * 10**9, None),  # half the memory: another device
        ("NVIDIA Unheard 9000", 48 * 10**9, None),
    ],
)
def test_a_device_is_known_by_the_name_that_torch_gives_it(torch_name, memory, found):
    assert catalog_device(torch_name, memory) == found


def test_a_device_that_was_never_measured_has_no_profile():
    assert load_profile("b200-sxm-180gb") is None
