"""Draws charts as SVG text: scales, axes, marks, and labels that keep out of each other's way.

Everything that comes from outside is escaped here, in `markup` and `attributes`. Colours and
strokes are classes of planner/report_style.py, so one drawing serves light, dark and paper. A plot
carries its two scales as attributes, so that a test reads the numbers back from the positions of
marks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape

FONT = 13
"""Of labels, in units of the drawing, which is about as many pixels wide as a phone."""
CHARACTER = 0.62
"""Width of a character as a share of the font's size: that of digits in wide system fonts."""
WIDTH = 440
"""Of an ordinary chart."""
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Text = Callable[[float], str]


def markup(text: object) -> str:
    """Text as it may stand in HTML and SVG, inside an attribute too."""
    return escape(str(text), quote=True)


def shown(value: object) -> str:
    """An attribute's value; lengths to a hundredth of a unit."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return str(value)


def attributes(values: dict[str, object]) -> str:
    """` name="value"` of each; `class_` stands for class, `data_x` for data-x."""
    return "".join(
        f' {name.rstrip("_").replace("_", "-")}="{markup(shown(value))}"'
        for name, value in values.items()
    )


def plain(value: float) -> str:
    """A tick without a unit."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def text_width(text: str, size: float = FONT) -> float:
    """About how wide a text is."""
    return len(text) * size * CHARACTER


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """From numbers to positions along an axis."""

    low: float
    high: float
    start: float
    """Position of low."""
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a number; those outside are put at the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def words(self) -> str:
        """As an attribute: kind, both numbers, both positions."""
        kind = "log" if self.log else "linear"
        return f"{kind} {self.low!r} {self.high!r} {self.start!r} {self.end!r}"


def log_scale(values: Iterable[float], start: float, end: float, room: float = 1.25) -> Scale:
    """A logarithmic scale with some room on both sides."""
    positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = min(positive) / room, max(positive) * room
    if high / low < 4:  # a line of equal values would be all that is seen
        low, high = low / 1.5, high * 1.5
    return Scale(low=low, high=high, start=start, end=end, log=True)


def linear_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A linear scale from 0 with some room at its end."""
    most = max((value for value in values if math.isfinite(value)), default=1.0)
    return Scale(low=0.0, high=most * 1.08 or 1.0, start=start, end=end)


def ticks(scale: Scale, most: int = 6, *, binary: bool = False) -> list[float]:
    """Round numbers inside the scale, at most so many."""
    if not scale.log:
        return _even_ticks(scale, most)
    if binary:
        low, high = math.ceil(math.log2(scale.low) - 1e-9), math.floor(math.log2(scale.high) + 1e-9)
        stride = max(-(-(high - low + 1) // most), 1)
        return [2.0**power for power in range(high, low - 1, -stride)][::-1]
    low, high = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [
            value
            for power in range(low, high + 1)
            for factor in factors
            if scale.low <= (value := factor * 10.0**power) <= scale.high
        ]
        if len(found) <= most:
            return found if len(found) > 2 else _even_ticks(scale, most)
    stride = -(-len(found) // most)
    return found[::-1][::stride][::-1]


def _even_ticks(scale: Scale, most: int) -> list[float]:
    step = _round_step((scale.high - scale.low) / max(most - 1, 1))
    first = math.ceil(scale.low / step - 1e-9)
    return [step * index for index in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    unit = 10.0 ** math.floor(math.log10(step))
    return next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= step * 0.999)


@dataclass(kw_only=True, slots=True)
class Labels:
    """Places of texts, none over another nor outside."""

    inside: Box
    taken: list[Box] = field(default_factory=list)

    def block(self, box: Box) -> None:
        """Keeps texts out of a box."""
        self.taken.append(box)

    def place(
        self, at: Point, text: str, *, gap: float = 8, sides: str = "ensw"
    ) -> tuple[float, float, str] | None:
        """(x, y, anchor) of a text beside a point, or None where there is no room."""
        x, y = at
        width, height = text_width(text), float(FONT)
        for side in sides:
            left, middle, anchor = {
                "e": (x + gap, y, "start"),
                "w": (x - gap - width, y, "end"),
                "n": (x - width / 2, y - gap - height / 2, "middle"),
                "s": (x - width / 2, y + gap + height / 2, "middle"),
            }[side]
            box = (left, middle - height / 2 - 1, left + width, middle + height / 2 + 1)
            if self._free(box):
                self.block(box)
                edge = {"start": left, "end": left + width, "middle": left + width / 2}[anchor]
                return edge, middle + height * 0.35, anchor
        return None

    def _free(self, box: Box) -> bool:
        left, top, right, bottom = self.inside
        if box[0] < left or box[1] < top or box[2] > right or box[3] > bottom:
            return False
        return not any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in self.taken
        )


class Drawing:
    """One SVG under construction."""

    def __init__(
        self, *, name: str, width: float, height: float, title: str, description: str
    ) -> None:
        """The name is unique in the page; title and description are what screen readers say."""
        self.name = name
        self.width = width
        self.height = height
        self._title = title
        self._description = description
        self._parts: list[str] = []

    def add(self, tag: str, *, tip: str = "", content: str = "", **values: object) -> None:
        """An element, with a text in it, and one that shows while the pointer is on it."""
        self._element(tag, values, tip=tip, content=content)

    def _element(
        self, tag: str, values: dict[str, object], *, tip: str = "", content: str = ""
    ) -> None:
        inner = (f"<title>{markup(tip)}</title>" if tip else "") + markup(content)
        self._parts.append(f"<{tag}{attributes(values)}>{inner}</{tag}>")

    def text(self, x: float, y: float, content: str, **values: object) -> None:
        """A label; anchored at its start where nothing else is said."""
        self._element("text", {"x": float(x), "y": float(y), **values}, content=content)

    def line(self, start: Point, end: Point, *, tip: str = "", **values: object) -> None:
        """A straight line."""
        (x1, y1), (x2, y2) = start, end
        ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
        self._element("line", {**ends, **values}, tip=tip)

    def rect(self, box: Box, *, tip: str = "", **values: object) -> None:
        """A rectangle."""
        left, top, right, bottom = (float(edge) for edge in box)
        size = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        self._element("rect", {**size, **values}, tip=tip)

    def path(self, points: Sequence[Point], *, tip: str = "", **values: object) -> None:
        """A line through points."""
        way = " ".join(f"{shown(float(x))},{shown(float(y))}" for x, y in points)
        self._element("polyline", {"points": way, **values}, tip=tip)

    def mark(
        self, kind: str, at: Point, *, size: float = 5, tip: str = "", **values: object
    ) -> None:
        """A circle, square, triangle or diamond around a point."""
        x, y = float(at[0]), float(at[1])
        values["data_at"] = f"{shown(x)} {shown(y)}"
        if kind == "circle":
            self._element("circle", {"cx": x, "cy": y, "r": float(size), **values}, tip=tip)
            return
        corners = {
            "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
            "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        }[kind]
        way = " ".join(f"{shown(x + size * dx)},{shown(y + size * dy)}" for dx, dy in corners)
        self._element("polygon", {"points": way, **values}, tip=tip)

    @contextmanager
    def group(self, **values: object) -> Iterator[None]:
        """Elements that belong together."""
        self._parts.append(f"<g{attributes(values)}>")
        yield
        self._parts.append("</g>")

    def svg(self) -> str:
        """The whole element."""
        size = f"0 0 {shown(float(self.width))} {shown(float(self.height))}"
        head = attributes(
            {
                "id": self.name,
                "viewBox": size,
                "role": "img",
                "aria_labelledby": f"{self.name}-title {self.name}-desc",
                "width": shown(float(self.width)),
                "height": shown(float(self.height)),
            }
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg"{head}>'
            f'<title id="{self.name}-title">{markup(self._title)}</title>'
            f'<desc id="{self.name}-desc">{markup(self._description)}</desc>'
            f"{''.join(self._parts)}</svg>"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One side of a plot."""

    scale: Scale
    label: str
    text: Text
    binary: bool = False
    """Ticks at powers of two."""
    most: int = 6


