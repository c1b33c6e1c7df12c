"""medha-plan as a user meets it: exit statuses, messages, the files it leaves, stable output."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli_plan import app, main
from planner.question import Question, seconds, tokens
from plans.check import load_plan
from plans.errors import UsageError

SMALL = ("--model", "llama3-8b", "--gpus", "2", "--workload", "chat", "--no-kernels")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, monkeypatch, *flags):
    """Exit status, stdout and stderr of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["medha-plan", *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def plan_it(capsys, monkeypatch):
    return lambda *flags: run(capsys, monkeypatch, *flags)


# --- a plan -------------------------------------------------------------------------------------


def test_the_main_command_plans_a_million_tokens_on_two_nodes(plan_it):
    status, out, err = plan_it("--model", "llama3-70b", "--gpus", "16", "--no-kernels")
    assert (status, err) == (0, "")
    assert out.startswith("16 GPUs = tp 8 x spp 2 x kvp 1 x 1 replica\n")
    assert "assumed RoPE scaling yarn" in out
    assert "bound by" in out
    assert "error band +-" in " ".join(out.split())  # wherever the line wraps
    bundle, command = out.splitlines()[-2:]
    assert bundle == "bundle: llama3-70b-16xh100"
    assert command == "medha-sim llama3-70b-16xh100"


def test_output_in_a_pipe_has_80_columns_and_no_colours(plan_it):
    out = plan_it(*SMALL)[1]
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_the_bundle_holds_a_plan_that_passes_every_check(plan_it):
    plan_it(*SMALL, "--out", "there")
    folder = Path("there")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "alternatives.csv",
        "plan.yaml",
        "report.html",
    ]
    plan = load_plan(folder / "plan.yaml")
    assert plan.name == "llama3-8b-2xh100"
    made_by = "medha-plan --model llama3-8b --gpus 2 --workload chat"
    assert plan.made_by.command == made_by
    assert made_by in (folder / "README.md").read_text()


def test_alternatives_list_the_chosen_the_ranked_and_the_rejected(plan_it):
    plan_it("--model", "llama3-70b", "--gpus", "8", "--no-kernels", "--out", "there")
    with Path("there/alternatives.csv").open() as file:
        rows = list(csv.DictReader(file))
    statuses = [row["status"] for row in rows]
    assert statuses[0] == "chosen"
    assert statuses.count("chosen") == 1
    rejected = [row for row in rows if row["status"] == "rejected"]
    assert {"memory", "heads"} <= {row["constraint"] for row in rejected}
    assert all(row["need"] and row["have"] and row["candidate"] for row in rejected)


def test_the_same_question_gives_the_same_bytes(plan_it):
    for name in ("one", "two"):
        plan_it(*SMALL, "--out", name)
    for path in Path("one").iterdir():
        assert path.read_bytes() == (Path("two") / path.name).read_bytes()


def test_json_is_one_object_and_nothing_else(plan_it):
    status, out, err = plan_it(*SMALL, "--format", "json", "--top", "2")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["bundle"] == "llama3-8b-2xh100"
    assert len(report["alternatives"]) == 2
    p = report["parallelism"]
    assert p["tp"] * p["spp"] * p["kvp"] * p["replicas"] + p["idle"] == report["gpus"] == 2


def test_idle_gpus_are_named(plan_it):
    flags = ("--model", "llama3-8b", "--gpus", "7", "--no-kernels")
    status, out, _ = plan_it(*flags, "--format", "json")
    report = json.loads(out)
    assert status == 0
    idle = report["placement"]["idle"]
    assert len(idle) == report["parallelism"]["idle"]
    notes = " ".join(report["predicted"]["notes"])
    assert all(f"({node}, {device})" in notes for node, device in idle)


def test_a_workload_that_is_no_distribution_exits_with_2_and_its_field(plan_it):
    Path("mine.yaml").write_text("name: mine\nclasses: []\nsource: mine\n")
    status, out, err = plan_it(*SMALL, "--workload", "mine.yaml")
    assert (status, out) == (2, "")
    assert err == "mine.yaml: classes: is empty, at least one class is needed\n"


