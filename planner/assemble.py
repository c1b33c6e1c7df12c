"""From a priced candidate to the plan, with exact predictions; a plan's numbers computed anew."""

from msgspec import structs

from planner.capacity import capacity
from planner.cost import costed
from planner.price import Priced, tbt_s
from planner.schedule import with_predictions
from planner.world import World
from plans.chunks import ChunkRow, Prefill, WorkTable
from plans.plan import MadeBy, Plan, Predicted

SHOWN_TOKENS = (1024, 8192, 32768, 131072)
"""Lengths for which every plan states its times, next to powers of two from a million up."""


def shown_lengths(context_tokens: int) -> tuple[int, ...]:
    """Lengths up to the context limit, and the limit itself."""
    million = 1 << 20
    powers = tuple(
        million << power for power in range(max(context_tokens // million, 1).bit_length())
    )
    return (*(each for each in (*SHOWN_TOKENS, *powers) if each < context_tokens), context_tokens)


def to_plan(
    world: World, priced: Priced, *, name: str, made_by: MadeBy, notes: tuple[str, ...] = ()
) -> Plan:
    """The plan of a candidate, without program: predictions by the exact stage recursion."""
    kv = priced.footprint.kv
    rows, table = with_predictions(priced.sizes, priced.time, kv.tokens_per_kvp_shard)
    lengths = shown_lengths(world.limits.context_tokens)
    basis = costed(priced.world, priced.candidate, priced.placement)
    notes = (*notes, *basis.notes)
    if idle := priced.placement.idle:
        where = ", ".join(f"({node}, {device})" for node, device in idle)
        notes = (*notes, f"{len(idle)} of {world.gpus} devices idle, as (node, device): {where}")
    return Plan(
        name=name,
        made_by=made_by,
        model=priced.world.model,
        workload=world.workload,
        targets=world.targets,
        limits=world.limits,
        topology=world.topology,
        parallelism=priced.candidate.parallelism,
        stages=priced.candidate.stages,
        placement=priced.placement,
        prefill=Prefill(chunks=rows),
        kv=kv,
        memory=priced.footprint.memory,
        scheduler=world.scheduler,
        step_time=priced.time,
        predicted=Predicted(
            ttft_s={str(tokens): table.solo_s(tokens) for tokens in lengths},
            tbt_s={
                str(tokens): tbt_s(priced.time, tokens, kv.tokens_per_kvp_shard)
                for tokens in lengths
            },
            capacity_rps=priced.capacity.rps,
            bound_by=priced.capacity.bound_by,
            error_band=basis.error_band,
            provenance=basis.provenance,
            notes=notes,
        ),
    )


def evaluate(plan: Plan, prompt_tokens: int | None = None) -> Plan:
    """The plan with every predicted number computed from its own step times, without a replay.

    prompt_tokens  a further length to predict, at most the context limit
    """
    shard = plan.kv.tokens_per_kvp_shard
    rows = plan.prefill.chunks
    table = WorkTable(rows, plan.step_time, shard)
    lengths = {
        *shown_lengths(plan.limits.context_tokens),
        *([prompt_tokens] if prompt_tokens else []),
    }
    rate = capacity(
        plan,
        plan.parallelism,
        plan.step_time,
        tuple((row.until_tokens, row.chunk_tokens) for row in rows),
        pool_tokens=plan.kv.pages_per_rank * plan.kv.page_tokens,
        shard_tokens=shard,
        page_tokens=plan.kv.page_tokens,
    )
    chunks = tuple(
        ChunkRow(
            until_tokens=row.until_tokens,
            chunk_tokens=row.chunk_tokens,
            predicted_s=table.solo_s(row.until_tokens),
        )
        for row in rows
    )
    predicted = structs.replace(
        plan.predicted,
        ttft_s={str(tokens): table.solo_s(tokens) for tokens in sorted(lengths)},
        tbt_s={str(tokens): tbt_s(plan.step_time, tokens, shard) for tokens in sorted(lengths)},
        capacity_rps=rate.rps,
        goodput_rps=None,
        bound_by=rate.bound_by,
        replay=None,
    )
    return structs.replace(plan, prefill=Prefill(chunks=chunks), predicted=predicted)
