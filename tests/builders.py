"""Small valid values of the vocabulary, and a whole valid plan around whatever a test cares about.

Builders take parts as keywords and fill in the rest so that the result passes plans/check.py.
"""

import math
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from plans.chunks import ChunkRow, Prefill, WorkTable, add_sharded_chunk, split_prompt
from plans.mesh import Parallelism
from plans.model import DTYPE_BYTES, Model, Rope, RopeScaling
from plans.plan import Kv, MadeBy, Memory, Placement, Plan, Predicted, Scheduler
from plans.steptime import Knot, StepLoad, StepTime
from plans.topology import Link, Topology
from plans.workload import Limits, RequestClass, Targets, Workload

Rows = tuple[tuple[int, int], ...]
"""(until_tokens, chunk_tokens) of a chunk schedule."""


# --- small fixed values -------------------------------------------------------------------------


def tiny_model(**changes: Any) -> Model:
    """Four layers of 64: whole in a CPU's cache, and degrees of 2 divide everything."""
    model = Model(
        family="llama",
        name="tiny",
        layers=4,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=128,
        vocab=256,
        weight_dtype="fp32",
        context_limit=1024,
        rope=Rope(theta=10000.0),
    )
    return msgspec.structs.replace(model, **changes)


def tiny_step_time(**changes: Any) -> StepTime:
    """One stage of four layers, in round figures: T tokens behind none take 1 ms + 4 x T us."""
    time = StepTime(
        source="roofline",
        stage_layers=(4,),
        overhead_s=0.001,
        matmul=(Knot(at=1, seconds=1e-06), Knot(at=1024, seconds=0.001024)),
        pair_s=1e-09,
        key_s=1e-08,
        decode_key_s=1e-08,
        decode_sequence_s=1e-06,
        head=(Knot(at=1, seconds=1e-05), Knot(at=64, seconds=6.4e-05)),
        margin=0.1,
    )
    return msgspec.structs.replace(time, **changes)


def tiny_workload(**changes: Any) -> Workload:
    """Mostly short chats, and documents up to 896 tokens."""
    workload = Workload(
        name="tiny-mix",
        classes=(
            RequestClass(
                name="chat",
                share=0.9,
                input_tokens=((0.0, 16), (0.5, 64), (1.0, 128)),
                output_tokens=((0.0, 8), (1.0, 64)),
            ),
            RequestClass(
                name="document",
                share=0.1,
                input_tokens=((0.0, 512), (1.0, 896)),
                output_tokens=((0.0, 8), (1.0, 64)),
            ),
        ),
        source="made up",
    )
    return msgspec.structs.replace(workload, **changes)


def tiny_topology(*, nodes: int = 1, devices_per_node: int = 1, **changes: Any) -> Topology:
    """CPUs of 64 MiB, joined by shared memory in a node and by a slow network between nodes."""
    links = []
    if devices_per_node > 1:
        links.append(("shared-memory", "node", 1e10, 1e-06))
    if nodes > 1:
        links.append(("ethernet", "cluster", 1e9, 1e-05))
    topology = Topology(
        device="cpu",
        device_memory_bytes=1 << 26,
        nodes=nodes,
        devices_per_node=devices_per_node,
        links=tuple(
            Link(
                kind=kind,  # type: ignore[arg-type]
                scope=scope,  # type: ignore[arg-type]
                bandwidth_bytes_per_s=bandwidth,
                efficiency=0.8,
                latency_s=latency_s,
                source="made up",
            )
            for kind, scope, bandwidth, latency_s in links
        ),
    )
    return msgspec.structs.replace(topology, **changes)


def tiny_plan(**changes: Any) -> Plan:
    """tiny_model() on one CPU; keywords are those of make_plan."""
    return make_plan(**changes)


# --- a valid plan around given parts ------------------------------------------------------------


def chunk_rows(rows: Rows, step_time: StepTime, shard_tokens: int) -> tuple[ChunkRow, ...]:
    """Rows with the predictions that the step times give."""
    bare = tuple(
        ChunkRow(until_tokens=until, chunk_tokens=chunk, predicted_s=0.0) for until, chunk in rows
    )
    work = WorkTable(bare, step_time, shard_tokens)
    return tuple(
        msgspec.structs.replace(row, predicted_s=work.solo_s(row.until_tokens)) for row in bare
    )


