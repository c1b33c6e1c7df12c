"""What a fabric may not be, each with the path of the field that is wrong."""

import pytest
from msgspec import structs

from plans.codec import dumps, loads
from plans.errors import InvalidFile
from plans.topology import Fabric, Link, Network, NodeType, Part, Wires, fabric_problems

LINK = Link(
    kind="pcie",
    scope="node",
    bandwidth_bytes_per_s=1e9,
    efficiency=0.5,
    latency_s=1e-5,
    source="made up",
)
PORT = structs.replace(LINK, kind="infiniband", scope="cluster")
GOOD = Fabric(
    parts=(Part(name="switch", kind="pcie-switch"), Part(name="nic0", kind="nic")),
    wires=(Wires(link=LINK, joins=(("gpu0", "switch"), ("gpu1", "switch"), ("nic0", "switch"))),),
    network=Network(nodes_per_leaf=4, rails=True, leaf=PORT),
)
NODE = NodeType(name="box", device="h100-sxm-80gb", devices_per_node=2, fabric=GOOD)


def problems(nodes: int = 1, **fields) -> list[tuple[str, str]]:
    return list(fabric_problems(structs.replace(GOOD, **fields), 2, nodes))


def joined(*joins: tuple[str, str]) -> tuple[Wires, ...]:
    return (Wires(link=LINK, joins=joins),)


def test_a_connected_fabric_has_no_problem():
    assert problems(nodes=4) == []


ALL = (("gpu0", "switch"), ("gpu1", "switch"), ("nic0", "switch"))


@pytest.mark.parametrize(
    ("fields", "nodes", "path", "text"),
    [
        (
            {"parts": (*GOOD.parts, Part(name="switch", kind="cpu"))},
            1,
            "fabric.parts[2].name",
            "'switch' stands twice",
        ),
        (
            {"parts": (*GOOD.parts, Part(name="gpu1", kind="cpu"))},
            1,
            "fabric.parts[2].name",
            "'gpu1' stands twice",
        ),
        (
            {"wires": joined(*ALL, ("gpu0", "swich"))},
            1,
            "fabric.wires[0].joins[3]",
            "unknown part 'swich'; nearest: switch",
        ),
        (
            {"wires": joined(*ALL, ("gpu7", "switch"))},
            1,
            "fabric.wires[0].joins[3]",
            "unknown part 'gpu7'; nearest: gpu1, gpu0",
        ),
        (
            {"wires": joined(*ALL, ("gpu0", "gpu0"))},
            1,
            "fabric.wires[0].joins[3]",
            "joins 'gpu0' to itself",
        ),
        (
            {"wires": joined(*ALL, ("switch", "gpu0"))},
            1,
            "fabric.wires[0].joins[3]",
            "joined twice; add the bandwidths up",
        ),
        (
            {"wires": joined(ALL[0], ALL[2])},
            1,
            "fabric.wires",
            "not connected: gpu1 cannot be reached from gpu0",
        ),
        ({"wires": ()}, 1, "fabric.wires", "gpu1, switch, nic0 cannot be reached"),
        (
            {"wires": (Wires(link=PORT, joins=ALL),)},
            1,
            "fabric.wires[0].link.scope",
            "wires of a fabric are in one node",
        ),
        ({"network": None}, 2, "fabric.network", "is missing, and 2 nodes need one"),
        (
            {"parts": GOOD.parts[:1], "wires": joined(*ALL[:2])},
            2,
            "fabric.parts",
            "none is of kind nic",
        ),
        ({}, 5, "fabric.network.spine", "5 nodes exceed nodes_per_leaf 4"),
        (
            {"network": structs.replace(GOOD.network, spine=LINK)},
            2,
            "fabric.network.spine.scope",
            "the network's links join nodes",
        ),
    ],
)
def test_a_broken_rule_names_the_field(fields, nodes, path, text):
    found = problems(nodes, **fields)
    assert [where for where, _ in found] == [path]
    assert text in found[0][1]


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ("1000000000.0", "-1.0", "fabric.wires[0].link.bandwidth_bytes_per_s"),
        ("efficiency: 0.5", "efficiency: 1.5", "fabric.wires[0].link.efficiency"),
        ("kind: nic", "kind: nick", "fabric.parts[1].kind"),
        ("rails: true", "rails: 1", "fabric.network.rails"),
        ("nodes_per_leaf: 4", "nodes_per_leaf: 0", "fabric.network.nodes_per_leaf"),
        ("[gpu0, switch]", "[gpu0]", "fabric.wires[0].joins[0]"),
    ],
)
def test_a_value_of_the_wrong_kind_names_the_field(before, after, path):
    text = dumps(NODE)
    assert before in text
    with pytest.raises(InvalidFile) as caught:
        loads(text.replace(before, after, 1), NodeType)
    assert caught.value.path == path
    assert caught.value.exit_status == 2


def test_a_node_type_without_a_fabric_is_written_without_the_word():
    plain = NodeType(name="box", device="cpu", devices_per_node=1)
    assert dumps(plain) == "name: box\ndevice: cpu\ndevices_per_node: 1\n"
    assert loads(dumps(plain), NodeType) == plain
    assert loads(dumps(NODE), NodeType) == NODE
