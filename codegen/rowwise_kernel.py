"""The Triton body of a row-wise region (codegen/rowwise.py): loads, steps and stores of its tiles.

Columns beyond the width and rows beyond the last are loaded as zeros. Where every op before a sum
maps zeros to zero, it has nothing to mask. Weights are no kernel's result: they are fetched before
the wait for the kernel before.
"""

from collections.abc import Mapping, Sequence

from codegen.rowwise import REDUCTIONS, Input, Region, Step
from codegen.rowwise_table import REDUCED, TABLE
from codegen.rowwise_text import INDENT, call_text, folded, stem_of, sum_text, tag_of

Tile = tuple[int, int]
"""A value's place and one of its segments."""


# --- kernel ---------------------------------------------------------------------------------------


class _Kernel:
    """Lines of one kernel's body."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.values = region.values

    def step(self, place: int) -> Step:
        """The step at a place that is known to be one."""
        value = self.values[place]
        assert isinstance(value, Step), "arguments are loaded"
        return value

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
                stack += self.read_by(value, tile[1])
        return sorted(found)

    def read_by(self, step: Step, segment: int) -> list[Tile]:
        """Tiles and numbers of rows from which a segment of a step is made."""
        found = []
        for place in self.data(step):
            count = len(self.values[place].classes)
            if not count:
                found.append((place, 0))
            elif step.op in REDUCED:
                found += [(place, each) for each in range(count)]
            else:
                found.append((place, segment + step.first))
        return found

    def data(self, step: Step) -> list[int]:
        """Arguments that are tensors and read; `like` of a cast only has a type."""
        args = step.args[:1] if step.op == "cast" else step.args
        return [each for each in args if not self.region.is_scalar(each)]

    def load(self, tile: Tile, at: str, mask: Mapping[str, str]) -> str:
        """A segment of an argument, in fp32."""
        place, segment = tile
        value = self.values[place]
        assert isinstance(value, Input), "steps are computed"
        if value.kind == "number":
            pointer = f"{stem_of(value)}_ptr + row, mask=row < rows, other=0.0"
            return f"{self.name(tile)} = tl.load({pointer}).to(tl.float32)"
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
        args = [self.operand_text(each, segment) for each in step.args]
        own = self.name(tile)
        if step.op == "rms_norm":
            scaled = self.rounded(f"{args[0]} * {stem_of(step)}_scale", place)
            return [f"{own} = {scaled}", f"{own} = {self.rounded(f'{own} * {args[1]}', place)}"]
        if step.op in ("cut", "to_fp32"):
            return []  # the same registers
        return [f"{own} = {self.rounded(TABLE[step.op].triton.format(*args), place)}"]

    def operand_text(self, place: int, segment: int) -> str:
        """The variable of an argument of a pointwise step."""
        if self.region.is_scalar(place):
            return stem_of(self.values[place])
        return self.name((place, segment if self.values[place].classes else 0))

    def store(self, tile: Tile, at: str) -> str:
        """A segment of a result."""
        place, segment = tile
        value = self.values[place]
        if not value.classes:
            text = f"{self.name(tile)}.to({self.dtype(place)})"
            return f"tl.store({stem_of(value)}_ptr + row, {text}, mask=row < rows)"
        pointer = f"{stem_of(value)}_ptr{self.offset(value, segment)}"
        return f"tl.store({pointer} + {at}, {self.name(tile)}.to({self.dtype(place)}), mask=inside)"

    def outputs(self) -> list[Tile]:
        """All segments of all results."""
        return [
            (place, segment)
            for place in self.region.outputs
            for segment in range(len(self.values[place].classes) or 1)
        ]

    def reduced(self, place: int, parts: Sequence[str]) -> list[str]:
        """What a reduction makes of the results of its segments, [ROWS] each."""
        step = self.step(place)
        if step.op == "rms_norm":
            return self.scale(place, parts)
        own, joined = self.name((place, 0)), parts[0]
        for each in parts[1:]:
            joined = TABLE[step.op].triton.format(joined, each)
        if len(parts) > 1 and step.op != "max":
            joined = f"({joined})"
        joined = f"{joined}[:, None]"
        if step.op == "mean":
            width = sum_text(self.region, self.values[step.args[0]].classes, "WIDTH")
            joined += f" / ({width})" if " " in width else f" / {width}"
        return [f"{own} = {self.rounded(joined, place)}"]

    def part(self, place: int, tile: Tile, there: str) -> str:
        """What a reduction adds up of a tile, or compares; columns beyond the last are left out."""
        step, name = self.step(place), self.name(tile)
        start = TABLE[step.op].start or "0.0"
        if step.op == "max" or not self.region.keeps_zeros(tile[0]):
            name = f"tl.where({there}, {name}, {start})"
        return f"{name} * {name}" if step.op == "rms_norm" else name

    def scale(self, place: int, sums: Sequence[str]) -> list[str]:
        """1 / rms of a row from the sums of its segments' squares."""
        step = self.step(place)
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
            if isinstance(value, Step) and value.op in REDUCTIONS
        ]

    def operand(self, place: int) -> list[Tile]:
        """Segments of what a reduction goes through."""
        step = self.step(place)
        count = len(self.values[step.args[0]].classes)
        return [(step.args[0], segment) for segment in range(count)]

    # the whole row in registers, or blocks of columns where nothing reduces

    def straight(self) -> list[str]:
        """Loads, steps and stores, each tile once."""
        wanted = [*self.outputs(), *(tile for p in self.reductions() for tile in self.operand(p))]
        tiles = self.needed(wanted)
        loads = [tile for tile in tiles if isinstance(self.values[tile[0]], Input)]
        rows = [tile for tile in loads if self.values[tile[0]].kind == "row"]  # type: ignore[union-attr]
        numbers = [tile for tile in loads if self.values[tile[0]].kind == "number"]  # type: ignore[union-attr]
        vectors = [tile for tile in loads if tile not in rows + numbers]
        wide = [tile for tile in tiles if self.values[tile[0]].classes]
        lines = self.masks(sorted({self.group(tile) for tile in wide}))
        at = dict.fromkeys(tiles, "") | {tile: self.column(self.group(tile)) for tile in wide}
        masks = {
            tile: {
                "row": f"inside{self.mask_tag(self.group(tile))}",
                "vector": f"there{self.mask_tag(self.group(tile))}",
            }
            for tile in wide
        } | {tile: {} for tile in numbers}
        # weights are no kernel's result: they may be on their way before the wait
        lines += [self.load(tile, at[tile], masks[tile]) for tile in vectors]
        lines += ["if OVERLAP:", f"{INDENT}tl.extra.cuda.gdc_wait()"]
        lines += [self.load(tile, at[tile], masks[tile]) for tile in (*numbers, *rows)]
        outputs, reductions = set(self.outputs()), set(self.reductions())
        done: set[int] = set()
        for tile in tiles:
            place = tile[0]
            if isinstance(self.values[place], Input):
                continue
            if place in reductions and place not in done:
                done.add(place)
                parts = []
                for each in self.operand(place):
                    part = self.part(place, each, f"there{self.mask_tag(self.group(each))}")
                    parts.append(self.over_columns(place, part))
                lines += self.reduced(place, parts)
            if not self.is_reduced(place):
                lines += self.compute(tile)
            if tile in outputs:
                store = self.store(tile, at[tile])
                if at[tile]:
                    store = store.replace("mask=inside", f"mask={self.mask(tile)}")
                lines.append(store)
        return lines

    def is_reduced(self, place: int) -> bool:
        """Whether a value is a number of each row that a reduction makes."""
        value = self.values[place]
        return isinstance(value, Step) and value.op in REDUCED

    def over_columns(self, place: int, text: str) -> str:
        """A tile reduced to [ROWS]."""
        step = self.step(place)
        return f"tl.{'max' if step.op == 'max' else 'sum'}({text}, 1)"

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
        ready: set[int] = set()
        lines += self.numbers_at(depth, 0, ready)
        for level in sorted(set(depth.values())):
            places = [place for place, own in depth.items() if own == level]
            wanted = {place: self.operand(place) for place in places}
            sums: dict[int, list[str]] = {place: [] for place in places}
            for group in sorted({self.group(tile) for each in wanted.values() for tile in each}):
                lines += self.sums_loop(group, wanted, sums)
            for place in places:
                lines += self.reduced(place, sums[place])
            lines += self.numbers_at(depth, level, ready)
        outputs = [tile for tile in self.outputs() if self.values[tile[0]].classes]
        lines += [self.store(tile, "") for tile in self.outputs() if tile not in outputs]
        for group in sorted({self.group(tile) for tile in outputs}):
            own = [tile for tile in outputs if self.group(tile) == group]
            body = self.loop_tiles(group, own)
            body += [self.store(tile, "at") for tile in sorted(own)]
            lines += self.loop(group, body)
        return lines

    def numbers_at(self, depth: Mapping[int, int], level: int, ready: set[int]) -> list[str]:
        """Loads and steps of numbers of rows that need no reduction deeper than `level`."""
        lines = []
        for place, value in enumerate(self.values):
            scalar = self.region.is_scalar(place)
            if value.classes or scalar or place in ready or self.is_reduced(place):
                continue
            if any(own > level and self.reads(place, other) for other, own in depth.items()):
                continue
            ready.add(place)
            tile = (place, 0)
            lines += [self.load(tile, "", {})] if isinstance(value, Input) else self.compute(tile)
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
            mine = [tile for tile in tiles if self.group(tile) == group]
            if mine:
                step = self.step(place)
                kind = "squares" if step.op == "rms_norm" else "parts"
                squares = f"{stem_of(step)}_{kind}{tag}"
                shape = f"[ROWS, BLOCK{tag}]"
                if step.op == "max":
                    lines.append(f"{squares} = tl.full({shape}, {TABLE['max'].start}, tl.float32)")
                else:
                    lines.append(f"{squares} = tl.zeros({shape}, tl.float32)")
                for tile in mine:
                    part = self.part(place, tile, "there")
                    if step.op == "max":
                        adding.append(f"{squares} = tl.maximum({squares}, {part})")
                    else:
                        adding.append(f"{squares} += {part}")
                sums[place].append(self.over_columns(place, squares))
        return lines + self.loop(group, self.loop_tiles(group, own) + adding)

    def loop_tiles(self, group: int, wanted: Sequence[Tile]) -> list[str]:
        """Loads and steps of a class's tiles inside a loop."""
        tiles = self.needed(wanted)
        mask = {"row": "inside", "vector": "there"}
        lines = []
        for tile in tiles:
            if not self.values[tile[0]].classes or self.group(tile) != group:
                continue  # numbers of rows are known
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
    dtypes = {kernel.dtype(p) for p in range(len(values)) if not region.is_scalar(p)}
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
        if not values[place].classes:
            continue
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
    body = "\n".join(folded(f"{INDENT}{line}") for line in lines)
    return "@triton.jit\n" + call_text(f"def {op}_kernel(", arguments, "):", 0) + f"\n{body}"


def _dtype_is_read(kernel: _Kernel, name: str) -> bool:
    """Whether a step or a store rounds to it."""
    steps = [
        place
        for place, value in enumerate(kernel.values)
        if isinstance(value, Step) and value.op not in ("cut", "to_fp32")
    ]
    return any(kernel.dtype(place) == name for place in (*steps, *kernel.region.outputs))