def test_schema_stands_alone(plan_it):
    status, out, err = plan_it("--schema", "--gpus", "3")
    assert (status, out) == (2, "")
    assert err == "--gpus: not here, --schema stands alone\n"


def test_schema_is_printed_as_json(plan_it):
    status, out, _ = plan_it("--schema")
    assert status == 0
    assert "Plan" in json.dumps(json.loads(out))


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--gpus", "0"), "--gpus 0: must be from 1 to 16384"),
        (("--gpus", "-3"), "--gpus -3: must be from 1"),
        (("--gpus", "1000000000"), "must be from 1 to 16384"),
        (("--model", "lama3-70b"), "llama3-70b"),
        (("--hardware", "h10"), "nearest: h100"),
        (("--workload", "chatt"), "chat"),
        (("--effort", "most"), "Invalid value for '--effort'"),
        (("--objective", "speed"), "Invalid value for '--objective'"),
        (("--rate", "-1"), "--rate -1: not a number of requests a second"),
        (("--rate", "1e-320"), "such as 0.5; at least 1e-09"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--out", "x" * 300), "File name too long"),
        (("--out", "/dev/null/x"), "--out /dev/null/x: Not a directory"),
        (("--topology", "dgx-h10"), "unknown node type 'dgx-h10'; nearest: dgx-h100"),
        (("--objective", "min-gpus"), "--objective min-gpus needs --rate"),
        (("--kv-dtype", "int8"), "Invalid value for '--kv-dtype'"),
        (("--max-context", "lots"), "--max-context lots"),
        (("--max-context", "1"), "at least 2 tokens"),
        (("--ttft-slo", "fast"), "--ttft-slo fast"),
        (("--tbt-slo", "0"), "--tbt-slo 0"),
        (("--hardware", "cpu", "--attention", "flash-attn"), "cpu has no GPU; nearest: ours"),
        (("--attention", "flash-attn"), "--no-kernels makes no program; leave one of the two out"),
        (("--dump-graph",), "--dump-graph: --no-kernels makes no program"),
        (("--tbt-slo", "1e308"), "--tbt-slo 1e308: not a time above 0"),
        (("--tbt-slo", "1000001"), "500ms; at most 1000000"),
        (("--topology", "missing.yaml"), "missing.yaml"),
        (("--prompt-tokens", "5"), "goes with PLAN.yaml"),
    ],
)
def test_wrong_flags_exit_with_2_and_say_what_is_right(plan_it, flags, expected):
    status, out, err = plan_it(*SMALL, *flags)
    assert (status, out) == (2, "")
    assert expected in err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--model", "mixtral-8x7b", "--gpus", "4"), "mixture of experts cannot be run yet"),
        (
            ("--model", "llama3-8b", "--gpus", "1", "--weight-dtype", "fp8"),
            "fp8 weights cannot be run yet; nearest: --attention ours or --weight-dtype bf16",
        ),
    ],
)
def test_a_choice_of_attention_without_a_program_exits_with_2(plan_it, flags, expected):
    status, out, err = plan_it(*flags, "--workload", "chat", "--attention", "flash-attn")
    assert (status, out) == (2, "")
    assert expected in err
    assert not list(Path.cwd().iterdir())


def test_a_dtype_that_the_device_lacks_exits_with_1_and_the_flag_that_helps(plan_it):
    status, _, err = plan_it(*SMALL, "--hardware", "a100", "--weight-dtype", "fp8")
    assert status == 1
    assert err.splitlines()[-1].endswith("nearest: --weight-dtype bf16")


@pytest.mark.parametrize("missing", ["--model", "--gpus"])
def test_a_missing_flag_exits_with_2_and_an_example(plan_it, missing):
    flags = {"--model": "llama3-8b", "--gpus": "1"}
    del flags[missing]
    status, _, err = plan_it(*(word for pair in flags.items() for word in pair))
    assert status == 2
    assert f"{missing} is missing" in err
    assert "medha-plan --model" in err


