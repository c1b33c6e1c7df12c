"""Each invariant of plans/check.py catches what breaks it, and nothing else complains."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from strategies import make_plan, plans, tiny_model, tiny_plan, tiny_topology

from plans.check import CHECKS, check_plan, failures, load_plan
from plans.codec import dump_file
from plans.errors import InvalidFile
from plans.mesh import Parallelism
from plans.model import RopeScaling
from plans.plan import Kernel, Percentiles, Plan, Replay, When
from plans.steptime import Knot
from plans.topology import Fabric, Link, Network, Part, Wires
from plans.workload import ClassTargets

GROUPED = Parallelism(tp=2, spp=2, kvp=2, idle=2)
DIGEST = "0" * 64


def grouped_plan() -> Plan:
    """Eight ranks on two nodes of five devices, one idle on each."""
    plan = make_plan(parallelism=GROUPED, topology=tiny_topology(nodes=2, devices_per_node=5))
    places = [(node, device) for node in range(2) for device in range(4)]
    return changed(plan, "placement", rank_map=tuple(places), idle=((0, 4), (1, 4)))


def changed(plan: Plan, path: str, **fields) -> Plan:
    """The plan with fields of the struct at a dotted path replaced."""
    name, _, rest = path.partition(".")
    inner = getattr(plan, name)
    inner = changed(inner, rest, **fields) if rest else msgspec.structs.replace(inner, **fields)
    return msgspec.structs.replace(plan, **{name: inner})


def row_changed(plan: Plan, row: int, **fields) -> Plan:
    """The plan with fields of one chunk row replaced."""
    rows = list(plan.prefill.chunks)
    rows[row] = msgspec.structs.replace(rows[row], **fields)
    return changed(plan, "prefill", chunks=tuple(rows))


def with_rows(plan, *rows):
    """The plan with a program of one op and these rows of it."""
    row = {"op": "linear", "target": "torch", "file": "program/linear.py"}
    kernels = tuple(Kernel(**(row | each)) for each in rows)
    return msgspec.structs.replace(plan, files={"program/linear.py": DIGEST}, kernels=kernels)


def moved_bytes(plan: Plan, part: str, size: int) -> Plan:
    """The plan with bytes moved from free memory to a part, so that the sum holds."""
    memory = plan.memory
    parts = {part: getattr(memory, part) + size, "free_bytes": memory.free_bytes - size}
    return changed(plan, "memory", **parts)


def with_class(plan: Plan, **fields) -> Plan:
    """The plan with fields of its first request class replaced."""
    first, *others = plan.workload.classes
    first = msgspec.structs.replace(first, **fields)
    return changed(plan, "workload", classes=(first, *others))


RISING = Percentiles(p50=0.1, p90=0.2, p99=0.2, max=None)
FALLING = Percentiles(p50=0.1, p90=None, p99=0.2, max=None)


def replayed(plan: Plan, *, at: str = "replay", **fields) -> Plan:
    """The plan with a replay that keeps every rule, but for fields of it or of the plan."""
    point = Replay(
        policy="lars",
        seed=0,
        arrival_rps=2.0,
        duration_s=100.0,
        requests=200,
        finished=190,
        undecided=10,
        steps=5000,
        utilisation=0.8,
        arrivals_per_s=2.0,
        in_system_mean=12.0,
        time_in_system_mean_s=6.0,
        attainment=0.5,
        goodput_rps=1.0,
        ttft_s={"all": RISING},
        tbt_s={"all": RISING},
    )
    if at == "replay":
        point = msgspec.structs.replace(point, **fields)
        fields = {}
    fields = {"replay": point, "goodput_rps": point.goodput_rps} | fields
    return changed(plan, "predicted", **fields)


def swapped(plan: Plan, one: int, two: int) -> Plan:
    """The plan with two ranks on each other's device."""
    places = list(plan.placement.rank_map)
    places[one], places[two] = places[two], places[one]
    return changed(plan, "placement", rank_map=tuple(places))


def stretched(plan: Plan, **fields) -> Plan:
    """The plan of a model trained for 128 tokens, with a scaling to 1024."""
    scaling = RopeScaling(kind="yarn", factor=8.0, original_context_tokens=128, assumed=True)
    plan = changed(plan, "model", context_limit=128)
    return changed(plan, "model.rope", scaling=msgspec.structs.replace(scaling, **fields))


def with_fabric(plan: Plan, *, links: tuple[Link, ...] = (), **fields) -> Plan:
    """The plan on five devices a node at one switch, with fields of the fabric replaced."""
    inside, between = plan.topology.links
    joins = (("nic", "switch"), *((f"gpu{each}", "switch") for each in range(5)))
    parts = (Part(name="switch", kind="pcie-switch"), Part(name="nic", kind="nic"))
    fabric = Fabric(
        parts=parts,
        wires=(Wires(link=inside, joins=joins),),
        network=Network(nodes_per_leaf=2, rails=False, leaf=between),
    )
    fabric = msgspec.structs.replace(fabric, **fields)
    return changed(plan, "topology", links=links, fabric=fabric)


