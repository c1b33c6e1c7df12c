"""What every plan must satisfy, one small function an invariant, whoever wrote the plan.

A check yields (path, message) for each place that breaks it; the message has the terms of the
broken formula. CHECKS is the order they run in; a check is skipped where one that it needs has
failed, so that one mistake is reported once and no check has to survive another's bad numbers.
What needs more than the plan (queueing, targets in replay, the search's optimality, file contents)
is checked where that is at hand.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct

from plans import check_cost as cost
from plans import check_layout as layout
from plans.codec import dumps, load_file
from plans.errors import InvalidFile
from plans.plan import Plan

Findings = Iterator[tuple[str, str]]


class Failure(Struct, frozen=True, kw_only=True):
    """One place where a plan breaks a check."""

    name: str
    """Of the check."""
    path: str
    message: str


class Check(Struct, frozen=True, kw_only=True):
    """One invariant."""

    name: str
    find: Callable[[Plan], Findings]
    needs: tuple[str, ...] = ()
    """Checks that must have passed for this one to make sense."""


def load_plan(path: str | Path) -> Plan:
    """Plan of a YAML file that passes every check; raises InvalidFile."""
    plan = load_file(path, Plan)
    check_plan(plan, where=str(path))
    return plan


def check_plan(plan: Plan, where: str = "plan") -> None:
    """Raises InvalidFile that lists every broken invariant, the first one on the first line."""
    found = failures(plan)
    if found:
        first, *others = (f"{each.message} [check {each.name}]" for each in found)
        more = (
            f"\n{where}: {each.path}: {text}" for each, text in zip(found[1:], others, strict=True)
        )
        raise InvalidFile(where, found[0].path, first + "".join(more))


def failures(plan: Plan) -> list[Failure]:
    """Every broken invariant, in the order of CHECKS; empty for a valid plan."""
    found: list[Failure] = []
    bad: set[str] = set()
    for check in CHECKS:
        if bad.intersection(check.needs):
            bad.add(check.name)  # unknown is as good as broken for what depends on it
            continue
        here = [
            Failure(name=check.name, path=path, message=text) for path, text in check.find(plan)
        ]
        if here:
            bad.add(check.name)
            found += here
    return found


def _limits_of_types(plan: Plan) -> Findings:
    try:
        dumps(plan)
    except InvalidFile as error:
        yield error.path, error.problem


_TIMES = ("chunks", "kv-shards", "stage-layers", "tables")
CHECKS = (
    Check(name="types", find=_limits_of_types),
    Check(name="devices", find=layout.devices, needs=("types",)),
    Check(name="fabric", find=layout.fabric, needs=("types",)),
    Check(name="rank-map", find=layout.rank_map, needs=("devices",)),
    Check(name="tp-in-node", find=layout.tp_in_node, needs=("rank-map",)),
    Check(name="heads", find=layout.heads, needs=("types",)),
    Check(name="tensor-split", find=layout.tensor_split, needs=("types",)),
    Check(name="stages", find=layout.stages, needs=("types",)),
    Check(name="context", find=layout.context, needs=("types",)),
    Check(name="workload", find=layout.workload, needs=("types",)),
    Check(name="targets", find=layout.targets, needs=("workload",)),
    Check(name="policy", find=cost.policy, needs=("types",)),
    Check(name="budgets", find=cost.budgets, needs=("types",)),
    Check(name="stage-layers", find=cost.stage_layers, needs=("stages",)),
    Check(name="tables", find=cost.tables, needs=("types",)),
    Check(name="chunks", find=cost.chunks, needs=("types",)),
    Check(name="kv-shards", find=cost.kv_shards, needs=("types",)),
    Check(name="kv-pool", find=cost.kv_pool, needs=("kv-shards",)),
    Check(name="chunk-seconds", find=cost.chunk_seconds, needs=_TIMES),
    Check(name="chunk-budget", find=cost.chunk_budget, needs=_TIMES),
    Check(name="memory-sum", find=cost.memory_sum, needs=("types",)),
    Check(name="kv-bytes", find=cost.kv_bytes, needs=("stages", "tensor-split")),
    Check(name="weights", find=cost.weights, needs=("stages", "tensor-split")),
    Check(name="files", find=layout.files, needs=("types",)),
    Check(name="kernels", find=layout.kernels, needs=("files",)),
    Check(name="predicted", find=cost.predicted, needs=("types",)),
    Check(name="replay", find=cost.replay, needs=("types",)),
    Check(name="predicted-bounds", find=cost.predicted_bounds, needs=("predicted", *_TIMES)),
)
"""Order of the report; a check comes after those that it needs."""
