"""Ways and links of a machine, against the whole graph looked at without any shortcut."""

from collections import Counter
from itertools import pairwise, permutations, product
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from strategies_topology import link, machines, name, widest

from planner.catalog import load_device, load_node_type, names, topology_for
from planner.topology_graph import (
    Ways,
    coarse_nodes,
    fabric_of,
    graph_of,
    node_levels,
    quality,
    shared_link,
)
from plans.topology import Fabric, Network, Part, Topology, Wires, fabric_problems, gpu

LAYOUTS = ((1, 2), (1, 4), (2, 2), (3, 2), (5, 1))


def devices_of(topology):
    return list(product(range(topology.nodes), range(topology.devices_per_node)))


def two_of(data, topology):
    devices = devices_of(topology)
    return data.draw(st.lists(st.sampled_from(devices), min_size=2, max_size=2, unique=True))


@given(topology=machines(layouts=LAYOUTS), data=st.data())
def test_a_lone_flow_gets_the_best_way_of_the_whole_graph(topology, data):
    graph = graph_of(topology)
    one, other = two_of(data, topology)
    inside = {f"n{one[0]}", f"n{other[0]}"}
    part = graph.subgraph(
        vertex
        for vertex in graph
        if (vertex.partition("/")[0] in inside if "/" in vertex else len(inside) > 1)
    )
    found = quality(shared_link(topology, [(one, other)]))
    assert found == widest(part, name(one), name(other))


@given(topology=machines(layouts=LAYOUTS), data=st.data())
def test_ways_lead_from_one_device_to_the_other_over_edges_that_exist(topology, data):
    one, other = two_of(data, topology)
    ways = Ways(topology)
    there = ways.stand_in(one[0], other[0])
    graph = graph_of(topology, coarse_nodes(topology))
    found = ways.of(one[1], other[1], there)
    assert len(found) == len(set(found)) > 0
    for way in found:
        assert way[0][0] == name((0, one[1]))
        assert way[-1][1] == name((there, other[1]))
        assert all(first[1] == second[0] for first, second in pairwise(way))
        assert all(graph.has_edge(*edge) for edge in way)
        assert len({len(each) for each in found}) == 1


@given(topology=machines(layouts=((1, 4), (2, 3), (3, 2), (5, 2)), is_tree=True), data=st.data())
def test_flows_share_edges_as_counted_on_the_whole_graph(topology, data):
    """On a tree there is one way, so that nothing but the counting is left."""
    graph = graph_of(topology)
    devices = st.sampled_from(devices_of(topology))
    pairs = st.tuples(devices, devices).filter(lambda pair: pair[0] != pair[1])
    flows = data.draw(st.lists(pairs, min_size=1, max_size=8, unique=True))
    load = Counter(
        edge
        for one, other in flows
        for edge in pairwise(nx.shortest_path(graph, name(one), name(other)))
    )

    def share(edge, count):
        wire, lanes = (graph.edges[edge][each] for each in ("link", "lanes"))
        part = min(1.0, lanes / count)
        return wire.bandwidth_bytes_per_s * wire.efficiency * part

    expected = min(share(edge, count) for edge, count in load.items())
    found = shared_link(topology, flows)
    assert found.bandwidth_bytes_per_s * found.efficiency == pytest.approx(expected, rel=1e-12)


@given(topology=machines(layouts=((1, 3), (1, 6))))
def test_levels_are_the_classes_of_devices_that_a_quality_joins(topology):
    graph = graph_of(topology)
    devices = range(topology.devices_per_node)
    between = {
        (one, other): widest(graph, name((0, one)), name((0, other)))
        for one, other in product(devices, devices)
        if one != other
    }
    expected = []
    for least in sorted(set(between.values()), reverse=True):
        groups = {
            tuple(each for each in devices if each == one or between[one, each] >= least)
            for one in devices
        }
        assert sum(map(len, groups)) == len(devices)  # a partition
        expected.append(sorted(map(list, groups)))
    assert node_levels(topology) == expected


def two_switches(*, ports=1, rails=False, nodes=1, spine=None, per_leaf=8):
    """Nodes of four devices, two at each of two switches, that share one wire and the ports."""
    names_ = [f"nic{each}" for each in range(ports)]
    joins = [(gpu(each), f"switch{each // 2}") for each in range(4)]
    joins += [(port, f"switch{row % 2}") for row, port in enumerate(names_)]
    network = Network(
        nodes_per_leaf=per_leaf, rails=rails, leaf=link(1e9, scope="cluster"), spine=spine
    )
    parts = [Part(name="switch0", kind="pcie-switch"), Part(name="switch1", kind="pcie-switch")]
    return Topology(
        device="tiny-gpu",
        device_memory_bytes=1,
        nodes=nodes,
        devices_per_node=4,
        links=(),
        fabric=Fabric(
            parts=(*parts, *(Part(name=port, kind="nic") for port in names_)),
            wires=(
                Wires(link=link(8e9), joins=tuple(joins)),
                Wires(link=link(4e9), joins=(("switch0", "switch1"),)),
            ),
            network=network,
        ),
    )


