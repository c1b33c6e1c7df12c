"""Hypothesis strategies for planning questions small enough to search by brute force."""

from typing import Any

import msgspec
from hypothesis import strategies as st

from planner.world import World, make_world
from plans.model import Model, Rope
from plans.topology import Device, Link, Topology
from plans.workload import RequestClass, Workload

MEBIBYTE = 1 << 20


def tiny_device(**changes: Any) -> Device:
    """A GPU shrunk a thousandfold, in round figures."""
    values: dict[str, Any] = {
        "name": "tiny-gpu",
        "kind": "cuda",
        "memory_bytes": 64 * MEBIBYTE,
        "memory_bandwidth_bytes_per_s": 1e10,
        "peak_flops_per_s": {"bf16": 1e12, "fp32": 1e11},
        "gemm_efficiency": 0.5,
        "attention_efficiency": 0.5,
        "memory_efficiency": 0.8,
        "step_overhead_s": 1e-4,
        "reserved_bytes": MEBIBYTE,
        "default_node": "tiny-node",
        "sources": {},
    }
    return Device(**(values | changes))


def by_datasheet(device: Device) -> Device:
    """The device under another name, so that no profile of it is found: all by roofline."""
    return msgspec.structs.replace(device, name=f"{device.name}-by-datasheet")


def tiny_topology(device: Device, *, nodes: int = 1, per_node: int = 4) -> Topology:
    links = {
        "node": Link(
            kind="nvlink",
            scope="node",
            bandwidth_bytes_per_s=1e9,
            efficiency=0.8,
            latency_s=1e-5,
            source="test",
        ),
        "cluster": Link(
            kind="infiniband",
            scope="cluster",
            bandwidth_bytes_per_s=1e8,
            efficiency=0.8,
            latency_s=3e-5,
            source="test",
        ),
    }
    needed = [name for name, used in (("node", per_node > 1), ("cluster", nodes > 1)) if used]
    return Topology(
        device=device.name,
        device_memory_bytes=device.memory_bytes,
        nodes=nodes,
        devices_per_node=per_node,
        links=tuple(links[name] for name in needed),
    )


def tiny_workload(most_tokens: int = 4000) -> Workload:
    """Mostly short prompts, some of up to most_tokens."""
    short = max(most_tokens // 8, 2)
    return Workload(
        name="tiny-mix",
        classes=(
            RequestClass(
                name="short",
                share=0.75,
                input_tokens=((0.0, 1), (0.5, short // 2), (1.0, short)),
                output_tokens=((0.0, 1), (1.0, 16)),
            ),
            RequestClass(
                name="long",
                share=0.25,
                input_tokens=((0.0, short), (1.0, most_tokens)),
                output_tokens=((0.0, 4), (1.0, 8)),
            ),
        ),
        source="test",
    )


@st.composite
def models(draw: st.DrawFn) -> Model:
    kv_heads = draw(st.sampled_from((1, 2, 3, 4)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 4)))
    return Model(
        family="llama",
        name="drawn",
        layers=draw(st.integers(1, 6)),
        hidden=draw(st.sampled_from((64, 96, 128))),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((16, 32))),
        ffn=draw(st.sampled_from((128, 192, 256))),
        vocab=draw(st.sampled_from((256, 384))),
        qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        weight_dtype=draw(st.sampled_from(("bf16", "fp32"))),
        context_limit=draw(st.sampled_from((1024, 8192))),
        rope=Rope(theta=10000.0),
    )


@st.composite
def worlds(draw: st.DrawFn, **changes: Any) -> World:
    """Up to 8 devices on up to 3 nodes, so small that every constraint binds at times."""
    device = tiny_device(
        memory_bytes=draw(st.integers(24, 80)) * MEBIBYTE,
        memory_bandwidth_bytes_per_s=draw(st.sampled_from((1e9, 1e10))),
    )
    nodes, per_node = draw(st.sampled_from(((1, 1), (1, 2), (1, 3), (1, 7), (2, 4), (3, 2))))
    context = draw(st.integers(2, 6000))
    return make_world(
        model=draw(models()),
        device=device,
        topology=tiny_topology(device, nodes=nodes, per_node=per_node),
        workload=tiny_workload(draw(st.integers(16, 5000))),
        context_tokens=context,
        **changes,
    )
