"""Hand-over of hidden states between neighbouring stages, in step order on each pair.

A rank sends to the rank of the next stage that has its tp and kvp coordinates. Receives are posted
when a step becomes known, before the steps ahead of it have run, and a send is only awaited when
several newer ones are under way: transfers overlap with the stage's work. On a GPU a receive is
posted from a stream of its own: from the stage's stream it would stand behind every kernel that was
launched there before.

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
        if self.hidden_TD.is_cuda:  # its memory is another stream's: not free before this one is
            self.hidden_TD.record_stream(torch.cuda.current_stream(self.hidden_TD.device))
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
        self._receiving = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )

    def expect(self, tokens: int) -> Arrival | None:
        """Posts the receive of the next step that this rank has rows of; None on stage 0."""
        if self._groups.before is None:
            return None
        source = self._groups.stage_ranks[self._groups.place.stage - 1]
        with torch.cuda.stream(self._receiving):  # no stream, nothing changes
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
