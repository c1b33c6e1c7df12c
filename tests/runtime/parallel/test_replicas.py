"""Replicas: independent engines of one run, each on its own ranks."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from parallel_worlds import FAMILIES, SEED, assert_greedy, mesh_bundle, mesh_plan, prompt_of

import runtime.cli_run
from plans.mesh import Parallelism
from runtime.clock import WallClock
from runtime.offline import OfflineRun, Progress, Result, read_jobs
from runtime.parallel.executor import ParallelExecutor
from runtime.parallel.launch import running_workers
from runtime.program import load_bundle
from runtime.scheduler import load_policy

FATAL = 255
ENDS = """

_whole_forward = forward


def forward(weights, inputs, kv, comm):
    import os, signal
    if 255 in inputs.token_ids_T.tolist():
        os.kill(os.getpid(), signal.SIGKILL)
    return _whole_forward(weights, inputs, kv, comm)
"""


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path, prompts: list[list[int]]
) -> tuple[int, list[Result]]:
    """Exit status and results of the command, greedy, eight tokens a request."""
    requests, out = folder / "requests.jsonl", folder / "out.jsonl"
    requests.write_text(
        "\n".join(json.dumps({"token_ids": prompt, "max_tokens": 8}) for prompt in prompts)
    )
    argv = ["medha-run", bundle, "--weights", "random", "--seed", SEED, "--requests", requests]
    monkeypatch.setattr(sys, "argv", [str(each) for each in (*argv, "--out", out)])
    with pytest.raises(SystemExit) as ended:
        runtime.cli_run.main()
    results = [msgspec.json.decode(line, type=Result) for line in out.read_bytes().splitlines()]
    return int(ended.value.code or 0), results


def test_requests_are_spread_over_the_replicas_and_come_back_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = FAMILIES["qwen2"]
    bundle = mesh_bundle(tmp_path / "bundle", mesh_plan(Parallelism(kvp=2, replicas=2), model))
    prompts = [prompt_of(tokens, tokens) for tokens in (200, 9, 150, 31, 8)]
    status, results = run(tmp_path, monkeypatch, bundle, prompts)
    assert status == 0
    assert [result.id for result in results] == [1, 2, 3, 4, 5]
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) == 8
        assert_greedy(model, prompt, result.token_ids)


def test_a_replica_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    model = FAMILIES["llama"]
    plan = mesh_plan(Parallelism(spp=2, replicas=2), model)
    bundle = mesh_bundle(tmp_path / "bundle", plan, {"stage_1.py": ENDS})
    clean = [token % FATAL for token in prompt_of(120, 1)]
    status, results = run(tmp_path, monkeypatch, bundle, [clean, [*clean[:100], FATAL]])
    assert status == 1
    assert "1 of 2 requests failed: rank 3 (" in capfd.readouterr().err
    assert [result.finish_reason for result in results] == ["length", "failed"]
    assert_greedy(model, clean, results[0].token_ids)


def test_replicas_that_wait_for_a_far_arrival_end_when_told_to(tmp_path: Path):
    mesh = Parallelism(spp=2, replicas=2)
    bundle = mesh_bundle(tmp_path / "bundle", mesh_plan(mesh, FAMILIES["llama"]))
    plan = load_bundle(bundle).plan
    lines = [
        {"token_ids": [1, 2], "max_tokens": 4},
        *({"token_ids": [3], "arrival_s": 1e6} for _ in range(3)),
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(json.dumps(line) for line in lines))
    told: list[None] = []

    def tell(progress: Progress) -> None:
        if progress.generated_tokens == 3 and not told:
            told.append(None)
            os.kill(os.getpid(), signal.SIGTERM)

    offline = OfflineRun(read_jobs(requests, plan, None), None, on_progress=tell)
    clock = WallClock()
    with running_workers(str(bundle), plan, "random", SEED, None) as replicas:
        executors = [ParallelExecutor(plan, workers, clock) for workers in replicas]
        scheduling = load_policy(plan.scheduler.policy, plan.scheduler)
        results = offline.run(plan, executors, clock, scheduling)
    assert "told to end" in str(offline.error)
    assert len(results) == 4
    assert [result.finish_reason for result in results[1:]] == ["failed"] * 3
