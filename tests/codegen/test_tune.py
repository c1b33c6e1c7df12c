"""The tuner: gate, then values, then time; on the interpreter with a clock of its own."""

import dataclasses
import pkgutil

import pytest
import torch

from codegen import problems, tune
from codegen.clock import Timing, summary
from codegen.kernels import KERNELS, load_spec, source_texts
from codegen.kernels.base import Compilation
from codegen.kernels.rope import triton as rope
from codegen.problems import MAKERS, Where, difference, make
from plans.errors import UnknownName, UsageError

# fp16: the interpreter has no bf16
HERE = Where(device=torch.device("cpu"), dtype=torch.float16, cold=False)
RATES = (1e12, 1e12)
NAME = "ELEMENTS_A_WARP"
OPS = [op for op in KERNELS if load_spec(op).searches]
SMALL = {"batch": 2, "heads": 2, "keys": 200, "kv_heads": 1, "tokens": 5, "width": 256}
SMALL |= {"head_dim": 64, "n": 256, "k": 128}


class Accepting(tune.Gate):
    """A gate that compiles nothing."""

    def __init__(self, reject=()):
        super().__init__()
        self.reject = reject

    def reasons(self, pairs):
        return [("spills",) if each.num_warps in self.reject else () for _, each in pairs]


def job(op="rope", at=0):
    """Heads of 128, 16 of them: the four values of the tunable are four numbers of warps."""
    found = tune.jobs([op])[0][at]
    sizes = {name: min(size, SMALL.get(name, size)) for name, size in found.sizes.items()}
    if op == "rope":
        sizes |= {"heads": 16, "head_dim": 128}
    return dataclasses.replace(found, sizes=sizes)


def clock(times, ran=None):
    """Times by the number of the candidate; each group runs once, as a recording would."""

    def measure(groups):
        for group in groups:
            group[0]()
        return [Timing(us=us, spread_us=0.2) for us in times[: len(groups)]]

    return measure


def run(times, *, which=None, gate=None, effort="quick"):
    return tune.run(
        which or job(), HERE, clock(times), effort=effort, rates=RATES, gate=gate or Accepting()
    )


def test_the_fastest_candidate_wins_and_the_default_comes_first():
    found = run([5.0, 4.0, 3.0, 6.0])
    default, *others = tune.space(found.job)
    assert default == {NAME: load_spec("rope").params[NAME]}
    assert found.bucket.params == others[1]
    assert found.bucket.us == 3.0
    assert found.bucket.default_us == 5.0
    assert found.bucket.when == found.job.sizes
    assert 0 < found.bucket.floor_us < 1
    assert found.bucket.error <= 1
    assert default[NAME] == rope.ELEMENTS_A_WARP  # tried, and put back


def test_a_win_within_the_spread_keeps_the_default():
    found = run([5.0, 4.85, 4.9, 6.0])
    assert found.bucket.params == tune.space(found.job)[0]
    assert found.bucket.us == found.bucket.default_us == 5.0


def test_what_the_gate_rejects_is_never_run():
    rejected = tune.space(job())[1][NAME]
    warps = 16 * 64 // rejected  # pairs of a token over pairs of a warp
    found = run([5.0, 4.0, 3.0, 1.0], gate=Accepting([warps]))
    assert [(params[NAME], why) for params, why in found.rejected] == [(rejected, "spills")]
    assert found.bucket.params[NAME] != rejected


def test_a_candidate_with_wrong_values_is_rejected_before_it_is_timed(monkeypatch):
    honest = tune.difference
    wrong = tune.space(job())[2][NAME]

    def lying(problem):
        return 3.0 if wrong == rope.ELEMENTS_A_WARP else honest(problem)

    monkeypatch.setattr(tune, "difference", lying)
    found = run([5.0, 4.0, 1.0])
    assert [(p[NAME], why) for p, why in found.rejected] == [
        (wrong, "values are off by 3 x the tolerance")
    ]


def test_a_candidate_that_fails_to_run_is_rejected(monkeypatch):
    broken = tune.space(job())[1][NAME]

    def failing(op, sizes, where):
        if broken == rope.ELEMENTS_A_WARP:
            raise RuntimeError("out of resources\nmore")
        return make(op, sizes, where)

    monkeypatch.setattr(tune, "make", failing)
    found = run([5.0, 4.0, 3.0])
    assert [why for _, why in found.rejected] == ["RuntimeError: out of resources"]


def test_products_are_timed_beside_the_library_and_others_are_not():
    found = run([5.0, 4.0, 3.0], which=job("linear"), effort="none")
    assert (found.bucket.us, found.bucket.library_us) == (5.0, 4.0)
    assert tune.TOKENS_MAX not in found.bucket.params
    assert run([5.0, 4.0], effort="none").bucket.library_us is None


@pytest.mark.parametrize("op", ["gate_up_silu", "linear", "qkv_rope_write"])
def test_the_librarys_way_launches_no_product_of_ours(op, monkeypatch):
    problem = make(op, job(op).sizes, HERE)
    launched = []
    module = pkgutil.resolve_name(f"codegen.kernels.{op}.triton")
    monkeypatch.setattr(module, "stream", lambda *a, **k: launched.append(op))
    with tune.applied(op, tune.WITHOUT_OURS):
        problem.calls[0]()
    assert launched == []
    problem.calls[0]()
    assert launched == [op]


def test_nothing_is_timed_where_the_default_is_wrong(monkeypatch):
    monkeypatch.setattr(tune, "difference", lambda problem: float("nan"))
    with pytest.raises(UsageError, match=r"rope rows: .* the default parameters fail"):
        run([1.0])


def test_effort_none_times_the_default_alone():
    found = run([5.0], effort="none")
    assert found.bucket.params == tune.space(found.job)[0]
    assert found.rejected == ()


