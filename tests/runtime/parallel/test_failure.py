"""Ranks that die, stop, hang or raise in the middle of a run: said by name, nothing silently lost.

The programs are sabotaged: a rank fails when it meets a certain token, as a driver would see it.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from parallel_worlds import FAMILIES, SEED, assert_greedy, mesh_bundle, mesh_plan, prompt_of
from source_tree import ROOT

import runtime.cli_run
from plans.mesh import Parallelism
from runtime.offline import Result

FATAL = 255
SABOTAGE = """

_whole_forward = forward


def forward(weights, inputs, kv, comm):
    import os, signal, time
    if {fatal} in inputs.token_ids_T.tolist():
        {act}
    return _whole_forward(weights, inputs, kv, comm)
"""
ACTS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", r"rank 1 \(.*\) was killed by signal 9"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(.*\) sent no sign of life"),
    "hung": ("time.sleep(1e6)", r"rank 1 \(.*\) got no further .*at step \d+"),
    "raised": ("raise RuntimeError('no kernel')", r"rank 1, step \d+: .*failed on cpu: no kernel"),
}


def sabotaged(folder: Path, act: str) -> Path:
    plan = mesh_plan(Parallelism(spp=2), FAMILIES["llama"])
    text = SABOTAGE.format(fatal=FATAL, act=act)
    return mesh_bundle(folder, plan, {"stage_1.py": text})


def clean_prompt(tokens: int, seed: int) -> list[int]:
    return [token % FATAL for token in prompt_of(tokens, seed)]


def write_requests(path: Path) -> list[list[int]]:
    """Three requests; the last one holds the fatal token at its end."""
    prompts = [clean_prompt(5, 1), clean_prompt(150, 2), [*clean_prompt(100, 3), FATAL]]
    lines = [json.dumps({"token_ids": prompt, "max_tokens": 8}) for prompt in prompts]
    path.write_text("\n".join(lines))
    return prompts


def results_of(path: Path) -> list[Result]:
    return [msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("how", ACTS)
def test_a_rank_that_fails_ends_the_run_with_its_name_and_every_request_with_a_line(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    act, message = ACTS[how]
    bundle = sabotaged(tmp_path / "bundle", act)
    prompts = write_requests(tmp_path / "requests.jsonl")
    out = tmp_path / "out.jsonl"
    flags = ["--weights", "random", "--seed", SEED, "--requests", tmp_path / "requests.jsonl"]
    argv = ["medha-run", bundle, *flags, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(each) for each in argv])
    with pytest.raises(SystemExit) as ended:
        runtime.cli_run.main()
    assert ended.value.code == 1
    assert re.search(message, capfd.readouterr().err)
    assert multiprocessing.active_children() == []
    results = results_of(out)
    assert [result.id for result in results] == [1, 2, 3]
    assert results[2].finish_reason == "failed"
    assert {result.finish_reason for result in results} <= {"failed", "length"}
    for prompt, result in zip(prompts, results, strict=True):
        assert_greedy(FAMILIES["llama"], prompt, result.token_ids)


def test_a_restart_by_torchrun_serves_again(tmp_path: Path):
    act = 'os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.kill(os.getpid(), signal.SIGKILL)'
    bundle = sabotaged(tmp_path / "bundle", act)
    prompts = write_requests(tmp_path / "requests.jsonl")
    out = tmp_path / "out.jsonl"
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    flags = ["--weights", "random", "--seed", SEED, "--requests", tmp_path / "requests.jsonl"]
    command = ["-m", "torch.distributed.run", *launcher, "-m", "runtime.cli_run", bundle, *flags]
    ended = subprocess.run(
        [sys.executable, *map(str, command), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "requests failed" in ended.stderr
    results = results_of(out)
    assert [result.finish_reason for result in results] == ["length"] * 3
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) == 8
        assert_greedy(FAMILIES["llama"], prompt, result.token_ids)