def test_flows_that_share_a_wire_get_their_part_of_it():
    machine = two_switches()
    alone = shared_link(machine, [((0, 0), (0, 2))])
    both = shared_link(machine, [((0, 0), (0, 2)), ((0, 1), (0, 3))])
    apart = shared_link(machine, [((0, 0), (0, 1)), ((0, 2), (0, 3))])
    opposed = shared_link(machine, [((0, 0), (0, 2)), ((0, 3), (0, 1))])  # wires are full duplex
    assert [each.bandwidth_bytes_per_s for each in (alone, both, apart, opposed)] == [
        *(4e9, 2e9, 8e9, 4e9)
    ]


def test_devices_of_a_node_share_its_only_port():
    machine = two_switches(nodes=2)
    flows = [((0, each), (1, each)) for each in range(4)]
    assert shared_link(machine, flows).bandwidth_bytes_per_s == pytest.approx(1e9 / 4)


def test_flows_spread_over_equally_good_ports():
    machine = two_switches(nodes=2, ports=2)
    flows = [((0, 0), (1, 0)), ((0, 2), (1, 2))]
    assert shared_link(machine, flows).bandwidth_bytes_per_s == pytest.approx(1e9)


def test_a_spine_serves_as_many_flows_as_its_leaf_switch_has_ports():
    """Two groups of two nodes, one port each; the last group has one node of its own."""
    slow = link(0.5e9, scope="cluster")
    machine = two_switches(nodes=3, spine=slow, per_leaf=2)
    crossing = [((0, 0), (2, 0))]
    assert shared_link(machine, crossing).bandwidth_bytes_per_s == 0.5e9
    both = [*crossing, ((1, 0), (2, 1))]  # the last node's port and its group's share carry two
    assert shared_link(machine, both).bandwidth_bytes_per_s == pytest.approx(0.5e9 / 2)


def test_groups_of_nodes_share_their_way_to_the_spine():
    """Eight flows of two nodes, and two ports' worth of the spine for them."""
    machine = two_switches(nodes=4, spine=link(0.5e9, scope="cluster"), per_leaf=2)
    flows = [((node, each), (node + 2, each)) for node in range(2) for each in range(4)]
    assert shared_link(machine, flows).bandwidth_bytes_per_s == pytest.approx(0.5e9 * 2 / 8)


def test_of_two_ways_with_the_same_bandwidth_the_quicker_is_taken():
    slow, quick = (link(1e9, latency_s=latency_s) for latency_s in (2e-5, 1e-5))
    machine = structs.replace(
        two_switches(),
        devices_per_node=2,
        fabric=Fabric(
            parts=(Part(name="switch", kind="pcie-switch"),),
            wires=(
                Wires(link=slow, joins=(("gpu0", "gpu1"),)),
                Wires(link=quick, joins=(("gpu0", "switch"), ("gpu1", "switch"))),
            ),
        ),
    )
    assert shared_link(machine, [((0, 0), (0, 1))]) == quick


def test_links_without_a_fabric_are_the_closed_form_of_their_graph():
    topology = topology_for(load_device("h100"), 16)
    graph = graph_of(topology)
    inside, between = topology.links
    fabric = structs.replace(topology, links=(), fabric=fabric_of(topology))
    assert shared_link(fabric, [((0, 0), (0, 5))]) == inside
    crossing = shared_link(fabric, [((0, 0), (1, 0))])
    assert structs.replace(crossing, scope="cluster") == between
    assert widest(graph.subgraph(each for each in graph if each.startswith("n0/")), "n0/gpu0",
                  "n0/gpu5") == quality(inside)  # fmt: skip


@pytest.mark.parametrize("entry", names("topologies"))
def test_every_node_type_of_the_catalog_joins_all_its_devices(entry):
    node = load_node_type(entry)
    nodes = node.nodes or 2
    gpus = nodes * node.devices_per_node
    topology = topology_for(load_device(node.device), gpus, node)
    assert list(fabric_problems(fabric_of(topology), node.devices_per_node, nodes)) == []
    flows = [((0, 0), device) for device in devices_of(topology)[1:]]
    if topology.fabric is not None:
        assert shared_link(topology, flows) is not None


def test_ways_do_not_depend_on_the_order_of_wires():
    node = load_node_type("h100-nvl-pairs")
    topology = topology_for(load_device(node.device), 16, node)
    fabric = topology.fabric
    mirrored = structs.replace(
        fabric,
        wires=tuple(
            structs.replace(each, joins=tuple((two, one) for one, two in reversed(each.joins)))
            for each in reversed(fabric.wires)
        ),
    )
    other = structs.replace(topology, fabric=mirrored)
    places = list(permutations(range(topology.devices_per_node), 2))
    asked = [(one, two, there) for one, two in places for there in coarse_nodes(topology)]
    assert [Ways(other).of(*each) for each in asked] == [Ways(topology).of(*each) for each in asked]


def test_the_topology_in_the_guide_is_one(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "adding.md").read_text()
    section = guide.partition("## A topology, in full")[2]
    (tmp_path / "lab.yaml").write_text(section.partition("```yaml\n")[2].partition("```")[0])
    node = load_node_type(tmp_path / "lab.yaml")
    topology = topology_for(load_device(node.device), 8, node)
    flows = [((0, each), (1, each)) for each in range(4)]
    quarter = node.fabric.network.leaf.bandwidth_bytes_per_s / 4
    assert shared_link(topology, flows).bandwidth_bytes_per_s == pytest.approx(quarter)
