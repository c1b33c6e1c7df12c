"""Hypothesis strategies for the vocabulary of plans/.

`plans()` draws plans that pass every check of plans/check.py by construction. Fixed small values,
such as `tiny_plan()`, are in builders.py and can be imported from here too.
"""

import math
from itertools import pairwise
from pathlib import PurePosixPath

import msgspec
from builders import (
    Rows,
    make_plan,
    sixteen_gpu_plan,
    tiny_model,
    tiny_plan,
    tiny_step_time,
    tiny_topology,
    tiny_workload,
)
from hypothesis import strategies as st

from plans.mesh import Parallelism
from plans.model import DTYPE_BYTES, Model, Rope, RopeScaling
from plans.plan import Kernel, MadeBy, Plan, When
from plans.steptime import Knot, StepTime
from plans.topology import Link, Topology
from plans.workload import ClassTargets, Quantile, RequestClass, Targets, Workload

__all__ = [
    "links",
    "make_plan",
    "meshes",
    "models",
    "plans",
    "quantile_tables",
    "schedules",
    "sixteen_gpu_plan",
    "step_times",
    "tables",
    "tiny_model",
    "tiny_plan",
    "tiny_step_time",
    "tiny_topology",
    "tiny_workload",
    "topologies",
    "workloads",
]

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,4}){0,2}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
SECONDS = st.floats(0, 1e-3)
COEFFICIENTS = st.floats(0, 1e-7)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def models(draw: st.DrawFn, *, tp: int = 1, min_layers: int = 1, context: int = 64) -> Model:
    """Models that tp can split, trained for `context` tokens or stretched to them."""
    kv_heads = draw(
        st.sampled_from([each for each in (1, 2, 3, 4, 8) if each % tp * (tp % each) == 0])
    )
    heads = math.lcm(kv_heads, tp) * draw(st.sampled_from([1, 2, 4, 7]))
    limit = draw(st.integers(16, 1 << 20))
    scaling = RopeScaling(
        kind=draw(st.sampled_from(["linear", "llama3", "yarn"])),
        factor=draw(st.floats(1, 8)) + context / limit,
        original_context_tokens=limit,
        assumed=limit < context or draw(st.booleans()),
    )
    return Model(
        family=draw(NAMES),
        name=draw(NAMES),
        layers=draw(st.integers(min_layers, min_layers + 6)),
        hidden=draw(st.sampled_from([32, 96, 128])),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 64])),
        ffn=draw(st.integers(1, 40)) * tp,
        vocab=draw(st.integers(2, 100)) * tp,
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        weight_dtype=draw(DTYPES),
        context_limit=limit,
        rope=Rope(
            theta=draw(st.floats(1, 1e7)),
            scaling=scaling if limit < context or draw(st.booleans()) else None,
        ),
    )


@st.composite
def links(draw: st.DrawFn, scope: str) -> Link:
    """A link of a scope."""
    kinds = ["nvlink", "pcie", "shared-memory"] if scope == "node" else ["infiniband", "ethernet"]
    return Link(
        kind=draw(st.sampled_from(kinds)),
        scope=scope,  # type: ignore[arg-type]
        bandwidth_bytes_per_s=draw(st.floats(1e6, 1e12)),
        efficiency=draw(st.floats(0.1, 1)),
        latency_s=draw(st.floats(1e-7, 1e-3)),
        source=draw(TEXTS),
    )


@st.composite
def topologies(
    draw: st.DrawFn, *, nodes: int | None = None, per_node: int | None = None
) -> Topology:
    """Machines of up to 4 nodes of up to 8 devices, or of the size given."""
    return Topology(
        device=draw(NAMES),
        device_memory_bytes=draw(st.integers(1 << 20, 1 << 38)),
        nodes=nodes or draw(st.integers(1, 4)),
        devices_per_node=per_node or draw(st.integers(1, 8)),
        links=(draw(links("node")), draw(links("cluster"))),
    )


@st.composite
def meshes(draw: st.DrawFn) -> Parallelism:
    """Degrees of up to 4 on each axis, without idle devices."""
    return Parallelism(
        tp=draw(st.sampled_from([1, 2, 4])),
        spp=draw(st.integers(1, 4)),
        kvp=draw(st.integers(1, 4)),
        replicas=draw(st.integers(1, 3)),
    )


@st.composite
def quantile_tables(draw: st.DrawFn) -> tuple[Quantile, ...]:
    """Length tables from quantile 0 to 1."""
    inner = draw(st.sets(st.floats(0.01, 0.99), max_size=4))
    quantiles = [0.0, *sorted(inner), 1.0]
    size = len(quantiles)
    tokens = draw(st.lists(st.integers(1, 1 << 20), min_size=size, max_size=size))
    return tuple(zip(quantiles, sorted(tokens), strict=True))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Mixes of one to three classes."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    weights = [draw(st.integers(1, 99)) for _ in names]
    classes = tuple(
        RequestClass(
            name=name,
            share=weight / sum(weights),
            input_tokens=draw(quantile_tables()),
            output_tokens=draw(quantile_tables()),
        )
        for name, weight in zip(names, weights, strict=True)
    )
    return Workload(name=draw(NAMES), classes=classes, source=draw(TEXTS))


