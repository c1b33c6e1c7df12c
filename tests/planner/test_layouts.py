"""Machines of so many GPUs: node types of the catalog or a file, and what they refuse."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.catalog import load_device, load_node_type, topology_for
from plans.codec import dump_file
from plans.errors import InvalidFile, UsageError
from plans.topology import NodeType


def small_node(*, per_node: int, nodes: int | None = None) -> NodeType:
    """Node type of H200 devices."""
    links = load_node_type("dgx-h200").links
    return NodeType(
        name="small", device="h200-sxm-141gb", devices_per_node=per_node, nodes=nodes, links=links
    )


@pytest.mark.parametrize(
    ("gpus", "layout"),
    [(1, (1, 1)), (7, (1, 7)), (8, (1, 8)), (10, (2, 5)), (12, (2, 6)), (16, (2, 8)), (21, (3, 7))],
)
def test_gpus_fill_the_fewest_nodes_evenly(gpus, layout):
    topology = topology_for(load_device("h100"), gpus)
    assert (topology.nodes, topology.devices_per_node) == layout


@pytest.mark.parametrize(
    ("gpus", "nearest"), [(17, "16 or 18"), (9, "8 or 10"), (0, "1"), (-3, "1")]
)
def test_counts_that_do_not_divide_name_the_nearest_that_do(gpus, nearest):
    with pytest.raises(UsageError, match=f"nearest: {nearest}$"):
        topology_for(load_device("h100"), gpus)


def test_a_topology_carries_the_memory_and_only_the_links_in_use():
    device = load_device("h200")
    one, node, cluster = (topology_for(device, gpus) for gpus in (1, 8, 16))
    assert one.links == ()
    assert [link.kind for link in node.links] == ["nvlink"]
    assert [link.kind for link in cluster.links] == ["nvlink", "infiniband"]
    assert {each.device_memory_bytes for each in (one, node, cluster)} == {device.memory_bytes}


def test_one_device_a_node_uses_the_cluster_link_alone():
    topology = topology_for(load_device("cpu"), 2)
    assert (topology.nodes, topology.devices_per_node) == (2, 1)
    assert [link.scope for link in topology.links] == ["cluster"]


def test_a_topology_file_is_used_and_bounds_the_gpus(tmp_path):
    path = tmp_path / "lab.yaml"
    dump_file(path, small_node(per_node=8, nodes=3))
    device = load_device("h200")
    assert topology_for(device, 24, path).nodes == 3
    assert topology_for(device, 9, str(path)).devices_per_node == 3  # its third node makes it even
    with pytest.raises(UsageError, match=r"nearest: 24$"):
        topology_for(device, 32, path)


def test_a_machine_of_another_device_is_refused():
    with pytest.raises(UsageError, match="has h100-sxm-80gb, not a100-sxm-80gb"):
        topology_for(load_device("a100"), 8, "dgx-h100")


def test_a_missing_link_is_named(tmp_path):
    alone = msgspec.structs.replace(small_node(per_node=4), links=())
    assert topology_for(load_device("h200"), 1, alone).links == ()
    with pytest.raises(UsageError, match="no link of scope 'node'"):
        topology_for(load_device("h200"), 4, alone)


def test_two_links_of_one_scope_are_refused(tmp_path):
    node = small_node(per_node=8)
    path = tmp_path / "double.yaml"
    dump_file(path, msgspec.structs.replace(node, links=(*node.links, node.links[0])))
    with pytest.raises(InvalidFile, match="at most one link has scope node"):
        load_node_type(path)


def rails(**fields) -> NodeType:
    node = load_node_type("hgx-h100-rails")
    return msgspec.structs.replace(node, **fields)


@pytest.mark.parametrize(
    ("node", "path"),
    [
        (rails(device="h100-xsm-80gb"), "device"),
        (rails(links=load_node_type("dgx-h100").links), "links"),
        (rails(devices_per_node=9), "fabric.wires"),
        (rails(devices_per_node=10**12), "devices_per_node"),
        (rails(nodes=64, fabric=msgspec.structs.replace(rails().fabric, network=None)),
         "fabric.network"),
    ],
)  # fmt: skip
def test_a_topology_that_cannot_be_names_the_field(tmp_path, node, path):
    file = tmp_path / "lab.yaml"
    dump_file(file, node)
    with pytest.raises(InvalidFile) as caught:
        load_node_type(file)
    assert caught.value.path == path
    assert caught.value.exit_status == 2
    if path == "device":
        assert "nearest: h100-sxm-80gb" in str(caught.value)


def test_devices_left_out_leave_the_fabric_too():
    node = load_node_type("h100-nvl-pairs")
    topology = topology_for(load_device(node.device), 12, node)
    assert (topology.nodes, topology.devices_per_node) == (2, 6)
    named = {end for wires in topology.fabric.wires for ends in wires.joins for end in ends}
    assert {each for each in named if each.startswith("gpu")} == {f"gpu{at}" for at in range(6)}
    assert topology.fabric.network == node.fabric.network
    one = topology_for(load_device(node.device), 4, node)
    assert one.fabric.network is None  # a single node


def test_a_fabric_without_a_network_serves_one_node_only():
    node = load_node_type("a100-pcie-mixed")
    open_ended = msgspec.structs.replace(node, nodes=None)
    device = load_device(node.device)
    assert topology_for(device, 4, open_ended).nodes == 1
    with pytest.raises(UsageError, match=r"fabric\.network: is missing, and 2 nodes need one"):
        topology_for(device, 8, open_ended)


def test_a_missing_topology_file_is_named(tmp_path):
    with pytest.raises(InvalidFile, match="no such file"):
        load_node_type(str(tmp_path / "none.yaml"))


@given(
    gpus=st.integers(-2, 80),
    per_node=st.integers(1, 9),
    nodes=st.none() | st.integers(1, 8),
)
def test_a_layout_has_exactly_the_gpus_or_names_counts_that_fit(gpus, per_node, nodes):
    node = small_node(per_node=per_node, nodes=nodes)
    device = load_device("h200")
    # brute force over all layouts that the rule allows
    fewest = max(1, -(-gpus // per_node))
    most = fewest if nodes is None else nodes
    even = [n for n in range(1, most + 1) if gpus >= 1 and gpus % n == 0 and gpus // n <= per_node]
    try:
        topology = topology_for(device, gpus, node)
    except UsageError as error:
        assert even == []
        for count in str(error).rpartition("nearest: ")[2].split(" or "):
            assert topology_for(device, int(count), node).devices == int(count)
    else:
        assert topology.devices == gpus
        assert topology.nodes == min(even)