MUTATIONS: dict[str, list[tuple[str, Callable[[Plan], Plan]]]] = {
    "types": [
        ("parallelism.tp", lambda plan: changed(plan, "parallelism", tp=0)),
        ("kv.page_tokens", lambda plan: changed(plan, "kv", page_tokens=17)),
        ("predicted.error_band", lambda plan: changed(plan, "predicted", error_band=float("nan"))),
    ],
    "fabric": [
        ("topology.links", lambda plan: with_fabric(plan, links=plan.topology.links[:1])),
        ("topology.links", lambda plan: changed(plan, "topology", links=())),
        ("topology.links", lambda plan: changed(plan, "topology", links=plan.topology.links[:1])),
        ("topology.links", lambda plan: changed(plan, "topology", links=plan.topology.links[1:])),
        ("topology.fabric.wires", lambda plan: with_fabric(plan, wires=())),
        ("topology.fabric.network", lambda plan: with_fabric(plan, network=None)),
    ],
    "devices": [
        ("parallelism", lambda plan: changed(plan, "parallelism", replicas=2)),
        ("parallelism", lambda plan: changed(plan, "topology", nodes=3)),
        ("parallelism.idle", lambda plan: changed(changed(plan, "parallelism", idle=-2), "topology",
                                                  nodes=1, devices_per_node=6)),
    ],
    "rank-map": [
        ("placement.rank_map", lambda plan: changed(plan, "placement",
                                                    rank_map=plan.placement.rank_map[1:])),
        ("placement.idle", lambda plan: changed(plan, "placement", idle=((0, 4),))),
        ("placement.idle[1]", lambda plan: changed(plan, "placement", idle=((0, 4), (1, 5)))),
        ("placement.idle[0]", lambda plan: changed(plan, "placement", idle=((2, 4), (1, 4)))),
        ("placement", lambda plan: changed(plan, "placement", idle=((0, 0), (1, 4)))),
    ],
    "tp-in-node": [("placement.rank_map[0]", lambda plan: swapped(plan, 0, 7))],
    "heads": [("model.head_dim", lambda _: make_plan(model=tiny_model(head_dim=15))),
              ("model.heads", lambda _: make_plan(model=tiny_model(heads=3)))],
    "tensor-split": [
        ("model.heads", lambda _: make_plan(model=tiny_model(heads=6, kv_heads=2),
                                            parallelism=Parallelism(tp=4))),
        ("model.kv_heads", lambda _: make_plan(model=tiny_model(heads=6, kv_heads=3),
                                               parallelism=Parallelism(tp=2))),
        ("model.ffn", lambda plan: changed(plan, "model", ffn=127)),
        ("model.vocab", lambda plan: changed(plan, "model", vocab=255)),
    ],
    "stages": [
        ("stages", lambda plan: msgspec.structs.replace(plan, stages=((0, 4),))),
        ("stages[1]", lambda plan: msgspec.structs.replace(plan, stages=((0, 2), (3, 4)))),
        ("stages[1]", lambda plan: msgspec.structs.replace(plan, stages=((0, 2), (1, 4)))),
        ("stages[1]", lambda plan: msgspec.structs.replace(plan, stages=((0, 4), (4, 4)))),
        ("stages", lambda plan: msgspec.structs.replace(plan, stages=((0, 2), (2, 3)))),
        ("stages", lambda plan: msgspec.structs.replace(plan, stages=())),
    ],
    "context": [
        ("limits.context_tokens", lambda plan: changed(plan, "model", context_limit=1023)),
        ("limits.context_tokens", lambda plan: stretched(plan, factor=7.9)),
        ("model.rope.scaling.assumed", lambda plan: stretched(plan, assumed=False)),
    ],
    "workload": [
        ("workload.classes", lambda plan: changed(plan, "workload", classes=())),
        ("workload.classes", lambda plan: with_class(plan, share=0.8)),
        ("workload.classes", lambda plan: with_class(plan, name="document")),
        ("workload.classes[0].input_tokens", lambda plan: with_class(plan,
                                                                     input_tokens=((0.0, 1),))),
        ("workload.classes[0].output_tokens[1]",
         lambda plan: with_class(plan, output_tokens=((0.0, 9), (1.0, 8)))),
        ("workload.classes[0].output_tokens[2]",
         lambda plan: with_class(plan, output_tokens=((0.0, 1), (1.0, 2), (1.0, 3)))),
    ],
    "targets": [("targets.classes.chats",
                 lambda plan: changed(plan, "targets", classes={"chats": ClassTargets()}))],
    "policy": [("scheduler.policy", lambda plan: changed(plan, "scheduler", policy="L ARS"))],
    "budgets": [
        ("scheduler.step_budget_s", lambda plan: changed(plan, "scheduler", step_budget_s=1.0)),
        ("scheduler.min_chunk_tokens",
         lambda plan: changed(plan, "scheduler", min_chunk_tokens=4096)),
    ],
    "stage-layers": [("step_time.stage_layers",
                      lambda plan: changed(plan, "step_time", stage_layers=(3, 1)))],
    "tables": [
        ("step_time.matmul", lambda plan: changed(plan, "step_time", matmul=())),
        ("step_time.head[1].at", lambda plan: changed(
            plan, "step_time", head=(Knot(at=2, seconds=0.0), Knot(at=2, seconds=0.1)))),
        ("step_time.matmul[1].seconds", lambda plan: changed(
            plan, "step_time", matmul=(Knot(at=1, seconds=0.2), Knot(at=2, seconds=0.1)))),
    ],
    "chunks": [
        ("prefill.chunks", lambda plan: changed(plan, "prefill", chunks=())),
        ("prefill.chunks", lambda plan: changed(plan, "prefill",
                                                chunks=plan.prefill.chunks[:1])),
        ("prefill.chunks[1].until_tokens", lambda plan: row_changed(plan, 0, until_tokens=1024)),
        ("prefill.chunks[1].chunk_tokens", lambda plan: row_changed(plan, 1, chunk_tokens=129)),
        ("prefill.chunks[0].chunk_tokens",
         lambda plan: changed(plan, "scheduler", max_step_tokens=127)),
    ],
    "chunk-seconds": [
        ("prefill.chunks[0].predicted_s", lambda plan: row_changed(plan, 0, predicted_s=0.0)),
        ("prefill.chunks[1].predicted_s", lambda plan: row_changed(
            plan, 1, predicted_s=plan.prefill.chunks[1].predicted_s * 1.00001)),
    ],
    "chunk-budget": [
        ("prefill.chunks[0].chunk_tokens",
         lambda plan: changed(plan, "scheduler", idle_budget_s=0.002, step_budget_s=0.001)),
        ("prefill.chunks[0].chunk_tokens", lambda plan: changed(plan, "step_time", margin=5.0)),
    ],
    "kv-shards": [
        ("kv.tokens_per_kvp_shard", lambda plan: changed(plan, "kv", tokens_per_kvp_shard=520)),
        ("kv.tokens_per_kvp_shard", lambda plan: changed(plan, "kv", tokens_per_kvp_shard=496)),
    ],
    "kv-pool": [("kv.pages_per_rank", lambda _: make_plan(spare_pages=-1))],
    "memory-sum": [
        ("memory", lambda plan: changed(plan, "memory", reserved_bytes=1)),
        ("memory.capacity_bytes", lambda plan: changed(plan, "topology", device_memory_bytes=1)),
    ],
    "kv-bytes": [("memory.kv_bytes", lambda plan: moved_bytes(plan, "kv_bytes", 1))],
    "weights": [("memory.weights_bytes",
                 lambda plan: moved_bytes(plan, "weights_bytes", -plan.memory.weights_bytes // 2)),
                ("memory.weights_bytes", lambda plan: changed(plan, "model", vocab=10**15))],
    "files": [
        ('files["program/a.py"]',
         lambda plan: msgspec.structs.replace(plan, files={"program/a.py": DIGEST[1:]})),
        *((f'files["{name}"]',
           lambda plan, name=name: msgspec.structs.replace(plan, files={name: DIGEST}))
          for name in ("/a.py", "../a.py", "a//b.py", "./a.py")),
    ],
    "kernels": [
        ("kernels[0].file", lambda plan: msgspec.structs.replace(
            plan, kernels=(Kernel(op="a", target="torch", file="program/a.py"),))),
        ("kernels", lambda plan: msgspec.structs.replace(
            plan, files={"program/paged_attention.py": DIGEST})),
        ("kernels[0].file", lambda plan: with_rows(plan, {"op": "lineaar"})),
        ("kernels[0].target", lambda plan: with_rows(plan, {"target": "triton"})),
        ("kernels[0].params.BLOCK", lambda plan: with_rows(plan, {"params": {"BLOCK": -5}})),
        ("kernels[1].op", lambda plan: with_rows(plan, {}, {})),
        ("kernels[1].when.tokens_max",
         lambda plan: with_rows(plan, *({"when": When(tokens_max=8)},) * 2, {})),
        ("kernels", lambda plan: with_rows(plan, {"when": When(tokens_max=8)})),
    ],
    "predicted": [
        ('predicted.ttft_s["1025"]', lambda plan: changed(plan, "predicted", ttft_s={"1025": 1.0})),
        ('predicted.tbt_s["8k"]', lambda plan: changed(plan, "predicted", tbt_s={"8k": 1.0})),
        ("predicted.capacity_rps", lambda plan: changed(plan, "predicted", capacity_rps=-1.0)),
        ('predicted.provenance["gemm"]',
         lambda plan: changed(plan, "predicted", provenance={"gemm": "guessed"})),
    ],
    "replay": [
        ("predicted.goodput_rps", lambda plan: changed(plan, "predicted", goodput_rps=1.0)),
        ("predicted.goodput_rps", lambda plan: replayed(plan, at="plan", goodput_rps=0.5)),
        ("predicted.replay.utilisation", lambda plan: replayed(plan, utilisation=1.1)),
        ("predicted.replay.least_slowdown", lambda plan: replayed(plan, least_slowdown=0.24)),
        ("predicted.replay.attainment", lambda plan: replayed(plan, attainment=-0.1)),
        ("predicted.replay.goodput_rps", lambda plan: replayed(plan, goodput_rps=2.5)),
        ("predicted.replay.in_system_mean", lambda plan: replayed(plan, in_system_mean=12.2)),
        ("predicted.replay.in_system_mean", lambda plan: replayed(plan, arrivals_per_s=1.9)),
        ("predicted.replay.ttft_s.all", lambda plan: replayed(plan, ttft_s={"all": FALLING})),
        ("predicted.replay.tbt_s.all", lambda plan: replayed(plan, tbt_s={"all": FALLING})),
    ],
    "predicted-bounds": [
        ('predicted.ttft_s["256"]', lambda plan: changed(plan, "predicted", ttft_s={"256": 0.003})),
        ('predicted.tbt_s["8"]', lambda plan: changed(plan, "predicted", tbt_s={"8": 0.001})),
    ],
}  # fmt: skip
CASES = [(name, path, mutate) for name, each in MUTATIONS.items() for path, mutate in each]
IDS = [f"{name}-{number}" for name, each in MUTATIONS.items() for number in range(len(each))]


@given(plan=plans())
def test_drawn_plans_are_valid(plan):
    assert failures(plan) == []


def test_every_check_has_a_mutation_and_follows_what_it_needs():
    names = [check.name for check in CHECKS]
    assert sorted(MUTATIONS) == sorted(names)
    for place, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:place])


