"""Candidates and their placement: what is legal, what is left idle, where ranks stand."""

import pytest
from hypothesis import given
from strategies_planner import tiny_device, tiny_topology, tiny_workload, worlds

from planner.placement import place, slowest_link
from planner.space import candidates, check_tp, cut_layers
from planner.world import make_world, stretch_rope
from plans.errors import Infeasible, UsageError
from plans.mesh import axis_ranks
from plans.model import Model, Rope, RopeScaling


def model(**changes):
    values = {
        "family": "llama",
        "name": "m",
        "layers": 5,
        "hidden": 64,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 16,
        "ffn": 112,
        "vocab": 224,
        "context_limit": 1024,
        "rope": Rope(theta=1e4),
    }
    return Model(**(values | changes))


@given(world=worlds())
def test_degrees_and_idle_devices_add_up_to_the_devices_asked_for(world):
    for each in candidates(world)[0]:
        p = each.parallelism
        assert p.tp * p.spp * p.kvp * p.replicas + p.idle == world.gpus
        assert p.idle >= 0


@given(world=worlds())
def test_another_replica_never_fits_beside_a_candidate(world):
    for each in candidates(world)[0]:
        p = each.parallelism
        per_node = world.topology.devices_per_node // p.tp
        assert (p.replicas + 1) * p.spp * p.kvp > per_node * world.topology.nodes


@given(world=worlds())
def test_every_degree_is_either_tried_or_in_the_ledger(world):
    found, ledger = candidates(world)
    tried = {each.parallelism.tp for each in found}
    named = {int(row.label.split()[1]) for row in ledger}
    assert tried | named == set(range(1, world.topology.devices_per_node + 1))
    assert not tried & named


@given(world=worlds())
def test_placement_is_a_bijection_that_keeps_tp_groups_in_a_node(world):
    devices = {
        (node, device)
        for node in range(world.topology.nodes)
        for device in range(world.topology.devices_per_node)
    }
    for each in candidates(world)[0]:
        placement = place(world.topology, each.parallelism)
        assert sorted([*placement.rank_map, *placement.idle]) == sorted(devices)
        for rank in range(each.parallelism.ranks):
            group = axis_ranks(each.parallelism, rank, "tp")
            assert len({placement.rank_map[other][0] for other in group}) == 1


@given(world=worlds())
def test_an_axis_that_crosses_nodes_pays_the_link_between_them(world):
    for each in candidates(world)[0]:
        p = each.parallelism
        placement = place(world.topology, p)
        for axis in ("tp", "kvp", "spp"):
            lines = {axis_ranks(p, rank, axis) for rank in range(p.ranks)}
            crosses = any(len({placement.rank_map[rank][0] for rank in line}) > 1 for line in lines)
            link = slowest_link(world.topology, p, placement, axis)
            if getattr(p, axis) == 1:
                assert link is None
            else:
                assert link is not None
                assert link.scope == ("cluster" if crosses else "node")


def test_surplus_layers_never_go_to_the_stage_with_the_head():
    assert cut_layers(5, 2) == ((0, 3), (3, 5))
    assert cut_layers(80, 3) == ((0, 27), (27, 54), (54, 80))
    assert cut_layers(3, 3) == ((0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize("tp", [1, 2, 4, 28])
def test_tp_may_divide_or_multiply_the_kv_heads(tp):
    check_tp(model(), tp)


@pytest.mark.parametrize(("tp", "what"), [(3, "heads"), (7, "kv_heads"), (14, "kv_heads")])
def test_tp_that_cuts_a_head_names_what_it_cuts(tp, what):
    with pytest.raises(Infeasible) as caught:
        check_tp(model(), tp)
    assert caught.value.constraint == what


def test_rope_without_scaling_becomes_assumed_yarn():
    scaling = stretch_rope(model(), 4096).rope.scaling
    assert scaling == RopeScaling(
        kind="yarn", factor=4.0, original_context_tokens=1024, assumed=True
    )


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_rope_with_scaling_keeps_its_kind_with_a_larger_factor(kind):
    old = RopeScaling(kind=kind, factor=2.0, original_context_tokens=512, low_freq_factor=1.5)
    scaling = stretch_rope(model(rope=Rope(theta=1e4, scaling=old)), 4096).rope.scaling
    assert (scaling.kind, scaling.factor, scaling.assumed) == (kind, 8.0, True)
    assert (scaling.original_context_tokens, scaling.low_freq_factor) == (512, 1.5)


def test_rope_within_the_trained_context_stays_as_it_is():
    assert stretch_rope(model(), 1024) == model()


def test_default_context_reads_a_million_as_1m():
    device = tiny_device()
    asked = {"model": model(), "device": device, "topology": tiny_topology(device)}
    assert make_world(workload=tiny_workload(999_000), **asked).limits.context_tokens == 1 << 20
    assert make_world(workload=tiny_workload(600), **asked).limits.context_tokens == 640


@pytest.mark.parametrize("wrong", [{"ttft_slo_s": 0.0}, {"tbt_slo_s": -1.0}, {"context_tokens": 1}])
def test_values_that_can_never_hold_are_usage_errors(wrong):
    device = tiny_device()
    with pytest.raises(UsageError):
        make_world(
            model=model(),
            device=device,
            topology=tiny_topology(device),
            workload=tiny_workload(),
            **wrong,
        )