@st.composite
def tables(draw: st.DrawFn, *, min_size: int = 0) -> tuple[Knot, ...]:
    """Monotone tables of up to 5 rows, flat and steep pieces included."""
    ats = sorted(draw(st.sets(st.integers(1, 5000), min_size=min_size, max_size=5)))
    seconds = sorted(draw(st.lists(SECONDS, min_size=len(ats), max_size=len(ats))))
    return tuple(Knot(at=at, seconds=each) for at, each in zip(ats, seconds, strict=True))


@st.composite
def step_times(draw: st.DrawFn, *, stages: int | None = None) -> StepTime:
    """Step times with every term, any of them 0."""
    count = stages or draw(st.integers(1, 4))
    return StepTime(
        source=draw(st.sampled_from(["profile", "roofline"])),
        stage_layers=tuple(draw(st.integers(1, 8)) for _ in range(count)),
        overhead_s=draw(SECONDS),
        matmul=draw(tables(min_size=1)),
        pair_s=draw(COEFFICIENTS),
        key_s=draw(COEFFICIENTS),
        decode_key_s=draw(COEFFICIENTS),
        decode_sequence_s=draw(COEFFICIENTS),
        comm_latency_s=draw(COEFFICIENTS),
        comm_token_s=draw(COEFFICIENTS),
        merge_latency_s=draw(COEFFICIENTS),
        merge_token_s=draw(COEFFICIENTS),
        hop_latency_s=draw(COEFFICIENTS),
        hop_token_s=draw(COEFFICIENTS),
        head=draw(tables()),
        margin=draw(st.floats(0, 0.5)),
    )


@st.composite
def schedules(draw: st.DrawFn, *, most_tokens: int = 2048) -> Rows:
    """(until_tokens, chunk_tokens) rows: untils rise, chunks do not."""
    untils = sorted(draw(st.sets(st.integers(64, most_tokens), min_size=1, max_size=4)))
    size = len(untils)
    chunks = draw(st.lists(st.integers(16, 512), min_size=size, max_size=size))
    return tuple(zip(untils, sorted(chunks, reverse=True), strict=True))


RANGES = st.sampled_from([((None, "torch"),), ((64, "torch"), (None, "torch"))])
"""Rows of an op by the tokens of a step, in a target that every device has."""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that pass every check."""
    mesh = draw(meshes())
    per_node = mesh.tp * draw(st.integers(1, 4))
    nodes = -(-mesh.ranks // per_node)
    mesh = msgspec.structs.replace(mesh, idle=nodes * per_node - mesh.ranks)
    rows = draw(schedules())
    model = draw(models(tp=mesh.tp, min_layers=mesh.spp, context=rows[-1][0]))
    spare = model.layers - mesh.spp
    cuts = sorted(
        draw(st.lists(st.integers(0, spare), min_size=mesh.spp - 1, max_size=mesh.spp - 1))
    )
    edges = [0, *(cut + row for row, cut in enumerate(cuts, start=1)), model.layers]
    mix = draw(workloads())
    targets = st.builds(
        ClassTargets, ttft_s=st.none() | st.floats(0.1, 9), tbt_s=st.none() | st.floats(0.01, 1)
    )
    files = draw(st.dictionaries(NAMES.map("program/{}.py".format), DIGESTS, max_size=3))
    kernels = tuple(
        Kernel(
            op=PurePosixPath(file).stem,
            when=When(tokens_max=tokens_max),
            target=target,
            params=draw(st.dictionaries(st.sampled_from(["BLOCK_M", "STAGES"]), st.integers(0))),
            file=file,
        )
        for file in files
        for tokens_max, target in draw(RANGES)
    )
    return make_plan(
        model=model,
        workload=mix,
        parallelism=mesh,
        topology=draw(topologies(nodes=nodes, per_node=per_node)),
        stage_layers=tuple(end - first for first, end in pairwise(edges)),
        step_time=draw(step_times(stages=mesh.spp)),
        rows=rows,
        kv_dtype=draw(DTYPES),
        page_tokens=draw(st.sampled_from([16, 32, 64, 128])),
        spare_pages=draw(st.integers(0, 50)),
        name=draw(NAMES),
        made_by=MadeBy(
            medha="0.1.0", effort=draw(NAMES), seed=draw(st.integers(0)), command=draw(TEXTS)
        ),
        targets=Targets(classes={each.name: draw(targets) for each in mix.classes[:1]}),
        kernels=kernels,
        files=files,
    )
