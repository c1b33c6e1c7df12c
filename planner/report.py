"""The plan and its reasons as one HTML file that needs nothing else: no network, no scripts.

Read from the top: the decision in words, why, how sure; then what decided (every candidate), what
it would do (times, memory, ops, percentiles), where it runs, and what lost. The same plan and the
same search give the same bytes.
"""

from collections import Counter

from planner.breakdown import breakdown
from planner.explain import Table, arithmetic, evidence_line, rejected_line
from planner.report_ops import memory_figure, ops_figure, percentiles_figure
from planner.report_page import card, details, figures, items, page, section, table, tiles
from planner.report_search import (
    pruned_table,
    ranked_table,
    rate_figure,
    rejected_table,
    sensitivity_figure,
    user_figure,
)
from planner.report_svg import markup
from planner.report_timeline import long_figure, mix_figure, watch
from planner.report_times import schedule_figure, step_figure, ttft_figure
from planner.report_topology import topology_figure
from planner.search import Found
from planner.text import seconds_text, tokens_text
from plans.plan import Plan

REPORT_FILE = "report.html"


def report_html(found: Found, plan: Plan) -> bytes:
    """The whole file."""
    seen = watch(plan)
    mix = None if seen is None else mix_figure(plan, seen)
    percentiles = percentiles_figure(plan)
    change = sensitivity_figure(found)
    body = [
        section(
            "decision",
            "What decided",
            figures([rate_figure(found), user_figure(found)])
            + card(
                "The best shapes in order",
                f"Best by: {found.objective}.",
                table(
                    ranked_table(found), "Shaded: the plan; ranks as in alternatives.csv", chosen=0
                ),
            ),
        ),
        section(
            "times",
            "How fast",
            figures(
                [
                    ttft_figure(plan, seen),
                    step_figure(plan),
                    schedule_figure(plan),
                    memory_figure(found, plan),
                    *([percentiles] if percentiles else []),
                    ops_figure(breakdown(found.ranked[0])),
                ]
            ),
        ),
        section("places", "Where", figures([topology_figure(plan)])),
        section("steps", "When", figures([long_figure(plan), *([mix] if mix else [])])),
        section("doubts", "What else", (figures([change]) if change else "") + _lost(found)),
    ]
    title = f"{plan.name}: {arithmetic(plan)}"
    return page(title, _header(found, plan), "".join(body), _footer(plan))


def _header(found: Found, plan: Plan) -> str:
    p, predicted = plan.parallelism, plan.predicted
    context = plan.limits.context_tokens
    longest = str(context)
    at = tokens_text(context)
    held = plan.kv.pages_per_rank * plan.kv.page_tokens * p.kvp
    over = (
        f"{plan.model.name} on {plan.topology.device}, up to {at} tokens of context, workload"
        f" {plan.workload.name}"
    )
    goodput = [] if predicted.replay is None else [predicted.replay]
    numbers = [
        (f"{predicted.capacity_rps:.3g}/s", f"requests at capacity, bound by {predicted.bound_by}"),
        *(
            (
                f"{each.goodput_rps:.3g}/s",
                f"goodput in replay at {each.arrival_rps:.3g}/s: {each.attainment:.0%} in time",
            )
            for each in goodput
        ),
        (seconds_text(predicted.ttft_s[longest]), f"first token of a lone prompt of {at}"),
        (seconds_text(predicted.tbt_s[longest]), f"between tokens of a lone request at {at}"),
        (f"{held / 1e6:.3g} M", "tokens of KV in a replica"),
        (f"±{predicted.error_band:.0%}", "error band around the times"),
    ]
    return (
        f'<p class="over">{markup(over)}</p><h1>{markup(arithmetic(plan))}</h1>'
        f"<p>{markup(_in_words(plan))}</p>{tiles(numbers)}"
        f'<div class="columns"><div><h3>Why</h3>{items(found.why)}</div>'
        f"<div><h3>How sure</h3>{_how_sure(plan)}</div></div>"
    )


def _in_words(plan: Plan) -> str:
    """What the degrees mean, for who does not know the letters."""
    p = plan.parallelism
    parts = [
        f"{p.tp} GPUs share every matrix (tp)" if p.tp > 1 else "each matrix is on one GPU (tp)",
        f"{p.spp} stages pass chunks on (spp)" if p.spp > 1 else "one stage has all layers (spp)",
        f"{p.kvp} groups share the KV of a request (kvp)"
        if p.kvp > 1
        else "one group holds the KV of a request (kvp)",
        f"{p.replicas} independent replicas" if p.replicas > 1 else "one replica",
    ]
    idle = f"; {p.idle} GPUs stay idle" if p.idle else ""
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}{idle}."


def _how_sure(plan: Plan) -> str:
    """Evidence by term, then what the reader must know."""
    predicted = plan.predicted
    counts = Counter(predicted.provenance.values())
    terms = Table(
        columns=("term", "where it comes from"),
        rows=tuple(sorted(predicted.provenance.items())),
    )
    summary = ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))
    return items([evidence_line(plan), *predicted.notes]) + details(
        f"Terms of a step: {summary}", table(terms, "Provenance of each term")
    )


def _lost(found: Found) -> str:
    """What was ranked last, rejected, or never priced."""
    parts = [f"<p>{markup(rejected_line(found).capitalize())}.</p>"]
    if found.ledger:
        shown = rejected_table(found)
        caption = f"{len(shown.rows)} of {len(found.ledger)}; alternatives.csv has all"
        parts.append(details("Rejected, with what it needs and has", table(shown, caption)))
    if found.pruned:
        shown = pruned_table(found)
        caption = f"{len(shown.rows)} of {len(found.pruned)} rows; alternatives.csv has all"
        parts.append(details("Left out by a bound, with its proof", table(shown, caption)))
    lead = "Candidates that do not fit, miss a hard target, or were ruled out by a bound."
    return card("What lost", lead, "".join(parts))


def _footer(plan: Plan) -> str:
    made = plan.made_by
    return (
        f"<h2>Made by</h2><pre><code>{markup(made.command)}</code></pre>"
        f"<p>{markup(f'medha {made.medha}, effort {made.effort}, seed {made.seed}')}. Times are"
        " predicted; replays run in virtual time on the runtime's own loop."
        " <code>plan.yaml</code> holds every number in full, <code>alternatives.csv</code> every"
        " candidate.</p>"
    )
