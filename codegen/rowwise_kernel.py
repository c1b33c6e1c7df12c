"""The Triton body of a row-wise region (codegen/rowwise.py): loads, steps and stores of its tiles.

Columns beyond the width and rows beyond the last hold zeros, which every op maps to zero, so that
no sum has to mask them. Weights are no kernel's result: they are fetched before the wait for the
kernel before.
"""

from collections.abc import Mapping, Sequence

from codegen.rowwise import Input, Region, Step

WIDTH = 100
INDENT = "    "
Tile = tuple[int, int]
"""A value's place and one of its segments."""


# --- text -----------------------------------------------------------------------------------------


def letters(value: Input | Step) -> str:
    """Name of a tensor in Python."""
    if isinstance(value, Input) and value.kind == "scalar":
        return value.name
    if isinstance(value, Input) and "_" in value.name:
        return value.name
    vector = isinstance(value, Input) and value.kind == "vector"
    return f"{value.name}_{'D' if vector else 'TD'}"


def stem_of(value: Input | Step) -> str:
    """Name of a tile in Triton: without the letters of its shape."""
    head, _, letters = value.name.rpartition("_")
    return head if head and letters.isupper() else value.name


def call_text(
    head: str, args: Sequence[str], tail: str, depth: int, *, trailing: bool = True
) -> str:
    """A call as ruff formats it: on one line, else its arguments on one, else one a line."""
    pad = INDENT * depth
    line = f"{pad}{head}{', '.join(args)}{tail}"
    if len(line) <= WIDTH:
        return line
    inner = f"{pad}{INDENT}{', '.join(args)}"
    if len(inner) <= WIDTH and not trailing:
        return f"{pad}{head}\n{inner}\n{pad}{tail}"
    return "\n".join([f"{pad}{head}", *(f"{pad}{INDENT}{arg}," for arg in args), f"{pad}{tail}"])


def tag_of(groups: Sequence[object], at: int) -> str:
    return f"_{at}" if len(groups) > 1 else ""


def sum_text(region: Region, classes: Sequence[int], name: str) -> str:
    """Columns of some segments, such as `2 * width_0 + width_1`; "" for none."""
    terms = []
    for group in dict.fromkeys(classes):
        count = list(classes).count(group)
        one = f"{name}{tag_of(region.widths, group)}"
        terms.append(one if count == 1 else f"{count} * {one}")
    return " + ".join(terms)


# --- kernel ---------------------------------------------------------------------------------------


