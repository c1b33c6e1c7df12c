"""The harness of the paper's experiments: protocols, capacity search, result rows."""

import math
from pathlib import Path

import pytest

from bench.paper_capacity import LEAST, MOST, capacities, highest_power, rate
from bench.paper_report import write_report
from bench.paper_run import DRAIN_S, IN_FLIGHT, Case, Protocol, run_case
from bench.paper_setup import POLICIES, paper_plan
from bench.paper_table import Row, append, origin, read
from plans.codec import content_hash
from plans.plan import Plan
from runtime.request import Record
from runtime.scheduler import load_policy


@pytest.fixture(scope="module")
def plan() -> Plan:
    """8B on 16 A100 at TP8 x SPP2."""
    return paper_plan()


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with a mix of two long prompts among short ones, for which one minute is too few."""
    rows = ["num_prefill_tokens,num_decode_tokens", *["500,40"] * 38, *["900000,40"] * 2]
    (tmp_path / "medha_mix_5pct_long.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def case(protocol: Protocol, *, qps: float, policy: str = "fcfs-whole") -> Case:
    return Case(protocol=protocol, mix=5, qps=qps, policy=policy, seed=3, window_s=60.0)


def most_at_once(records: list[Record]) -> int:
    """Requests between arrival and end, those that never ended included."""
    events = [(each.request.arrival_s, 1) for each in records]
    events += [(each.finished_s, -1) for each in records if each.finished]
    count = most = 0
    for _, change in sorted(events):  # an end before an arrival at the same time
        count += change
        most = max(most, count)
    return most


def test_harness_holds_back_what_exceeds_its_threads(plan: Plan, traces: Path) -> None:
    outcome, records = run_case(plan, case("harness", qps=20.0), traces)
    assert most_at_once(records) == IN_FLIGHT
    assert outcome.offered > outcome.sent >= IN_FLIGHT


def test_open_loop_holds_nothing_back(plan: Plan, traces: Path) -> None:
    outcome, records = run_case(plan, case("fair", qps=20.0), traces)
    assert outcome.sent == outcome.offered == len(records)
    assert most_at_once(records) > IN_FLIGHT


def test_harness_counts_what_completed_and_fair_counts_all(plan: Plan, traces: Path) -> None:
    fair, _ = run_case(plan, case("fair", qps=20.0), traces)
    harness, _ = run_case(plan, case("harness", qps=20.0), traces)
    every, survivors = fair.classes["all"], harness.classes["all"]
    assert every["finished"] < every["requests"] == fair.offered
    assert every["e2e_p99"] == math.inf
    assert survivors["finished"] == survivors["requests"] < harness.sent
    assert survivors["e2e_p99"] <= 60.0


def test_no_request_arrives_after_the_window_and_the_drain_ends(plan: Plan, traces: Path) -> None:
    _, records = run_case(plan, case("fair", qps=5.0), traces)
    assert max(each.request.arrival_s for each in records) < 60.0
    finished = [each.finished_s for each in records if each.finished]
    # the step in flight at the end is handed out; the longest one lasts less than 10 s
    assert 60.0 < max(finished) <= 60.0 + DRAIN_S + 10.0


@pytest.mark.parametrize("edge", [LEAST + 1, -7, 0, 12, MOST - 1])
def test_bisection_finds_the_last_rate_that_is_enough(edge: int) -> None:
    assert highest_power(lambda power: power <= edge) == edge


def row(power: int, share: float, *, seed: int = 0) -> Row:
    found = Case(protocol="fair", mix=5, qps=rate(power), policy="lars", seed=seed, window_s=60.0)
    return Row(case=found, figures={"all_attained": share}, origin=origin("0" * 64, "test"))


def test_capacity_is_the_last_neighbour_that_is_enough() -> None:
    probes = [row(-20, 1.0), row(0, 0.95), row(2, 0.9), row(3, 0.89), row(20, 0.1)]
    (found,) = capacities(probes)
    assert found.rps == rate(2)


def test_capacity_needs_both_sides_of_the_edge() -> None:
    assert capacities([row(0, 0.95), row(2, 0.89)]) == []


def test_capacity_without_an_upper_edge_says_so() -> None:
    (found,) = capacities([row(power, 0.95) for power in (-20, 0, 10, 20, 30)])
    assert (found.rps, found.bounded) == (rate(30), False)


def test_capacity_is_judged_by_the_mean_over_the_seeds() -> None:
    probes = [row(0, 0.99), row(0, 0.81, seed=1), row(1, 0.95), row(1, 0.84, seed=1)]
    (found,) = capacities(probes)
    assert found.rps == rate(0)


def test_rows_survive_the_file_and_make_a_report(plan: Plan, traces: Path, tmp_path: Path) -> None:
    made = origin(content_hash(plan), "abc1234")
    path = tmp_path / "runs.csv"
    cases = [case("fair", qps=0.5, policy=policy) for policy in ("fcfs-whole", "lars-lanes")]
    outcomes = [run_case(plan, each, traces)[0] for each in cases]
    for outcome in outcomes:
        append(path, outcome, made)
    rows = read([path])
    assert [each.case for each in rows] == cases
    assert [each.origin for each in rows] == [made, made]
    for each, outcome in zip(rows, outcomes, strict=True):
        assert each["short_ttft_p99"] == pytest.approx(
            outcome.classes["short"]["ttft_p99"],
            rel=1e-5,  # six digits are written
        )
    report = tmp_path / "report.md"
    write_report(rows, report)
    text = report.read_text()
    assert "simulated" in text
    assert made.plan_hash[:12] in text
    assert (tmp_path / "report-fair-5pct-60s.svg").exists()


def test_every_policy_of_the_experiments_is_known(plan: Plan) -> None:
    for name in POLICIES:
        assert load_policy(name, plan.scheduler).name == name