def level_ticks(
    drawing: Drawing, scale: Scale, edges: tuple[float, float], text: Text, *, most: int = 6
) -> None:
    """Grid lines between two heights and the numbers below; those that would touch are left out."""
    top, bottom = edges
    free = -math.inf
    for value in ticks(scale, most):
        at = scale.at(value)
        drawing.line((at, top), (at, bottom), class_="grid")
        half = text_width(text(value)) / 2
        if at - half > free and at + half < drawing.width:
            drawing.text(at, bottom + 17, text(value), class_="tick", text_anchor="middle")
            free = at + half + 8


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to the wanted ones as a gap between any two and the ends allow."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    found = [0.0] * len(wanted)
    free = low
    for index in order:
        found[index] = free = max(wanted[index], free)
        free += gap
    limit = high
    for index in reversed(order):
        found[index] = limit = min(found[index], limit)
        limit -= gap
    return found


@contextmanager
def plot(drawing: Drawing, x: Axis, y: Axis) -> Iterator[None]:
    """Draws grid, ticks and names of the axes; what is drawn inside belongs to the plot.

    The name of the upright axis stands level above it, where it is read without turning the head.
    """
    left, right = x.scale.start, x.scale.end
    bottom, top = y.scale.start, y.scale.end
    for value in ticks(y.scale, y.most, binary=y.binary):
        at = y.scale.at(value)
        drawing.line((left, at), (right, at), class_="grid")
        drawing.text(left - 6, at + FONT * 0.35, y.text(value), class_="tick", text_anchor="end")
    free = -math.inf
    for value in ticks(x.scale, x.most, binary=x.binary):
        at = x.scale.at(value)
        drawing.line((at, bottom), (at, bottom + 4), class_="axis")
        text = x.text(value)
        half = text_width(text) / 2
        if at - half > free and at + half <= drawing.width:
            drawing.text(at, bottom + 20, text, class_="tick", text_anchor="middle")
            free = at + half + 4
    drawing.line((left, bottom), (right, bottom), class_="axis")
    drawing.text(2, top - 12, y.label, class_="name")
    drawing.text(right, bottom + 38, x.label, class_="name", text_anchor="end")
    with drawing.group(class_="plot", data_x=x.scale.words, data_y=y.scale.words):
        yield
