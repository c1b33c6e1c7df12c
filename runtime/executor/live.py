"""Runs steps on this machine: one process, one device, the program of a bundle.

Keeps by request number what a step does not carry: the page table and the tokens, prompt and answer
so far. An eviction drops the pages and keeps the tokens, so a recomputation is nothing but chunks
over known tokens; the position in the random stream is the length of the answer, so it continues
where it was.

A step runs when it is submitted and is collected by the next wait: one in flight at most. Plans of
several ranks run in runtime/parallel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plans.errors import BundleMismatch
from plans.mesh import coordinates
from plans.plan import Plan
from runtime.clock import Clock
from runtime.executor.base import Step, StepResult
from runtime.parallel.rank import Alone, OnLogits, Rank
from runtime.parallel.table import Row
from runtime.program import StageProgram
from runtime.sampling_params import SamplingParams


def device_for(plan: Plan) -> torch.device:
    """The device that runs the plan here; raises BundleMismatch where this process cannot run it.

    Device names of the plan that start with "cpu" are CPUs; everything else is a CUDA GPU.
    """
    ranks = plan.parallelism.ranks
    if ranks > 1:
        degrees = plan.parallelism
        raise BundleMismatch(
            f"the plan spreads over {ranks} ranks (tp {degrees.tp}, spp {degrees.spp}, "
            f"kvp {degrees.kvp}, replicas {degrees.replicas}); this process is one; "
            "nearest: plan with --gpus 1"
        )
    if plan.topology.device.startswith("cpu"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BundleMismatch(
            f"the plan is for {plan.topology.device}, and no CUDA device is visible here; "
            "nearest: plan with --hardware cpu"
        )
    return torch.device("cuda", 0)


class LiveExecutor:
    """Executor of runtime/executor/base.py for one rank."""

    def __init__(
        self,
        plan: Plan,
        program: StageProgram,
        weights: dict[str, Tensor],
        *,
        clock: Clock,
        on_logits: OnLogits | None = None,
    ) -> None:
        """Allocates the whole page pool at once; raises MedhaError where it does not fit."""
        self._clock = clock
        self._on_logits = on_logits
        place = coordinates(plan.parallelism, 0)
        self._rank = Rank(
            plan, place, program=program, weights=weights, comm=Alone(), device=device_for(plan)
        )
        self._done: list[StepResult] = []

    def add_request(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Makes a request known, before the first step that holds a piece of it."""
        self._rank.table.add(number, prompt, sampling)

    def known_requests(self) -> int:
        """Requests added and not ended."""
        return len(self._rank.table)

    def warm_up(self) -> None:
        """Runs a chunk and a decode for nobody: kernels compile before time counts.

        Call before the first step: it writes pages that no request holds yet.
        """
        for rows in self._rank.warm_up_rows():
            what = f"a first step of {rows[0].tokens} tokens"
            with torch.inference_mode(), self._rank.explained(what):
                self._rank.forward(self._rank.inputs(rows))
                self._rank.synchronise()

    def can_submit(self) -> bool:
        """Whether nothing is in flight."""
        return not self._done

    def in_flight(self) -> int:
        """Steps run and not yet collected."""
        return len(self._done)

    def submit(self, step: Step) -> None:
        """Runs a step to its end."""
        started_s = self._clock.now_s()
        self._rank.table.apply(step)
        rows = self._rank.table.rows(step)
        tokens = self._run(step.step_id, rows) if rows else {}
        self._rank.table.append(tokens.items())
        finished_s = self._clock.now_s()
        self._done.append(
            StepResult(
                step=step, tokens=tokens, stage_s=(finished_s - started_s,), finished_s=finished_s
            )
        )

    def wait(self, *, until_s: float | None) -> list[StepResult]:
        """The step that was submitted; with none, sleeps until until_s."""
        if not self._done and until_s is not None:
            self._clock.sleep_until(until_s)
        done, self._done = self._done, []
        return done

    def _run(self, step_id: int, rows: list[Row]) -> dict[int, int]:
        """Runs the program and draws the tokens."""
        what = f"step {step_id} of {sum(row.tokens for row in rows)} tokens"
        with torch.inference_mode(), self._rank.explained(what):
            logits_RV = self._rank.forward(self._rank.inputs(rows))
            tokens = self._rank.draw(logits_RV, rows, self._on_logits)
            if not tokens:
                self._rank.synchronise()  # else the step's time would be that of its launch
        return tokens
