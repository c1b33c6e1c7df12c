"""Hand-over of hidden states between neighbouring stages, in step order on each pair.

A rank sends to the rank of the next stage that has its tp and kvp coordinates. A send is only
awaited when several newer ones are under way. On a CPU a receive is posted when a step becomes
known, before the steps ahead of it have run, so that it overlaps with them. On a GPU it is posted
behind them: NCCL receives by a kernel, which would wait beside them for as long as the stage before
needs, on processors that they fill as if all were free. With receives posted ahead, the second of
two stages took 0.70 s for what the first did in 0.58, and 0.56 since (32,000 tokens, two H100,
bench/results/parallel_gpus_h100_202611.md); a chunk of 2,048 tokens is under way for 0.1 ms.

T tokens of the step, D hidden.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from plans.plan import Plan
from runtime.parallel.groups import Groups
from runtime.weights import TORCH_DTYPE


@dataclass(frozen=True)
class Arrival:
    """A posted receive."""

    hidden_TD: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The hidden states; on a GPU the stream waits and not the host."""
        self.work.wait()
        return self.hidden_TD


class HandOver:
    """The links of one rank to the stages before and after it."""

    def __init__(self, plan: Plan, groups: Groups, device: torch.device) -> None:
        """Nothing under way."""
        self._groups = groups
        self._device = device
        self._hidden = plan.model.hidden
        self._dtype = TORCH_DTYPE[plan.model.weight_dtype]
        self._most = plan.parallelism.spp + 1
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self.is_posted_ahead = device.type != "cuda"
        """Whether to post a receive when its step becomes known, or when it runs."""

    def expect(self, tokens: int) -> Arrival | None:
        """Posts the receive of the next step that this rank has rows of; None on stage 0."""
        if self._groups.before is None:
            return None
        source = self._groups.stage_ranks[self._groups.place.stage - 1]
        hidden_TD = torch.empty((tokens, self._hidden), dtype=self._dtype, device=self._device)
        work = dist.irecv(hidden_TD, src=source, group=self._groups.before)
        assert work is not None, "this rank is in the group"
        return Arrival(hidden_TD, work)

    def send(self, hidden_TD: Tensor) -> None:
        """Starts sending a step's result to the next stage."""
        hidden_TD = hidden_TD.contiguous()
        target = self._groups.stage_ranks[self._groups.place.stage + 1]
        work = dist.isend(hidden_TD, dst=target, group=self._groups.after)
        assert work is not None, "this rank is in the group"
        self._sent.append((work, hidden_TD))  # the tensor lives until it has left
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        while len(self._sent) > self._most:
            self._sent.popleft()[0].wait()

    def drain(self) -> None:
        """Waits for all sends."""
        while self._sent:
            self._sent.popleft()[0].wait()
