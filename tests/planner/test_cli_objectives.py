"""medha-plan with objectives, rates and dtypes, as a user meets it."""

import csv
import json
import sys
from pathlib import Path

import pytest

from planner.cli_plan import main
from plans.check import load_plan

CHAT = ("--model", "llama3-8b", "--gpus", "2", "--workload", "chat", "--no-kernels")


@pytest.fixture
def plan_it(capsys, monkeypatch, tmp_path):
    """Exit status, stdout and stderr of a call in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["medha-plan", *flags])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return call


def test_what_was_left_unpriced_is_listed_with_its_bound_and_what_it_had_to_beat(plan_it):
    flags = ("--model", "llama3-70b", "--gpus", "64", "--no-kernels", "--out", "there")
    status, out, _ = plan_it(*flags)
    assert status == 0
    assert "left out by bounds" in " ".join(out.split())
    with Path("there/alternatives.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "pruned"]
    assert rows
    for row in rows:
        assert row["constraint"]
        assert row["have"].startswith(("at least ", "at most "))
        assert row["need"][0].isdigit()


def test_the_command_that_made_a_plan_says_every_flag_that_decides(plan_it):
    flags = ("--objective", "latency", "--rate", "2", "--kv-dtype", "auto")
    assert plan_it(*CHAT, *flags, "--out", "there")[0] == 0
    command = load_plan("there/plan.yaml").made_by.command
    for words in ("--objective latency", "--rate 2", "--kv-dtype auto"):
        assert words in command


def test_fewer_gpus_give_the_plan_its_name(plan_it):
    flags = ("--model", "llama3-8b", "--gpus", "8", "--workload", "chat", "--no-kernels")
    status, out, _ = plan_it(*flags, "--objective", "min-gpus", "--rate", "0.5")
    assert status == 0
    assert "bundle: llama3-8b-1xh100" in out
    assert load_plan("llama3-8b-1xh100/plan.yaml").topology.devices == 1


def test_json_explains_the_choice(plan_it):
    report = json.loads(plan_it(*CHAT, "--format", "json")[1])
    assert report["why"]
    assert report["sensitivity"]
    assert report["feasible"] >= len(report["alternatives"])
    assert report["predicted"]["goodput_rps"] == report["predicted"]["replay"]["goodput_rps"]
    for row in report["breakdown"]:
        assert 0 <= row["light_s"] <= row["seconds"]
        assert row["bound"] in {"compute", "memory", "link", "host"}


def test_a_rate_beyond_the_machine_exits_with_1_and_the_nearest_that_it_sustains(plan_it):
    status, out, err = plan_it(*CHAT, "--rate", "100000")
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("rate: --rate 100000 requests/s")
    nearest = last.partition("nearest: --rate ")[2]
    assert plan_it(*CHAT, "--rate", nearest)[0] == 0


def test_an_edited_plan_is_replayed_again(plan_it):
    plan_it(*CHAT, "--out", "there")
    status, out, _ = plan_it("there/plan.yaml", "--prompt-tokens", "3000")
    assert status == 0
    assert "replay: " in out
    assert "valid: every check passes" in out


def test_a_plan_for_experts_says_why_it_has_no_program(plan_it):
    flags = ("--model", "mixtral-8x7b", "--gpus", "2", "--hardware", "h200", "--workload", "chat")
    status, out, _ = plan_it(*flags, "--out", "there")
    assert status == 0
    assert "mixture of experts cannot be run yet" in " ".join(out.split())
    assert "mixture of experts cannot be run yet" in Path("there/README.md").read_text()
    assert not Path("there/program").exists()
    assert out.splitlines()[-1] == "medha-sim there"
