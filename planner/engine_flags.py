"""A plan in the flags of other engines, as near as they go, and in words what they leave out.

Both engines have tensor and pipeline parallelism; KVP groups become more tensor ranks, since
neither has ranks that replicate weights and share a sequence. vLLM can then cut the KV of a
sequence where tensor ranks outnumber the KV heads; SGLang can for latent attention alone. Flags
that say how big things are (context, chunk, sequences, memory) are always written.
"""

import json
from dataclasses import dataclass
from typing import Any

from planner.space import check_tp
from plans.errors import Infeasible, MedhaError
from plans.model import DTYPE_BYTES, Model
from plans.plan import Plan

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16"}
"""Activations of each dtype of weights."""
MOST_SHARE = 0.95
"""Of the memory: an engine that asks for all of it does not start."""
Words = dict[str, str]
"""Flag to value; an empty value is a switch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFlags:
    """How one server of an engine is started."""

    words: Words
    environment: Words
    lost: tuple[str, ...]
    """What the plan says and the flags cannot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What a server with such flags would do, in the plan's terms."""

    tensor: int
    """Ranks that share every matrix."""
    spp: int
    context_parallel: int
    """Of the tensor ranks, how many share the KV of one sequence."""
    context_tokens: int
    chunk_tokens: int
    sequences: int
    page_tokens: int
    memory_share: float


