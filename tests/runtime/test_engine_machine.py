"""A state machine over all policies: arrivals, cancellations, stages, KVP growth, full pools.

Every step is audited from outside (runtime_audit.py): no page leaked or held twice, no request lost
or doubled, each token computed once unless recomputed, budgets and caps kept, running decodes never
displaced; and in the end everything drains. `python bench/scheduler_mutations.py` plants one bug
for each of these in a copy of the tree and shows that it is caught.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from runtime_audit import Run
from strategies_runtime import SPECS, sim_plans

from plans.plan import Plan
from runtime.request import Request


class EngineMachine(RuleBasedStateMachine):
    """Requests come and go at any time while the engine turns."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[int] = set()
        self.cancelled: set[int] = set()

    @initialize(plan=sim_plans(), policy=SPECS)
    def start(self, plan: Plan, policy: str) -> None:
        self.served = Run(plan, policy)

    @rule(
        prompt=st.integers(1, 60) | st.integers(1, 1000),
        new=st.integers(1, 60),
        delay_s=st.sampled_from([0.0, 0.0, 0.001, 0.05]),
        ttft_s=st.none() | st.floats(0.001, 1),
        tbt_s=st.none() | st.floats(0.001, 0.2),
    )
    def arrive(
        self, prompt: int, new: int, delay_s: float, ttft_s: float | None, tbt_s: float | None
    ) -> None:
        number = len(self.asked)
        self.asked.add(number)
        self.served.engine.add(
            Request(
                number=number,
                arrival_s=self.served.clock.now_s() + delay_s,
                prompt_tokens=prompt,
                max_tokens=min(new, 1024 - prompt),
                ttft_target_s=ttft_s,
                tbt_target_s=tbt_s,
            )
        )

    @rule(ticks=st.integers(1, 30))
    def turn(self, ticks: int) -> None:
        for _ in range(ticks):
            if not self.served.engine.tick():
                break

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.asked:
            number = data.draw(st.sampled_from(sorted(self.asked)))
            self.cancelled.add(number)
            self.served.engine.cancel(number)
            assert number not in self.served.engine.book.sequences

    @invariant()
    def book_and_pools_agree(self) -> None:
        if hasattr(self, "served"):
            self.served.engine.book.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "served"):
            return
        self.served.drain()
        records = {record.request.number: record for record in self.served.engine.records}
        assert self.asked - self.cancelled <= records.keys(), "a request was lost"
        for number, record in records.items():
            assert record.reason == "length" or number in self.cancelled


EngineMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
TestEngine = EngineMachine.TestCase
