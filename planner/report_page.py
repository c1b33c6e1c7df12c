"""The parts of a plan's report as HTML: figures with their tables, sections, and the page.

All text passes `markup` on its way in. A policy in the head forbids the page to fetch or to run
anything, whatever a name in it may hold.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from planner.explain import Table
from planner.report_style import STYLE
from planner.report_svg import markup

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CHOSEN = '<tr class="chosen">'
KEYS = {
    "line": '<line x1="0" y1="6" x2="18" y2="6" class="{}"/>',
    "box": '<rect x="2" y="0" width="14" height="12" class="{}"/>',
    "circle": '<circle cx="9" cy="6" r="5" class="{}"/>',
    "square": '<rect x="4.5" y="1.5" width="9" height="9" class="{}"/>',
    "triangle": '<polygon points="9,0 15,11 3,11" class="{}"/>',
    "diamond": '<polygon points="9,-1 16,6 9,13 2,6" class="{}"/>',
    "bar": '<rect x="7" y="-1" width="4" height="14" class="{}"/>',
}
"""Signs of a legend, each 18 by 12."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An entry of a legend."""

    sign: str
    """A name of KEYS."""
    look: str
    """Classes."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart with what it says in words, its legend, and its numbers."""

    name: str
    heading: str
    lead: str
    drawings: tuple[str, ...]
    keys: tuple[Key, ...] = ()
    table: Table | None = None
    wide: bool = False


def figure(what: Figure) -> str:
    """One figure; the numbers are behind a line that opens by mouse or keyboard."""
    legend = "".join(
        f'<li><svg aria-hidden="true" viewBox="0 0 18 12">{KEYS[key.sign].format(key.look)}</svg>'
        f"{markup(key.text)}</li>"
        for key in what.keys
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    drawn = "".join(what.drawings)
    if what.wide:
        inner = "".join(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{markup(what.heading)}">'
            f"{each}</div>"
            for each in what.drawings
        )
        drawn = inner if len(what.drawings) == 1 else f'<div class="stack">{inner}</div>'
    elif len(what.drawings) > 1:
        drawn = f'<div class="pair">{drawn}</div>'
    numbers = details("The numbers", table(what.table, what.heading)) if what.table else ""
    return (
        f'<figure id="{what.name}"{_wide(what)}>'
        f"<figcaption><h3>{markup(what.heading)}</h3>"
        f'<p class="lead">{markup(what.lead)}</p></figcaption>'
        f"{legend}{drawn}{numbers}</figure>"
    )


def _wide(what: Figure) -> str:
    return ' class="wide"' if what.wide or len(what.drawings) > 1 else ""


def figures(several: Iterable[Figure]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(figure(each) for each in several)}</div>'


def table(what: Table, caption: str, *, chosen: int | None = None) -> str:
    """A table that scrolls by itself; columns of words are set to the left."""
    look = [_look([row[column] for row in what.rows]) for column in range(len(what.columns))]
    head = "".join(
        f'<th scope="col"{style}>{markup(name)}</th>'
        for name, style in zip(what.columns, look, strict=True)
    )
    body = "".join(
        (CHOSEN if number == chosen else "<tr>")
        + "".join(f"<td{style}>{markup(cell)}</td>" for cell, style in zip(row, look, strict=True))
        + "</tr>"
        for number, row in enumerate(what.rows)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{markup(caption)}"><table>'
        f"<caption>{markup(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _look(cells: list[str]) -> str:
    """Class of a column: words that may wrap, words, or numbers."""
    if any(len(cell) > 36 for cell in cells):
        return ' class="words"'
    numbers = [cell[:1].isdigit() or cell[:1] in {"", "-"} for cell in cells]
    return "" if all(numbers) else ' class="left"'


def card(heading: str, lead: str, inner: str) -> str:
    """A frame as of a figure around something else; inner is HTML."""
    return (
        f'<div class="card"><h3>{markup(heading)}</h3><p class="lead">{markup(lead)}</p>'
        f"{inner}</div>"
    )


def details(summary: str, inner: str) -> str:
    """Something that opens when asked; inner is HTML."""
    return f"<details><summary>{markup(summary)}</summary>{inner}</details>"


def items(lines: Iterable[str]) -> str:
    """A list of sentences."""
    return f'<ul class="plain">{"".join(f"<li>{markup(line)}</li>" for line in lines)}</ul>'


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """(figure, what it is) side by side."""
    inner = "".join(f"<li><b>{markup(value)}</b>{markup(what)}</li>" for value, what in pairs)
    return f'<ul class="tiles">{inner}</ul>'


def section(name: str, heading: str, inner: str) -> str:
    """A part of the page; inner is HTML."""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{markup(heading)}</h2>{inner}</section>'
    )


def page(title: str, header: str, body: str, footer: str) -> bytes:
    """The whole file; header, body and footer are HTML."""
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{markup(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>{header}</header>
<main>{body}</main>
<footer>{footer}</footer>
</body>
</html>
"""
    return text.encode("utf-8", "replace")