class _Kernel:
    """Lines of one kernel's body."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.values = region.values

    def name(self, tile: Tile) -> str:
        """The variable that holds a tile; cuts and fp32 forms are their argument's."""
        place, segment = tile
        value = self.values[place]
        if isinstance(value, Step) and value.op in ("cut", "to_fp32"):
            return self.name((value.args[0], segment + value.first))
        return f"{stem_of(value)}{tag_of(value.classes, segment)}"

    def dtype(self, place: int) -> str:
        """The variable, or type, to which a value is rounded."""
        origin = self.region.dtype_of(place)
        return "tl.float32" if origin is None else f"{stem_of(self.values[origin])}_dtype"

    def rounded(self, text: str, place: int) -> str:
        """An fp32 expression as it is read back after it was stored."""
        dtype = self.dtype(place)
        if dtype == "tl.float32":
            return text
        return f"({text}).to({dtype}).to(tl.float32)"

    def needed(self, wanted: Sequence[Tile]) -> list[Tile]:
        """Tiles that these are made of and the wanted ones, sorted by place."""
        found: set[Tile] = set()
        stack = list(wanted)
        while stack:
            tile = stack.pop()
            if tile in found:
                continue
            found.add(tile)
            value = self.values[tile[0]]
            if isinstance(value, Step):
                stack += [
                    (place, tile[1] + value.first)
                    for place in value.args
                    if self.values[place].classes
                ]
        return sorted(found)

    def load(self, tile: Tile, at: str, mask: Mapping[str, str]) -> str:
        """A segment of an argument, in fp32."""
        place, segment = tile
        value = self.values[place]
        assert isinstance(value, Input), "steps are computed"
        pointer = f"{stem_of(value)}_ptr{self.offset(value, segment)}"
        head = f"{self.name(tile)} = tl.load("
        args = [f"{pointer} + {at}", f"mask={mask[value.kind]}", "other=0.0"]
        return f"{head}{', '.join(args)}).to(tl.float32)"

    def offset(self, value: Input | Step, segment: int) -> str:
        """Where a segment's columns begin."""
        before = sum_text(self.region, value.classes[:segment], "WIDTH")
        return f" + {before}" if before else ""

    def compute(self, tile: Tile) -> list[str]:
        """A step of one segment; its reductions are done."""
        place, segment = tile
        step = self.values[place]
        assert isinstance(step, Step), "arguments are loaded"
        args = [self.name((each, segment)) for each in step.args if self.values[each].classes]
        own = self.name(tile)
        if step.op == "add":
            return [f"{own} = {self.rounded(f'{args[0]} + {args[1]}', place)}"]
        if step.op == "mul":
            return [f"{own} = {self.rounded(f'{args[0]} * {args[1]}', place)}"]
        if step.op == "silu":
            return [f"{own} = {self.rounded(f'{args[0]} / (1.0 + tl.exp(-{args[0]}))', place)}"]
        if step.op == "rms_norm":
            scaled = self.rounded(f"{args[0]} * {stem_of(step)}_scale", place)
            return [f"{own} = {scaled}", f"{own} = {self.rounded(f'{own} * {args[1]}', place)}"]
        assert step.op in ("cut", "to_fp32"), f"no Triton form of {step.op}"
        return []  # the same registers

    def store(self, tile: Tile, at: str) -> str:
        """A segment of a result."""
        place, segment = tile
        value = self.values[place]
        pointer = f"{stem_of(value)}_ptr{self.offset(value, segment)}"
        return f"tl.store({pointer} + {at}, {self.name(tile)}.to({self.dtype(place)}), mask=inside)"

    def outputs(self) -> list[Tile]:
        """All segments of all results."""
        return [
            (place, segment)
            for place in self.region.outputs
            for segment in range(len(self.values[place].classes))
        ]

    def scale(self, place: int, sums: Sequence[str]) -> list[str]:
        """1 / rms of a row from the sums of its segments' squares."""
        step = self.values[place]
        assert isinstance(step, Step), "reductions are steps"
        width = sum_text(self.region, step.classes, "WIDTH")
        width = f"({width})" if " " in width else width
        eps, own = stem_of(self.values[step.args[2]]), stem_of(step)
        if len(sums) == 1:
            return [f"{own}_scale = 1.0 / tl.sqrt({sums[0]}[:, None] / {width} + {eps})"]
        return [
            f"{own}_sum = {sums[0]}",
            *(f"{own}_sum += {each}" for each in sums[1:]),
            f"{own}_mean = {own}_sum[:, None] / {width}",
            f"{own}_scale = 1.0 / tl.sqrt({own}_mean + {eps})",
        ]

    def group(self, tile: Tile) -> int:
        """Class of a tile."""
        return self.values[tile[0]].classes[tile[1]]

    def reductions(self) -> list[int]:
        """Places of the steps that reduce, in order."""
        return [
            place
            for place, value in enumerate(self.values)
            if isinstance(value, Step) and value.op == "rms_norm"
        ]

    def operand(self, place: int) -> list[Tile]:
        """Segments of what a reduction sums the squares of."""
        step = self.values[place]
        assert isinstance(step, Step), "reductions are steps"
        return [(step.args[0], segment) for segment in range(len(step.classes))]

    # the whole row in registers, or blocks of columns where nothing reduces

    def straight(self) -> list[str]:
        """Loads, steps and stores, each tile once."""
        wanted = [*self.outputs(), *(tile for p in self.reductions() for tile in self.operand(p))]
        tiles = self.needed(wanted)
        loads = [tile for tile in tiles if isinstance(self.values[tile[0]], Input)]
        rows = [tile for tile in loads if self.values[tile[0]].kind == "row"]  # type: ignore[union-attr]
        vectors = [tile for tile in loads if tile not in rows]
        lines = self.masks(sorted({self.group(tile) for tile in tiles}))
        at = {tile: self.column(self.group(tile)) for tile in tiles}
        masks = {
            tile: {
                "row": f"inside{self.mask_tag(self.group(tile))}",
                "vector": f"there{self.mask_tag(self.group(tile))}",
            }
            for tile in loads
        }
        # weights are no kernel's result: they may be on their way before the wait
        lines += [self.load(tile, at[tile], masks[tile]) for tile in vectors]
        lines += ["if OVERLAP:", f"{INDENT}tl.extra.cuda.gdc_wait()"]
        lines += [self.load(tile, at[tile], masks[tile]) for tile in rows]
        outputs, reductions = set(self.outputs()), set(self.reductions())
        done: set[int] = set()
        for tile in tiles:
            place = tile[0]
            if isinstance(self.values[place], Input):
                continue
            if place in reductions and place not in done:
                done.add(place)
                sums = [
                    f"tl.sum({self.name(each)} * {self.name(each)}, 1)"
                    for each in self.operand(place)
                ]
                lines += self.scale(place, sums)
            lines += self.compute(tile)
            if tile in outputs:
                store = self.store(tile, at[tile])
                lines.append(store.replace("mask=inside", f"mask={self.mask(tile)}"))
        return lines

    def masks(self, groups: Sequence[int]) -> list[str]:
        """Which columns of a tile there are, alone and in rows that there are."""
        lines = []
        for group in groups:
            tag = self.mask_tag(group)
            lines.append(f"there{tag} = {self.column(group)} < WIDTH{tag}")
            lines.append(f"inside{tag} = (row < rows) & there{tag}")
        return lines

    def mask(self, tile: Tile) -> str:
        """Of a tile's rows and columns, where all classes are in scope."""
        return f"inside{self.mask_tag(self.group(tile))}"

    def mask_tag(self, group: int) -> str:
        """Suffix of what a class has of its own."""
        return tag_of(self.region.widths, group)

    def column(self, group: int) -> str:
        """The variable of a class's column index."""
        return f"at{self.mask_tag(group)}" if self.region.reduces else "at"

    # rows that do not fit

    def looped(self) -> list[str]:
        """Loops over the columns of each class: one for each depth of reductions, and the last."""
        depth = self.depths()
        lines = ["if OVERLAP:", f"{INDENT}tl.extra.cuda.gdc_wait()"]
        for level in sorted(set(depth.values())):
            places = [place for place, own in depth.items() if own == level]
            wanted = {place: self.operand(place) for place in places}
            sums: dict[int, list[str]] = {place: [] for place in places}
            for group in sorted({self.group(tile) for each in wanted.values() for tile in each}):
                lines += self.sums_loop(group, wanted, sums)
            for place in places:
                lines += self.scale(place, sums[place])
        for group in sorted({self.group(tile) for tile in self.outputs()}):
            own = [tile for tile in self.outputs() if self.group(tile) == group]
            body = self.loop_tiles(group, own)
            body += [self.store(tile, "at") for tile in sorted(own)]
            lines += self.loop(group, body)
        return lines

    def depths(self) -> dict[int, int]:
        """How many reductions stand before each, on the longest way."""
        found: dict[int, int] = {}
        for place in self.reductions():
            before = [found[each] for each in found if self.reads(place, each)]
            found[place] = 1 + max(before, default=0)
        return found

    def reads(self, place: int, other: int) -> bool:
        """Whether a value depends on another."""
        value = self.values[place]
        return isinstance(value, Step) and any(
            each == other or self.reads(each, other) for each in value.args
        )

    def sums_loop(
        self, group: int, wanted: Mapping[int, list[Tile]], sums: Mapping[int, list[str]]
    ) -> list[str]:
        """A class's part of some sums of squares, whose accumulators are added to `sums`."""
        tag = self.mask_tag(group)
        own = [tile for each in wanted.values() for tile in each if self.group(tile) == group]
        lines, adding = [], []
        for place, tiles in wanted.items():
            mine = [self.name(tile) for tile in tiles if self.group(tile) == group]
            if mine:
                squares = f"{stem_of(self.values[place])}_squares{tag}"
                lines.append(f"{squares} = tl.zeros([ROWS, BLOCK{tag}], tl.float32)")
                adding += [f"{squares} += {name} * {name}" for name in mine]
                sums[place].append(f"tl.sum({squares}, 1)")
        return lines + self.loop(group, self.loop_tiles(group, own) + adding)

    def loop_tiles(self, group: int, wanted: Sequence[Tile]) -> list[str]:
        """Loads and steps of a class's tiles inside a loop."""
        tiles = self.needed(wanted)
        mask = {"row": "inside", "vector": "there"}
        lines = []
        for tile in tiles:
            if isinstance(self.values[tile[0]], Input):
                lines.append(self.load(tile, "at", mask))
            else:
                lines += self.compute(tile)
        return lines

    def loop(self, group: int, body: list[str]) -> list[str]:
        """A loop over a class's columns."""
        tag = self.mask_tag(group)
        head = [f"at = first + tl.arange(0, BLOCK{tag})[None, :]", f"there = at < WIDTH{tag}"]
        lines = [*head, "inside = (row < rows) & there", *body]
        return [
            f"for first in range(0, WIDTH{tag}, BLOCK{tag}):",
            *(f"{INDENT}{line}" for line in lines),
        ]