def largest_step_s(rows: tuple[ChunkRow, ...], step_time: StepTime, shard_tokens: int) -> float:
    """Seconds of the dearest chunk of a schedule, over all groups, stages summed."""
    worst = 0.0
    for tokens, prefix in split_prompt(rows, rows[-1].until_tokens, shard_tokens):
        for behind in range(prefix // shard_tokens + 1):
            load = StepLoad(step_time)
            add_sharded_chunk(load, tokens, prefix, shard_tokens, behind=behind)
            worst = max(worst, load.seconds())
    return worst


def make_plan(
    *,
    model: Model | None = None,
    workload: Workload | None = None,
    parallelism: Parallelism | None = None,
    topology: Topology | None = None,
    stage_layers: tuple[int, ...] = (),
    step_time: StepTime | None = None,
    rows: Rows = ((256, 128), (1024, 64)),
    kv_dtype: str = "fp32",
    page_tokens: int = 16,
    spare_pages: int = 64,
    **changes: Any,
) -> Plan:
    """A valid plan around the parts given; `changes` then replace fields of the plan as they are.

    stage_layers  layers of each stage; by default as even as possible
    rows          the schedule; its end is the context limit
    spare_pages   pages of the pool beyond one request of full length
    """
    model = model or tiny_model()
    mesh = parallelism or Parallelism()
    topology = topology or tiny_topology(devices_per_node=mesh.ranks + mesh.idle)
    edges = [model.layers * stage // mesh.spp for stage in range(mesh.spp + 1)]
    if stage_layers:
        edges = [0, *accumulate(stage_layers)]
    stages = tuple(pairwise(edges))
    lengths = tuple(end - first for first, end in stages)
    time = msgspec.structs.replace(step_time or tiny_step_time(), stage_layers=lengths)
    context = rows[-1][0]
    shard_pages = math.ceil(context / mesh.kvp / page_tokens)
    shard = shard_pages * page_tokens
    chunks = chunk_rows(rows, time, shard)
    idle_budget_s = largest_step_s(chunks, time, shard) * (1 + time.margin) + 0.001
    devices = [divmod(each, topology.devices_per_node) for each in range(topology.devices)]

    pages = shard_pages + spare_pages
    page_bytes = page_tokens * model.head_dim * DTYPE_BYTES[kv_dtype]
    page_bytes += 4 if kv_dtype == "fp8" else 0  # the scale of a head
    kv_bytes = pages * 2 * max(lengths) * -(-model.kv_heads // mesh.tp) * page_bytes
    layers_bytes = max(lengths) * model.layer_parameters() * DTYPE_BYTES[model.weight_dtype]
    ends_bytes = 2 * model.embedding_parameters * (4 if model.weight_dtype == "fp32" else 2)
    weights = -(-(layers_bytes + ends_bytes) // mesh.tp)
    activations, reserved, free = 1 << 20, 1 << 20, 12345
    capacity = max(topology.device_memory_bytes, weights + activations + reserved + kv_bytes + free)
    lengths_s = {str(row.until_tokens): row.predicted_s for row in chunks}
    plan = Plan(
        name=model.name,
        made_by=MadeBy(medha="0.1.0", effort="quick", seed=0, command="medha-plan --model tiny"),
        model=model,
        workload=workload or tiny_workload(),
        targets=Targets(),
        limits=Limits(context_tokens=context, sequences=16),
        topology=msgspec.structs.replace(topology, device_memory_bytes=capacity),
        parallelism=mesh,
        stages=stages,
        placement=Placement(
            rank_map=tuple(devices[: mesh.ranks]), idle=tuple(devices[mesh.ranks :])
        ),
        prefill=Prefill(chunks=chunks),
        kv=Kv(
            page_tokens=page_tokens,  # type: ignore[arg-type]
            dtype=kv_dtype,  # type: ignore[arg-type]
            pages_per_rank=pages,
            tokens_per_kvp_shard=shard,
        ),
        memory=Memory(
            capacity_bytes=capacity,
            weights_bytes=weights,
            activations_bytes=activations,
            reserved_bytes=reserved,
            kv_bytes=kv_bytes,
            free_bytes=capacity - weights - activations - reserved - kv_bytes,
        ),
        scheduler=Scheduler(
            step_budget_s=idle_budget_s / 2,
            idle_budget_s=idle_budget_s,
            long_tokens=max(1, context // 2),
            min_chunk_tokens=min(32, rows[-1][1]),
            max_step_tokens=rows[0][1] + 64,
        ),
        step_time=time,
        predicted=Predicted(
            ttft_s=lengths_s,
            tbt_s={
                each: time.step_s(
                    decode_kv_tokens=[min(int(each), shard)],
                    kvp_groups=-(-int(each) // shard),
                )
                for each in lengths_s
            },
            capacity_rps=1.0,
            bound_by="matmul",
            error_band=0.1,
            provenance={"matmul": "formula", "attention": "extrapolated by 2.0"},
        ),
    )
    return msgspec.structs.replace(plan, **changes)


# --- a plan of real size ------------------------------------------------------------------------


def sixteen_gpu_plan() -> Plan:
    """Llama 3 70B on two nodes of eight H100: tp 8, two stages, a million tokens.

    Shapes from the model's published config.json. Rates from NVIDIA's H100 SXM datasheet (989e12
    bf16 FLOP/s dense, 3.35e12 bytes/s, NVLink 450e9 bytes/s a direction, 400 Gb/s network), times
    round shares of about 0.7: a roofline, not a measurement.
    """
    model = tiny_model(
        name="llama3-70b",
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ffn=28672,
        vocab=128256,
        weight_dtype="bf16",
        context_limit=8192,
        rope=Rope(
            theta=500000.0,
            scaling=RopeScaling(
                kind="yarn", factor=128.0, original_context_tokens=8192, assumed=True
            ),
        ),
    )
    time = StepTime(
        source="roofline",
        stage_layers=(40, 40),
        overhead_s=0.001,
        # a layer has 855.6e6 parameters, an eighth a rank: 214 MB to read, 214 MFLOP a token
        matmul=(
            Knot(at=1, seconds=8.5e-05),
            Knot(at=256, seconds=8.5e-05),
            Knot(at=8192, seconds=0.0025),
        ),
        pair_s=6.5e-12,  # 4 x 8 heads x 128 FLOP
        key_s=2e-10,  # 512 bytes: K and V of one head
        decode_key_s=2e-10,
        decode_sequence_s=1e-07,
        comm_latency_s=2e-05,
        comm_token_s=9e-08,  # two all-reduces of 16 kB
        hop_latency_s=1e-05,
        hop_token_s=5e-08,  # 2 kB a rank, on its own network port
        head=(Knot(at=1, seconds=0.0001), Knot(at=256, seconds=0.00012)),
        margin=0.1,
    )
    workload = tiny_workload(
        name="chats-and-documents",
        classes=(
            RequestClass(
                name="chat",
                share=0.95,
                input_tokens=((0.0, 32), (0.5, 1024), (1.0, 8192)),
                output_tokens=((0.0, 16), (1.0, 1024)),
            ),
            RequestClass(
                name="document",
                share=0.05,
                input_tokens=((0.0, 131072), (1.0, 1000000)),
                output_tokens=((0.0, 16), (1.0, 1024)),
            ),
        ),
    )
    plan = make_plan(
        model=model,
        workload=workload,
        parallelism=Parallelism(tp=8, spp=2),
        topology=Topology(
            device="h100-sxm-80gb",
            device_memory_bytes=80 << 30,
            nodes=2,
            devices_per_node=8,
            links=(
                Link(
                    kind="nvlink",
                    scope="node",
                    bandwidth_bytes_per_s=450e9,
                    efficiency=0.7,
                    latency_s=1e-05,
                    source="NVIDIA H100 SXM datasheet",
                ),
                Link(
                    kind="infiniband",
                    scope="cluster",
                    bandwidth_bytes_per_s=50e9,
                    efficiency=0.8,
                    latency_s=1e-05,
                    source="NVIDIA ConnectX-7 datasheet",
                ),
            ),
        ),
        step_time=time,
        rows=((65536, 1312), (131072, 864), (262144, 512), (524288, 256), (1048576, 128)),
        kv_dtype="bf16",
        page_tokens=128,
        spare_pages=12288,
    )
    gib = 1 << 30
    memory = msgspec.structs.replace(
        plan.memory,
        activations_bytes=2 * gib,
        reserved_bytes=4 * gib,
        free_bytes=80 * gib - plan.memory.weights_bytes - plan.memory.kv_bytes - 6 * gib,
    )
    return msgspec.structs.replace(
        plan,
        name="llama3-70b-16xh100",
        made_by=msgspec.structs.replace(
            plan.made_by, command="medha-plan --model llama3-70b --gpus 16 --max-context 1m"
        ),
        memory=memory,
        scheduler=Scheduler(step_budget_s=0.03, idle_budget_s=0.1, max_step_tokens=2048),
    )