def test_a_model_that_does_not_fit_exits_with_1_and_a_number_of_gpus_that_do(plan_it):
    status, out, err = plan_it("--model", "llama3.1-405b", "--gpus", "1", "--no-kernels")
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("memory: ")
    assert "nearest: --gpus 24" in last
    assert not list(Path.cwd().iterdir())


def test_a_context_that_does_not_fit_exits_with_1_and_one_that_does(plan_it):
    flags = ("--model", "llama3-8b", "--gpus", "1", "--no-kernels", "--max-context")
    status, _, err = plan_it(*flags, "1m")
    assert status == 1
    nearest = err.splitlines()[-1].partition("nearest: --max-context ")[2].split()[0]
    assert plan_it(*flags, nearest)[0] == 0


@pytest.mark.parametrize("flag", ["--ttft-slo", "--tbt-slo"])
def test_an_impossible_target_exits_with_1_and_the_nearest_that_holds(plan_it, flag):
    status, out, err = plan_it(*SMALL, flag, "1ms")
    assert (status, out) == (1, "")
    assert f"nearest: {flag} " in err.splitlines()[-1]
    nearest = err.split()[-1]
    assert plan_it(*SMALL, flag, nearest)[0] == 0
    plan = load_plan("llama3-8b-2xh100/plan.yaml")
    if flag == "--tbt-slo":
        assert plan.targets.tbt_s == float(nearest)
    else:
        assert plan.targets.classes["chat"].ttft_s == float(nearest)


def test_a_full_folder_is_kept_unless_overwrite(plan_it):
    plan_it(*SMALL, "--out", "there")
    Path("there/mine.txt").write_text("mine")
    status, _, err = plan_it(*SMALL, "--out", "there")
    assert status == 2
    assert "--overwrite" in err
    assert Path("there/mine.txt").exists()
    assert plan_it(*SMALL, "--out", "there", "--overwrite")[0] == 0
    assert not Path("there/mine.txt").exists()


def test_an_interrupt_exits_with_130_and_leaves_nothing(plan_it, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.answer.search", interrupted)
    status, _, err = plan_it(*SMALL)
    assert status == 130
    assert "interrupted" in err
    assert not list(Path.cwd().iterdir())


# --- a plan that is there -----------------------------------------------------------------------


@pytest.fixture
def plan_file(plan_it):
    plan_it(*SMALL, "--out", "there")
    return Path("there/plan.yaml")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_plan_is_evaluated_at_a_further_length(plan_it, plan_file):
    status, out, _ = plan_it(plan_file, "--prompt-tokens", "3k")
    assert status == 0
    assert any(line.split()[:1] == ["3k"] for line in out.splitlines())
    assert "valid: every check passes" in out


def test_a_bundle_folder_stands_for_its_plan(plan_it, plan_file):
    status, out, _ = plan_it(plan_file.parent, "--format", "json")
    assert status == 0
    assert (
        json.loads(out)["predicted"]
        == json.loads(plan_it(plan_file, "--format", "json")[1])["predicted"]
    )


def test_evaluating_an_untouched_plan_changes_no_prediction(plan_it, plan_file):
    plan = load_plan(plan_file)
    report = json.loads(plan_it(plan_file, "--format", "json")[1])
    assert report["predicted"]["ttft_s"] == plan.predicted.ttft_s
    assert report["predicted"]["capacity_rps"] == plan.predicted.capacity_rps


def test_smaller_chunks_are_evaluated_with_new_times(plan_it, plan_file):
    before = json.loads(plan_it(plan_file, "--format", "json")[1])
    rows = load_plan(plan_file).prefill.chunks
    text = plan_file.read_text()
    for row in rows:
        text = text.replace(f"chunk_tokens: {row.chunk_tokens}", "chunk_tokens: 64")
    plan_file.write_text(text)
    status, out, _ = plan_it(plan_file, "--format", "json")
    after = json.loads(out)
    assert status == 0
    length = str(before["limits"]["context_tokens"])
    assert after["predicted"]["ttft_s"][length] > before["predicted"]["ttft_s"][length]


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("seed: 0", "seed: -1", "made_by.seed: -1"),
        ("    arrival_rps: ", "    arrival_rps: -", "predicted.replay.arrival_rps: -"),
        ("until_tokens: 16384", "until_tokens: 1000000000000", "prefill.chunks: "),
    ],
)
def test_numbers_that_nothing_can_be_replayed_by_exit_with_2(plan_it, plan_file, old, new, path):
    edit(plan_file, old, new)
    status, _, err = plan_it(plan_file)
    assert status == 2
    assert path in err