@pytest.mark.parametrize(("name", "path", "mutate"), CASES, ids=IDS)
def test_broken_invariant_is_caught_by_its_check_alone(name, path, mutate):
    plan = grouped_plan()
    assert failures(plan) == []
    found = failures(mutate(plan))
    assert {each.name for each in found} == {name}
    assert path in [each.path for each in found]


def test_a_fabric_that_joins_all_is_valid():
    assert failures(with_fabric(grouped_plan())) == []


def test_device_count_prints_every_term():
    plan = changed(grouped_plan(), "topology", nodes=3)
    assert failures(plan)[0].message == (
        "tp 2 x spp 2 x kvp 2 x replicas 1 + idle 2 = 10 devices, the topology has nodes 3 x "
        "devices_per_node 5 = 15"
    )


def test_a_replay_that_adds_up_is_valid():
    assert failures(replayed(grouped_plan())) == []


def test_minimum_chunk_may_exceed_the_budget():
    plan = make_plan(rows=((1024, 64),))
    tight = changed(plan, "scheduler", idle_budget_s=0.001, step_budget_s=0.001)
    assert [each.name for each in failures(tight)] == ["chunk-budget"]
    assert failures(changed(tight, "scheduler", min_chunk_tokens=64)) == []


def test_assumed_scaling_that_reaches_the_limit_is_valid():
    assert failures(stretched(tiny_plan())) == []


def test_error_lists_every_failure_with_its_place(tmp_path):
    plan = changed(changed(tiny_plan(), "scheduler", policy=""), "model", context_limit=9)
    path = tmp_path / "plan.yaml"
    dump_file(path, plan)
    with pytest.raises(InvalidFile) as caught:
        load_plan(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}: limits.context_tokens: 1024 exceeds model.context_limit 9")
    assert second.startswith(f"{path}: scheduler.policy: ''")
    with pytest.raises(InvalidFile, match=r"^plan: limits"):
        check_plan(plan)


def test_valid_plan_passes_in_silence(tmp_path):
    dump_file(tmp_path / "plan.yaml", tiny_plan())
    assert load_plan(tmp_path / "plan.yaml") == tiny_plan()