def vllm_flags(plan: Plan) -> EngineFlags:
    """Flags of `vllm serve`, 0.11.1 or later, without model, address and nodes."""
    p, model = plan.parallelism, plan.model
    tensor, lost = _tensor_ranks(plan)
    kv_heads = 1 if model.latent is not None else model.kv_heads
    shared = max(min(p.kvp, tensor // kv_heads), 1) if tensor > p.tp else 1
    while tensor % shared:
        shared -= 1
    share = memory_share(plan, "vllm")
    room = int(plan.memory.capacity_bytes * share) - plan.memory.activations_bytes
    context, short = _context(plan, tensor, shared, room)
    chunk, sequences = plan.prefill.chunks[0].chunk_tokens, plan.limits.sequences
    words = {
        "--tensor-parallel-size": str(tensor),
        "--pipeline-parallel-size": str(p.spp),
        **({"--decode-context-parallel-size": str(shared)} if shared > 1 else {}),
        "--max-model-len": str(context),
        "--max-num-batched-tokens": str(max(chunk, sequences)),
        "--long-prefill-token-threshold": str(chunk),
        "--max-num-seqs": str(sequences),
        "--gpu-memory-utilization": f"{share:.3f}",
        "--block-size": str(plan.kv.page_tokens),
        "--dtype": DTYPES[model.weight_dtype],
        **({"--quantization": "fp8"} if model.weight_dtype == "fp8" else {}),
        "--kv-cache-dtype": "fp8" if plan.kv.dtype == "fp8" else "auto",
    }
    environment = {}
    if rope := _rope(model):
        words["--hf-overrides"] = json.dumps({"rope_scaling": rope}, sort_keys=True)
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if p.spp > 1:
        environment["VLLM_PP_LAYER_PARTITION"] = _layers(plan)
    if chunk < sequences:
        lost += (
            (
                f"a step takes up to {sequences} tokens, as many as sequences, not {chunk}: vLLM"
                " wants that; chunks of one prompt stay at the plan's size"
            ),
        )
    if shared > 1:
        lost += (
            (
                f"KV is cut over {shared} ranks in decode only, every few tokens, from the first"
                f" token on; the plan lets a group join every {plan.kv.tokens_per_kvp_shard} tokens"
            ),
        )
    pipelined = (
        ("chunks of one prompt follow each other through stages only with model runner v2",)
        if p.spp > 1
        else ()
    )
    return EngineFlags(
        words=words,
        environment=environment,
        lost=(*lost, *short, *_kept_chunk(plan), *pipelined, *_always(plan)),
    )


def sglang_flags(plan: Plan) -> EngineFlags:
    """Flags of sglang.launch_server, 0.5.7 or later, without model, address and nodes."""
    p, model = plan.parallelism, plan.model
    tensor, lost = _tensor_ranks(plan)
    shared = p.kvp if model.latent is not None and tensor > p.tp else 1
    share = memory_share(plan, "sglang")
    context, short = _context(plan, tensor, shared, int(plan.memory.capacity_bytes * share))
    words = {
        "--tp-size": str(tensor),
        "--pp-size": str(p.spp),
        **({"--dcp-size": str(shared)} if shared > 1 else {}),
        "--context-length": str(context),
        "--chunked-prefill-size": str(plan.prefill.chunks[0].chunk_tokens),
        "--max-running-requests": str(plan.limits.sequences),
        "--mem-fraction-static": f"{share:.3f}",
        "--page-size": str(plan.kv.page_tokens),
        "--dtype": DTYPES[model.weight_dtype],
        **({"--quantization": "fp8"} if model.weight_dtype == "fp8" else {}),
        "--kv-cache-dtype": "fp8_e4m3" if plan.kv.dtype == "fp8" else "auto",
    }
    environment = {}
    if rope := _rope(model):
        override = json.dumps({"rope_scaling": rope}, sort_keys=True)
        words["--json-model-override-args"] = override
        environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if p.spp > 1:
        environment["SGLANG_PP_LAYER_PARTITION"] = _layers(plan)
    rows = _kept_chunk(plan)
    if p.spp > 1 and rows:
        words["--enable-dynamic-chunking"] = ""
        environment["SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR"] = "1"
        first, last = plan.prefill.chunks[0], plan.prefill.chunks[-1]
        rows = (
            (
                "the chunk list: dynamic chunking keeps stage times equal from the first chunk of"
                f" {first.chunk_tokens} on; the plan ends at {last.chunk_tokens}"
            ),
        )
    pipelined = ("stages run without the overlap scheduler",) if p.spp > 1 else ()
    return EngineFlags(
        words=words,
        environment=environment,
        lost=(*lost, *short, *rows, *pipelined, *_always(plan)),
    )


def read_vllm(words: Words) -> Exported:
    """What vLLM's flags say."""
    return Exported(
        tensor=int(words["--tensor-parallel-size"]),
        spp=int(words["--pipeline-parallel-size"]),
        context_parallel=int(words.get("--decode-context-parallel-size", "1")),
        context_tokens=int(words["--max-model-len"]),
        chunk_tokens=int(words["--long-prefill-token-threshold"]),
        sequences=int(words["--max-num-seqs"]),
        page_tokens=int(words["--block-size"]),
        memory_share=float(words["--gpu-memory-utilization"]),
    )


def read_sglang(words: Words) -> Exported:
    """What SGLang's flags say."""
    return Exported(
        tensor=int(words["--tp-size"]),
        spp=int(words["--pp-size"]),
        context_parallel=int(words.get("--dcp-size", "1")),
        context_tokens=int(words["--context-length"]),
        chunk_tokens=int(words["--chunked-prefill-size"]),
        sequences=int(words["--max-running-requests"]),
        page_tokens=int(words["--page-size"]),
        memory_share=float(words["--mem-fraction-static"]),
    )


def memory_share(plan: Plan, engine: str) -> float:
    """Share of a device for weights and KV, and for vLLM activations too; rounded down to 0.001."""
    memory = plan.memory
    used = memory.weights_bytes + memory.kv_bytes
    if engine == "vllm":
        used += memory.activations_bytes
    return min(used * 1000 // memory.capacity_bytes / 1000, MOST_SHARE)


def reachable_tokens(plan: Plan, tensor: int, shared: int, room_bytes: int) -> int:
    """Tokens of one sequence that fit beside weights that `tensor` ranks share, by the plan's sums.

    shared      ranks that share one sequence's KV
    room_bytes  of a device, for weights and KV
    """
    weights = plan.memory.weights_bytes * plan.parallelism.tp // tensor
    layers = max(end - first for first, end in plan.stages)
    token = layers * plan.model.rank_kv_elements(tensor) * DTYPE_BYTES[plan.kv.dtype]
    return max(room_bytes - weights, 0) * shared // token


def _tensor_ranks(plan: Plan) -> tuple[int, tuple[str, ...]]:
    """Tensor ranks of a server, KVP groups included where the model divides by them."""
    p, model = plan.parallelism, plan.model
    if p.kvp == 1:
        return p.tp, ()
    wide = p.tp * p.kvp
    try:
        check_tp(model, wide)
    except Infeasible as error:
        idle = (p.kvp - 1) * p.tp * p.spp
        return p.tp, (
            (
                f"kvp {p.kvp}: its groups cannot become tensor ranks ({error}); {idle} GPUs of"
                " each server stay idle"
            ),
        )
    return wide, (
        (
            f"kvp {p.kvp}: its groups become tensor ranks, so every all-reduce has {wide} ranks"
            f" instead of {p.tp}, and weights are cut instead of replicated"
        ),
    )


def _context(plan: Plan, tensor: int, shared: int, room_bytes: int) -> tuple[int, tuple[str, ...]]:
    """The plan's context, or what fits: an engine refuses to start with more."""
    wanted = plan.limits.context_tokens
    fits = reachable_tokens(plan, tensor, shared, room_bytes)
    fits = fits // plan.kv.page_tokens * plan.kv.page_tokens
    if fits >= wanted:
        return wanted, ()
    if fits < plan.kv.page_tokens:
        raise MedhaError(
            f"weights of {plan.model.name} on {tensor} tensor ranks leave no room for KV; nearest:"
            " --export torchrun, which runs the plan as it is"
        )
    return fits, (
        (
            f"{wanted} tokens of context: the KV of one sequence is not cut as the plan cuts it,"
            f" and {fits} tokens fit"
        ),
    )


def _kept_chunk(plan: Plan) -> tuple[str, ...]:
    """What one fixed chunk leaves out of a chunk list."""
    first, last = plan.prefill.chunks[0], plan.prefill.chunks[-1]
    if first.chunk_tokens == last.chunk_tokens:
        return ()
    time = plan.step_time
    behind = last.until_tokens - first.chunk_tokens
    step_s = time.step_s(((first.chunk_tokens, max(behind, 0)),), ())
    return (
        (
            f"the chunk list: {first.chunk_tokens} tokens at every prefix, where the plan goes down"
            f" to {last.chunk_tokens}; behind {max(behind, 0)} tokens such a chunk holds the step"
            f" for {step_s * 1e3:.0f} ms, and the budget beside decodes is"
            f" {plan.scheduler.step_budget_s * 1e3:.0f} ms"
        ),
    )


def _always(plan: Plan) -> tuple[str, ...]:
    """What no engine has a flag for."""
    lost = [
        (
            f"scheduling: policy {plan.scheduler.policy}, deadlines per request, the share of a"
            f" step that a long prompt leaves ({plan.scheduler.max_yield:.0%})"
        )
    ]
    if plan.parallelism.replicas > 1:
        lost.append(
            f"{plan.parallelism.replicas} replicas are servers of their own; put a router in front"
        )
    if plan.parallelism.idle:
        lost.append(f"{plan.parallelism.idle} GPUs stay idle, as in the plan")
    return tuple(lost)


def _layers(plan: Plan) -> str:
    return ",".join(str(end - first) for first, end in plan.stages)


def _rope(model: Model) -> dict[str, Any]:
    """RoPE scaling that the planner assumed; the checkpoint's own needs no flag."""
    scaling = model.rope.scaling
    if scaling is None or not scaling.assumed:
        return {}
    fields: dict[str, Any] = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context_tokens,
    }
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return fields