def test_a_misspelt_field_exits_with_2_and_its_path(plan_it, plan_file):
    edit(plan_file, "idle_budget_s", "idle_budgt_s")
    status, out, err = plan_it(plan_file)
    assert (status, out) == (2, "")
    assert "plan.yaml" in err
    assert "scheduler" in err
    assert "idle_budgt_s" in err


def test_degrees_that_do_not_add_up_exit_with_2_and_the_product(plan_it, plan_file):
    edit(plan_file, "spp: 1", "spp: 2")
    status, _, err = plan_it(plan_file)
    assert status == 2
    assert "spp 2" in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "llama3-8b"),
        ("--hardware", "h100"),  # the default, and still without an effect here
        ("--overwrite",),
        ("--prompt-tokens", "2m"),
        ("--prompt-tokens", "x"),
    ],
)
def test_flags_that_do_not_go_with_a_plan_exit_with_2(plan_it, plan_file, flags):
    status, out, err = plan_it(plan_file, *flags)
    assert (status, out) == (2, "")
    assert err.startswith(flags[0])


def test_an_unknown_policy_in_a_plan_exits_with_2_and_the_nearest(plan_it, plan_file):
    edit(plan_file, "policy: lars-lanes", "policy: larz")
    status, out, err = plan_it(plan_file)
    assert (status, out) == (2, "")
    assert "plan.yaml: scheduler.policy: " in err
    assert "nearest: lars" in err


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2.0), ("2s", 2.0), ("500ms", 0.5), (".5", 0.5), ("1e-3", 1e-3)]
)
def test_seconds_take_units(text, value):
    assert seconds("--ttft-slo", text) == value


@pytest.mark.parametrize("text", ["", "-1", "0", "nan", "inf", "5m", "1 2", "ms"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError):
        seconds("--ttft-slo", text)


@pytest.mark.parametrize(
    ("text", "value"), [("8192", 8192), ("128k", 131072), ("1m", 1 << 20), ("1.5M", 3 << 19)]
)
def test_tokens_take_binary_suffixes(text, value):
    assert tokens("--max-context", text) == value


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "1g", "k", "1e6"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(UsageError):
        tokens("--max-context", text)


def test_the_command_says_only_what_differs_from_the_defaults():
    assert Question(model="a b", gpus=4).command == "medha-plan --model 'a b' --gpus 4"
    asked = Question(model="m", gpus=4, context_tokens=4096, tbt_slo_s=0.05, seed=3)
    assert asked.command == (
        "medha-plan --model m --gpus 4 --max-context 4096 --tbt-slo 0.05 --seed 3"
    )


def test_help_names_every_flag_of_the_contract():
    text = CliRunner().invoke(app, ["--help"]).output
    for flag in [
        "model",
        "gpus",
        "hardware",
        "topology",
        "max-context",
        "workload",
        "ttft-slo",
        "tbt-slo",
        "top",
        "out",
        "effort",
        "format",
        "no-kernels",
        "dump-graph",
        "overwrite",
        "seed",
        "prompt-tokens",
        "schema",
    ]:
        assert f"--{flag}" in text


def test_planning_without_kernels_loads_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None;"
        "from planner.cli_plan import main; main()"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, *SMALL],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
