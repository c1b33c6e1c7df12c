"""Placement against every placement there is, and what it never splits."""

from itertools import combinations, pairwise, permutations, product

import pytest
from builders import tiny_topology
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies_topology import machines, name, widest

from planner.catalog import load_device, topology_for
from planner.placement import AXES, place, slowest_link
from planner.topology_graph import graph_of
from plans.mesh import Parallelism, axis_ranks
from plans.topology import Topology

LAYOUTS = ((1, 4), (1, 5), (1, 6), (2, 3), (3, 2), (2, 2))


def nearness(topology: Topology) -> dict[tuple, tuple]:
    """How close two devices are: in one node by the best way, under one leaf switch, or neither."""
    graph = graph_of(topology, [0])
    inside = graph.subgraph(vertex for vertex in graph if "/" in vertex)
    network = topology.fabric.network
    per_leaf = network.nodes_per_leaf if network else topology.nodes
    devices = list(product(range(topology.nodes), range(topology.devices_per_node)))
    within = {
        pair: widest(inside, name((0, pair[0])), name((0, pair[1])))
        for pair in permutations(range(topology.devices_per_node), 2)
    }
    return {
        (one, other): (2, *within[one[1], other[1]])
        if one[0] == other[0]
        else (int(one[0] // per_leaf == other[0] // per_leaf),)
        for one, other in permutations(devices, 2)
    }


def lines(parallelism: Parallelism, axis: str) -> list[tuple[int, ...]]:
    return sorted({axis_ranks(parallelism, rank, axis) for rank in range(parallelism.ranks)})


def worst(parallelism: Parallelism, near: dict, rank_map) -> tuple:
    """What placement maximises: the worst pair of each axis, tp first."""
    return tuple(
        min(
            (
                near[rank_map[one], rank_map[other]]
                for line in lines(parallelism, axis)
                for one, other in combinations(line, 2)
            ),
            default=(),
        )
        for axis in AXES
    )


def is_legal(parallelism: Parallelism, rank_map) -> bool:
    """Tp groups in one node; ranks of a node follow each other, as launchers number them."""
    nodes = [node for node, _ in rank_map]
    groups = all(
        len(set(nodes[first : first + parallelism.tp])) == 1
        for first in range(0, len(nodes), parallelism.tp)
    )
    changes = 1 + sum(one != other for one, other in pairwise(nodes))
    return groups and changes == len(set(nodes))


@st.composite
def questions(draw) -> tuple[Topology, Parallelism]:
    topology = draw(machines(layouts=LAYOUTS))
    tp = draw(st.integers(1, min(topology.devices_per_node, 3)))
    slots = topology.nodes * (topology.devices_per_node // tp)
    kvp = draw(st.integers(1, min(slots, 3)))
    spp = draw(st.integers(1, slots // kvp))
    replicas = draw(st.integers(1, slots // kvp // spp))
    return topology, Parallelism(
        tp=tp,
        kvp=kvp,
        spp=spp,
        replicas=replicas,
        idle=topology.devices - tp * kvp * spp * replicas,
    )


@settings(max_examples=100)
@given(question=questions())
def test_placement_is_the_best_of_all_placements(question):
    topology, parallelism = question
    near = nearness(topology)
    devices = list(product(range(topology.nodes), range(topology.devices_per_node)))
    found = place(topology, parallelism)
    assert sorted([*found.rank_map, *found.idle]) == devices
    assert is_legal(parallelism, found.rank_map)
    best = max(
        worst(parallelism, near, rank_map)
        for rank_map in permutations(devices, parallelism.ranks)
        if is_legal(parallelism, rank_map)
    )
    assert worst(parallelism, near, found.rank_map) == best


def machine(name_or_device: str, gpus: int, node: str | None = None) -> Topology:
    return topology_for(load_device(name_or_device), gpus, node)


def groups_of(topology: Topology, parallelism: Parallelism, axis: str) -> list[list[tuple]]:
    rank_map = place(topology, parallelism).rank_map
    return [[rank_map[rank] for rank in line] for line in lines(parallelism, axis)]


@pytest.mark.parametrize(
    ("gpus", "tp", "replicas", "idle"),
    [(6, 4, 1, 2), (12, 4, 2, 4), (12, 6, 2, 0), (24, 8, 3, 0), (24, 3, 6, 6), (10, 4, 2, 2)],
)
def test_degrees_that_do_not_fill_a_node_leave_devices_idle_in_it(gpus, tp, replicas, idle):
    topology = machine("h100", gpus)
    mesh = Parallelism(tp=tp, replicas=replicas, idle=idle)
    found = place(topology, mesh)
    assert len(found.idle) == idle
    assert all(len({node for node, _ in group}) == 1 for group in groups_of(topology, mesh, "tp"))
    assert slowest_link(topology, mesh, found, "tp").kind == "nvlink"


def test_kvp_groups_that_fit_in_a_node_leave_a_device_idle_rather_than_cross():
    """Three tp groups a node: two nodes hold one kvp pair each inside, or three with one across."""
    topology = machine("h100", 12)
    inside = Parallelism(tp=2, kvp=2, spp=2, idle=4)
    for line in groups_of(topology, inside, "kvp"):
        assert len({node for node, _ in line}) == 1
    assert slowest_link(topology, inside, place(topology, inside), "kvp").kind == "nvlink"
    assert slowest_link(topology, inside, place(topology, inside), "spp").kind == "infiniband"
    crossing = Parallelism(tp=2, kvp=2, spp=3)
    assert slowest_link(topology, crossing, place(topology, crossing), "kvp").kind == "infiniband"


def test_tp_of_two_is_put_on_nvlink_bridges_and_tp_of_four_is_not():
    topology = machine("h100-nvl", 8, "h100-nvl-pairs")
    two, four = Parallelism(tp=2, replicas=4), Parallelism(tp=4, replicas=2)
    assert groups_of(topology, two, "tp") == [[(0, each), (0, each + 1)] for each in (0, 2, 4, 6)]
    assert slowest_link(topology, two, place(topology, two), "tp").kind == "nvlink"
    link = slowest_link(topology, four, place(topology, four), "tp")
    assert link.kind == "pcie"  # one flow each way over each switch's wire


def test_tp_stays_with_one_cpu_and_kvp_crosses_between_them():
    topology = machine("h100-nvl", 8, "h100-nvl-pairs")
    mesh = Parallelism(tp=4, kvp=2)
    assert groups_of(topology, mesh, "tp") == [[(0, each) for each in range(4)],
                                               [(0, each) for each in range(4, 8)]]  # fmt: skip
    link = slowest_link(topology, mesh, place(topology, mesh), "kvp")
    assert link.kind == "socket"
    assert link.bandwidth_bytes_per_s == pytest.approx(48e9 / 4)  # four lines between the CPUs


def test_pairs_that_tp_cannot_use_join_the_kvp_groups():
    """Tp of three needs PCIe and both CPUs whatever it does; kvp of two then has the bridges."""
    topology = machine("h100-nvl", 6, "h100-nvl-pairs")
    mesh = Parallelism(tp=3, kvp=2)
    pairs = [[(0, each), (0, each + 1)] for each in (0, 2, 4)]
    assert sorted(groups_of(topology, mesh, "kvp")) == pairs
    assert slowest_link(topology, mesh, place(topology, mesh), "kvp").kind == "nvlink"


def test_ranks_of_a_node_stay_together_where_stages_alone_would_fit_in_it():
    """Launchers number them so: kvp crosses the nodes, and spp may not turn around it."""
    topology = tiny_topology(nodes=3, devices_per_node=2)
    mesh = Parallelism(kvp=3, spp=2)
    assert is_legal(mesh, place(topology, mesh).rank_map)


def test_tp_takes_the_bridged_pair_of_a_mixed_node():
    topology = machine("a100-pcie", 4, "a100-pcie-mixed")
    one, two = Parallelism(tp=2, idle=2), Parallelism(tp=2, replicas=2)
    assert place(topology, one).rank_map == ((0, 0), (0, 1))
    assert slowest_link(topology, one, place(topology, one), "tp").kind == "nvlink"
    assert slowest_link(topology, two, place(topology, two), "tp").kind == "pcie"


def test_stages_share_the_port_of_a_node_without_a_port_for_each_device():
    topology = machine("l40s", 16, "l40s-pcie-8")
    mesh = Parallelism(tp=8, spp=2)
    link = slowest_link(topology, mesh, place(topology, mesh), "spp")
    assert link.kind == "ethernet"
    assert link.bandwidth_bytes_per_s == pytest.approx(25e9 / 4)  # two ports, eight devices


@pytest.mark.parametrize("gpus", [8, 16, 64, 1024])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (8, 2, 1), (4, 1, 2), (8, 1, 2), (4, 2, 2), (2, 2, 4)])
def test_a_rail_fabric_places_and_prices_like_its_closed_form(gpus, mesh):
    tp, spp, kvp = mesh
    if tp * spp * kvp > gpus:
        return
    parallelism = Parallelism(tp=tp, spp=spp, kvp=kvp, replicas=gpus // (tp * spp * kvp))
    plain, rails = machine("h100", gpus), machine("h100", gpus, "hgx-h100-rails")
    found = place(plain, parallelism)
    assert place(rails, parallelism) == found
    for axis in AXES:
        one, other = (slowest_link(each, parallelism, found, axis) for each in (plain, rails))
        assert (one is None) == (other is None)
        if one is not None:
            assert one.bandwidth_bytes_per_s == other.bandwidth_bytes_per_s
            assert one.kind == other.kind


def test_groups_stay_under_one_leaf_switch_where_they_fit():
    """Thirty-two nodes a leaf: 33 nodes hold 16 pairs of nodes under the first, none across."""
    topology = machine("h100", 33 * 8, "hgx-h100-rails")
    mesh = Parallelism(tp=8, spp=2, replicas=16, idle=8)
    for line in groups_of(topology, mesh, "spp"):
        assert len({node // 32 for node, _ in line}) == 1
    across = Parallelism(tp=8, spp=11, replicas=3)
    found = slowest_link(topology, across, place(topology, across), "spp")
    assert found.latency_s == topology.fabric.network.spine.latency_s


@given(
    nodes=st.integers(1, 40),
    per_node=st.integers(1, 8),
    tp=st.integers(1, 8),
    kvp=st.integers(1, 6),
    spp=st.integers(1, 6),
    share=st.floats(0, 1),
)
def test_what_fits_in_a_node_is_never_split(*, nodes, per_node, tp, kvp, spp, share):
    """Beyond what can be tried: whole blocks that a node holds, times nodes, decide."""
    slots = per_node // tp
    most = nodes * slots // (kvp * spp)
    assume(most)
    replicas = max(1, round(share * most))
    used = tp * kvp * spp * replicas
    mesh = Parallelism(tp=tp, kvp=kvp, spp=spp, replicas=replicas, idle=nodes * per_node - used)
    topology = tiny_topology(nodes=nodes, devices_per_node=per_node)
    rank_map = place(topology, mesh).rank_map
    assert len(set(rank_map)) == used
    assert is_legal(mesh, rank_map)
    for block, whole in ((tp * kvp, kvp), (tp * kvp * spp, kvp * spp)):
        spans = {
            len({node for node, _ in rank_map[first : first + block]})
            for first in range(0, used, block)
        }
        if slots // whole * nodes >= used // block and slots // kvp * nodes >= spp * replicas:
            assert spans == {1}