@pytest.mark.parametrize("op", OPS)
def test_every_space_is_of_the_spec_and_holds_the_default(op):
    spec = load_spec(op)
    for search in spec.searches:
        for name, values in search.values.items():
            assert spec.params[name] in values, f"{op}: {name}"
            assert len(set(values)) == len(values)


@pytest.mark.parametrize("op", OPS)
def test_every_candidate_says_what_the_gate_has_to_compile(op):
    defaults = load_spec(op).params
    for each in tune.jobs([op])[0]:
        for params in tune.space(each):
            for one in each.search.compilations({**defaults, **params}, each.sizes):
                assert isinstance(one, Compilation)


def test_every_op_with_tunables_has_a_space_and_problems_or_is_named():
    found, left = tune.jobs()
    named = {line.split(":")[0] for line in left}
    assert {each.op for each in found} | named == {op for op in KERNELS if load_spec(op).params}
    assert {each.op for each in found} <= set(MAKERS)
    with pytest.raises(UnknownName):
        tune.jobs(["ropes"])


def test_twins_of_one_binary_come_once():
    """A row of 4096 takes 4 warps or fewer however small the share of a warp is asked to be."""
    found = tune.wanted(job("rope"), "full")
    compilations = [pairs for _, pairs in found]
    assert all(compilations.count(each) == 1 for each in compilations)
    assert len(tune.wanted(job("paged_attention"), "quick")) <= tune.GATED["quick"]


def test_the_gate_compiles_each_kernel_once(monkeypatch):
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [dataclasses.make_dataclass("V", ["reasons"])(("bad",)) for _ in pairs]

    monkeypatch.setattr(tune, "judge", judge)
    gate = tune.Gate(workers=2)
    jobs = [job("rope", at) for at in range(4)]
    gate.prepare(jobs, "full")
    before = len(asked)
    assert before > 0
    assert all(
        why == ("bad",) for each in jobs for why in gate.reasons(tune.wanted(each, "full")[-1][1])
    )
    assert len(asked) == before


def test_a_changed_source_has_another_hash(monkeypatch):
    before = tune.source_sha256("rope")
    assert before == tune.source_sha256("rope") != tune.source_sha256("kv_write")
    monkeypatch.setattr(
        tune, "source_texts", lambda op, target: {op: source_texts(op, target)[op] + "\n"}
    )
    assert tune.source_sha256("rope") != before


def test_tuned_values_stand_in_the_emitted_source():
    text = source_texts("rope", "triton", {NAME: 64})["rope"]
    assert f"\n{NAME} = 64\n" in text
    default = load_spec("rope").params[NAME]
    assert (
        text.replace(f"{NAME} = 64\n", f"{NAME} = {default}\n", 1)
        == (source_texts("rope", "triton")["rope"])
    )


PROBLEMS = {
    "add_rms_norm": {"tokens": 3, "width": 96},
    "gate_up_silu": {"tokens": 3, "n": 128, "k": 64},
    "kv_write": {"tokens": 3, "heads": 2, "head_dim": 64},
    "linear": {"tokens": 3, "n": 64, "k": 32},
    "qkv_rope_write": {"tokens": 3, "n": 768, "k": 64},
    "rms_norm": {"tokens": 3, "width": 96},
    "rope": {"tokens": 3, "heads": 2, "head_dim": 64},
    "silu_mul": {"tokens": 3, "width": 96},
}
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 64, "page_tokens": 64}


@pytest.mark.parametrize(("op", "sizes"), PROBLEMS.items())
def test_problems_have_calls_that_give_the_references_values(op, sizes):
    problem = make(op, sizes, HERE)
    assert difference(problem) <= 1
    assert problem.moved_bytes > 0
    problem.calls[0]()


@pytest.mark.parametrize("sizes", [{"batch": 3, "keys": 130}, {"tokens": 20, "keys": 130}])
def test_attention_problems_give_the_references_values(sizes):
    problem = make("paged_attention", {**HEADS, **sizes}, HERE)
    assert difference(problem) <= 1
    rows = sizes.get("batch", sizes.get("tokens"))
    assert problem.arguments[0].shape == (rows, 4, 64)
    # pairs that no mask hides, two products of 2 x 64 operations each
    pairs = 3 * 130 if "batch" in sizes else sum(110 + at for at in range(1, 21))
    assert problem.flops == 4 * 4 * 64 * pairs


def test_a_problem_holds_as_many_copies_as_leave_l2_cold(monkeypatch):
    monkeypatch.setattr(problems, "COLD_BYTES", 10_000)
    cold = dataclasses.replace(HERE, cold=True)
    problem = make("silu_mul", {"tokens": 2, "width": 128}, cold)
    assert len(problem.calls) == -(-10_000 // problem.moved_bytes)
    assert len(make("silu_mul", {"tokens": 2, "width": 128}, HERE).calls) == 1


def test_an_op_without_problems_and_a_pool_too_small_are_said():
    with pytest.raises(UsageError, match="no problems are known for op add"):
        make("add", {}, HERE)
    with pytest.raises(UsageError, match="pages"):
        make("paged_attention", {**HEADS, "batch": 500, "keys": 4096}, HERE)


def test_a_problem_is_never_faster_than_its_floor():
    problem = make("linear", {"tokens": 8, "n": 64, "k": 32}, HERE)
    assert problem.floor_s(flops_per_s=1e6, bytes_per_s=1e30) == 2 * 8 * 64 * 32 / 1e6
    assert problem.floor_s(flops_per_s=1e30, bytes_per_s=1e3) == problem.moved_bytes / 1e3


def test_a_summary_is_the_median_and_the_middle_three_fifths():
    found = summary([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.us == 3.5
    assert found.spread_us == 5.0 - 2.0