def kernel_source(op: str, region: Region) -> str:
    kernel = _Kernel(region)
    values = region.values
    rows = [each for each in region.inputs if each.kind == "row"]
    arguments = [
        *(f"{stem_of(each)}_ptr" for each in region.inputs if each.kind != "scalar"),
        *(f"{stem_of(values[place])}_ptr" for place in region.outputs),
        *(stem_of(each) for each in region.inputs if each.kind == "scalar"),
        "rows",
        *(f"{stem_of(each)}_stride_{letter}" for each in rows for letter in "tn"),
    ]
    tags = [tag_of(region.widths, group) for group in range(len(region.widths))]
    sizes = [f"WIDTH{tag}" for tag in tags]
    if region.reduces:
        sizes += [*(f"BLOCK{tag}" for tag in tags), "WHOLE"]
    else:
        sizes += ["BLOCK", "BLOCKS"]
    arguments += [f"{each}: tl.constexpr" for each in ("INNER", *sizes, "ROWS", "OVERLAP")]
    lines = ["if OVERLAP:", f"{INDENT}tl.extra.cuda.gdc_launch_dependents()"]
    program = "tl.program_id(0)"
    if region.reduces:
        start = f"{program}.to(tl.int64) * ROWS"
    else:
        start = f"({program} // BLOCKS).to(tl.int64) * ROWS"
    lines.append(f"row = {start} + tl.arange(0, ROWS)[:, None]")
    dtypes = {kernel.dtype(place) for place in range(len(values)) if values[place].classes}
    for each in region.inputs:
        name = f"{stem_of(each)}_dtype"
        if name in dtypes and _dtype_is_read(kernel, name):
            lines.append(f"{name} = {stem_of(each)}_ptr.dtype.element_ty")
    for each in rows:
        stem = stem_of(each)
        lines.append(
            f"{stem}_ptr += row // INNER * {stem}_stride_t + row % INNER * {stem}_stride_n"
        )
    for place in region.outputs:
        width = sum_text(region, values[place].classes, "WIDTH")
        width = f"({width})" if "+" in width else width
        lines.append(f"{stem_of(values[place])}_ptr += row * {width}")
    if not region.reduces:
        lines.append(f"at = {program} % BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :]")
        lines += kernel.straight()
    else:
        lines.append("if WHOLE:")
        lines += [f"{INDENT}at{tag} = tl.arange(0, BLOCK{tag})[None, :]" for tag in tags]
        lines += [f"{INDENT}{line}" for line in kernel.straight()]
        lines.append("else:")
        lines += [f"{INDENT}{line}" for line in kernel.looped()]
    body = "\n".join(_folded(f"{INDENT}{line}") for line in lines)
    return "@triton.jit\n" + call_text(f"def {op}_kernel(", arguments, "):", 0) + f"\n{body}"


def _dtype_is_read(kernel: _Kernel, name: str) -> bool:
    """Whether a step or a store rounds to it."""
    steps = [
        place
        for place, value in enumerate(kernel.values)
        if isinstance(value, Step) and value.op not in ("cut", "to_fp32")
    ]
    return any(kernel.dtype(place) == name for place in (*steps, *kernel.region.outputs))


def _folded(line: str) -> str:
    """A statement as ruff formats it, where it is longer than a line."""
    if len(line) <= WIDTH:
        return line
    text = line.lstrip()
    pad = line[: len(line) - len(text)]
    head, opened, rest = text.partition("tl.store(" if text.startswith("tl.store") else "tl.load(")
    if opened:
        tail = ").to(tl.float32)" if rest.endswith(").to(tl.float32)") else ")"
        inner = rest.removesuffix(tail)
        if len(f"{pad}{INDENT}{inner}") <= WIDTH:
            return f"{pad}{head}{opened}\n{pad}{INDENT}{inner}\n{pad}{tail}"
    return line
