"""Answers whose reports are tested, made once for all tests that look at them."""

from functools import cache
from pathlib import Path
from typing import Any

from report_reader import Node, read
from strategies_planner import by_datasheet

from planner.answer import Answer, answer
from planner.catalog import load_device, load_model, load_workload, topology_for
from planner.report import report_html
from planner.world import make_world
from plans.plan import MadeBy

TOPOLOGIES = Path(__file__).parents[1] / "planner/catalog/topologies"
MADE_BY = MadeBy(medha="0", effort="quick", seed=0, command="medha-plan --model m --gpus 1")
QUESTIONS: dict[str, dict[str, Any]] = {
    "two stages": {"model": "llama3-70b", "gpus": 16},
    "kvp": {"model": "llama3-70b", "gpus": 16, "context_tokens": 1 << 20, "tbt_slo_s": 0.025},
    "one gpu": {"model": "llama3-8b", "gpus": 1, "context_tokens": 1 << 17},
    "many nodes": {"model": "llama3-8b", "gpus": 48, "workload": "chat", "context_tokens": 1 << 14},
}


def answered(
    *,
    model: str,
    gpus: int,
    node: str | None = None,
    hardware: str = "h100",
    workload: str = "paper-mix-5",
    **changes: Any,
) -> Answer:
    """A quick answer from data sheets, without the question of other numbers of GPUs."""
    device = load_device(hardware)
    node_type = None if node is None else TOPOLOGIES / f"{node}.yaml"
    world = make_world(
        model=load_model(model),
        device=by_datasheet(device),
        topology=topology_for(device, gpus, node_type),
        workload=load_workload(workload),
        **changes,
    )
    return answer(world, name=lambda _: "p", made_by=MADE_BY)


@cache
def report_of(name: str) -> tuple[Answer, bytes]:
    """A question's answer and its report."""
    given = answered(**QUESTIONS[name])
    return given, report_html(given.found, given.plan)


@cache
def page_of(name: str) -> Node:
    """The report as a tree."""
    return read(report_of(name)[1])
