"""Reads a plan's report back: its elements, and the numbers that positions in charts stand for."""

import math
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input", "base"}
HALF_STEP = 0.00501
"""Half of the hundredth of a unit to which the drawing rounds positions."""


@dataclass
class Node:
    """One element."""

    tag: str
    attributes: dict[str, str]
    parent: "Node | None" = None
    children: list["Node | str"] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def all(self, tag: str, **wanted: str) -> list["Node"]:
        """Elements below this one with a tag and attributes; an empty value asks for presence."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and all(
                    (name.replace("_", "-") in child.attributes)
                    if value == ""
                    else child.attributes.get(name.replace("_", "-")) == value
                    for name, value in wanted.items()
                ):
                    found.append(child)
                found += child.all(tag, **wanted)
        return found

    def any(self, **wanted: str) -> list["Node"]:
        """Elements of every tag that carry the attributes."""
        tags = {node.tag for node in self.walk()}
        return [node for tag in sorted(tags) for node in self.all(tag, **wanted)]

    def walk(self) -> list["Node"]:
        """This element and all below."""
        return [
            self,
            *(one for child in self.children if isinstance(child, Node) for one in child.walk()),
        ]

    @property
    def text(self) -> str:
        """All text below."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def svg(self, name: str) -> "Node":
        """The drawing of a name."""
        (found,) = self.all("svg", id=name)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.here = self.root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of {tag} stands twice"
        node = Node(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.children.append(data)


def read(report: bytes) -> Node:
    """The page as a tree; fails where an element is not closed in order."""
    reader = _Reader()
    reader.feed(report.decode())
    reader.close()
    assert reader.here is reader.root, f"<{reader.here.tag}> is not closed"
    return reader.root


@dataclass(frozen=True)
class Interval:
    """The numbers that a rounded position can stand for."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        slack = 1e-9 * abs(value)
        return self.low - slack <= value <= self.high + slack


@dataclass(frozen=True)
class Back:
    """From positions along an axis to numbers."""

    kind: str
    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, words: str) -> "Back":
        """From the attribute of a plot."""
        kind, *numbers = words.split()
        return cls(kind, *(float(number) for number in numbers))

    def _number(self, position: float) -> float:
        share = (position - self.start) / (self.end - self.start)
        if self.kind == "log":
            return self.low * math.exp(share * math.log(self.high / self.low))
        return self.low + share * (self.high - self.low)

    def number(self, position: str | float) -> Interval:
        """What a position stands for, as narrow as the drawing's rounding lets one say."""
        ends = [self._number(float(position) + sign * HALF_STEP) for sign in (-1, 1)]
        return Interval(min(ends), max(ends))

    def length(self, size: str) -> Interval:
        """What a length from the low end of a linear axis, both ends rounded, stands for."""
        middle = float(size) / (self.end - self.start) * (self.high - self.low)
        slack = 2 * HALF_STEP / abs(self.end - self.start) * (self.high - self.low)
        return Interval(middle - slack, middle + slack)


@dataclass(frozen=True)
class Plot:
    """A plot with its scales."""

    group: Node

    @classmethod
    def of(cls, page: Node, name: str) -> "Plot":
        """The plot of a drawing."""
        (group,) = page.svg(name).all("g", **{"class": "plot"})
        return cls(group)

    @property
    def x(self) -> Back:
        """The level axis."""
        return Back.of(self.group["data-x"])

    @property
    def y(self) -> Back:
        """The upright axis."""
        return Back.of(self.group["data-y"])

    def spot(self, mark: Node) -> tuple[Interval, Interval]:
        """Both numbers of a mark."""
        across, up = mark["data-at"].split()
        return self.x.number(across), self.y.number(up)

    def points(self, line: Node) -> list[tuple[Interval, Interval]]:
        """Both numbers of each point of a line."""
        pairs = [pair.split(",") for pair in line["points"].split()]
        return [(self.x.number(x), self.y.number(y)) for x, y in pairs]
