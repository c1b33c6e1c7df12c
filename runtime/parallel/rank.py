"""What one rank does in a step, whoever feeds it: its rows, its tensors, its stage, its tokens.

Shared by the executor of one process and by the workers of many.

Letters as in plans/ops.py: T tokens, D hidden, R sampled rows, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from plans.errors import MedhaError
from plans.mesh import Coordinates
from plans.ops import Comm
from plans.plan import Plan
from runtime.parallel.inputs import PackedInputs, pack, page_pool, rows_of_group, sampled_rows
from runtime.parallel.kvp import Exchange, exchange_of
from runtime.parallel.table import RequestTable, Row, State
from runtime.parallel.transfers import to_host
from runtime.program import StageProgram
from runtime.sampling import checked, draw
from runtime.sampling_params import SamplingParams

WARM_UP_TOKENS = 32
WARM_UP_TOKENS_GPU = 8192
"""A GPU's largest: beyond, no kernel and no library changes its form."""
WARM_UP_SAMPLING = SamplingParams(temperature=1.0, top_k=8, top_p=0.9)
"""Runs whatever a draw may need: kernels compile and load when they first run."""


def warm_up_sizes(most: int) -> list[int]:
    """Tokens of steps that together take every form of every kernel, the largest first.

    Forms change at powers of two of the rows, which are tokens or a number of heads for each, and
    where 16 divides the rows: so of each power of two there is an even and an odd number. Libraries
    load by size, too. tests/runtime/parallel/test_warm_up.py holds kernels to it.

    most  of a step, at least 1
    """
    found = set()
    power = 1
    while power < 2 * most and power <= WARM_UP_TOKENS_GPU:
        top = min(power, most)
        found |= {top, top - 1, max(top // 16 * 16, 1)}
        power *= 2
    return sorted(found - {0}, reverse=True)


OnLogits = Callable[[int, int, Tensor], None]
"""Called with (request, tokens generated before, logits_V) for each sampled row."""


class Alone:
    """Comm of plans/ops.py for the only rank: every collective is the identity."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over one rank."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The join of one share."""
        return x

    def peers(self, slots: int, slot_bytes: int) -> None:
        """There are none."""

    def vocab_offset(self, share: int) -> int:
        """One rank holds the vocabulary from its first row."""
        return 0

    def merge(self, out_TNH: Tensor, lse_TN: Tensor) -> Tensor:
        """The merge of one group's attention."""
        return out_TNH


class Drawn:
    """Sampled tokens on their way from the device."""

    def __init__(self, numbers: Sequence[int], drawn_2R: Tensor | None) -> None:
        """Starts the copy; numbers are the requests of its rows."""
        self.numbers = numbers
        self.drawn_2R = drawn_2R
        self._host_2R = None if drawn_2R is None else to_host(drawn_2R)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.numbers)

    def tokens(self) -> dict[int, int]:
        """Token by request, once the device is beyond the mark that follows the draw.

        Raises MedhaError where logits were not finite.
        """
        if self._host_2R is None:
            return {}
        return dict(zip(self.numbers, checked(self._host_2R), strict=True))


NOTHING_DRAWN = Drawn((), None)


class Rank:
    """One rank's stage, weights, pages and request table."""

    def __init__(
        self,
        plan: Plan,
        place: Coordinates,
        *,
        program: StageProgram,
        weights: dict[str, Tensor],
        comm: Comm,
        device: torch.device,
    ) -> None:
        """Allocates the whole page pool at once; raises MedhaError where it does not fit."""
        self.plan = plan
        self.place = place
        self.device = device
        self.table = RequestTable()
        self._program = program
        self._weights = weights
        self._comm = comm
        self.cache = page_pool(plan, place, device)

    @property
    def is_first(self) -> bool:
        """Whether the stage reads tokens."""
        return self.place.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage yields logits."""
        return self.place.stage == self.plan.parallelism.spp - 1

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that this rank's group runs."""
        return rows_of_group(self.plan, rows, self.place.group)

    def inputs(self, rows: Sequence[Row]) -> PackedInputs:
        """Tensors of this rank's rows, but for the hidden states."""
        return pack(self.plan, rows, self.place.group, self.device)

    def exchange(self, rows: Sequence[Row], ranks: Sequence[int]) -> Exchange | None:
        """What its rows share with the other ranks of its kvp axis; None for nothing."""
        group, kernels = self.place.group, self._program.exchange
        return exchange_of(self.plan, rows, group, ranks, self.device, kernels=kernels)

    def forward(self, inputs: PackedInputs) -> Tensor:
        """Runs the stage: hidden_TD, or logits_RV on the last one."""
        out: Tensor = self._program.forward(self._weights, inputs, self.cache, self._comm)
        return out

    def draw(self, logits_RV: Tensor, rows: Sequence[Row], on_logits: OnLogits | None) -> Drawn:
        """Draws the tokens of the rows that this rank samples; the host does not wait for them."""
        sampled = sampled_rows(self.plan, rows, self.place.group)
        if not sampled:
            return NOTHING_DRAWN
        # not the tokens known now: later steps may have been applied to the table already
        positions = [row.prefix + row.tokens - row.state.prompt_tokens for row in sampled]
        if on_logits is not None:
            for row, position, logits_V in zip(sampled, positions, logits_RV, strict=True):
                on_logits(row.number, position, logits_V)
        params = [row.state.sampling for row in sampled]
        drawn_2R = draw(logits_RV, params, positions, self._program.sample)
        return Drawn([row.number for row in sampled], drawn_2R)

    def warm_up_rows(self) -> list[list[Row]]:
        """Chunks and a decode for nobody in every group, on pages that no request holds yet."""
        kv = self.plan.kv
        # all stay in shard 0: other groups know nothing of them and would not answer
        most = min(
            kv.tokens_per_kvp_shard - 1,
            kv.pages_per_rank * kv.page_tokens - 1,
            self.plan.scheduler.max_step_tokens,
        )
        on_gpu = self.device.type == "cuda"
        sizes = warm_up_sizes(most) if on_gpu else [min(WARM_UP_TOKENS, most)]
        tokens = max(sizes)
        state = State(tokens=[0] * (tokens + 1), prompt_tokens=1, sampling=WARM_UP_SAMPLING)
        state.grow(0, tuple(range(-(-(tokens + 1) // kv.page_tokens))))
        spans = [*((0, size) for size in sizes), (tokens, 1)]
        return [
            [
                Row(
                    number=-1,
                    state=state,
                    prefix=prefix,
                    tokens=count,
                    home=self.place.group,
                    samples=True,
                )
            ]
            for prefix, count in spans
        ]

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turns whatever is raised into an error that says what ran where.

        Triton's errors have no class of their own above them but Exception.
        """
        try:
            yield
        except MedhaError:
            raise
        except torch.OutOfMemoryError as error:
            raise MedhaError(
                f"{what} ran out of memory on {self.device}: {error}; free the device, or plan "
                "with fewer pages or a smaller scheduler.max_step_tokens"
            ) from error
        except RuntimeError as error:
            raise MedhaError(f"{what} failed on {self.device}: {error}") from error
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise MedhaError(f"{what} failed on {self.device}: {text}") from error
