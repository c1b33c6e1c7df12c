"""A row-wise region as an op: its rules, tunables and what the gate compiles of it.

Regions that have a name, such as add_rms_norm, keep their generated sources in a folder of
codegen/kernels, which has their cases; all others are made here, while a graph is compiled.
"""

import linecache
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from codegen.kernels.base import Compilation, Search, Spec
from codegen.rowwise import Builder, Kind, Region
from codegen.rowwise_source import reference_source, triton_source, tunables
from codegen.rowwise_text import stem_of

ALONE = 64
"""Width with which an op alone is made: it follows from the arguments."""
DTYPES: Mapping[int, str] = types.MappingProxyType({})


def searches(op: str, region: Region) -> tuple[Search, ...]:
    """What medha-tune tries for a region that has a name and one width."""
    name, values = (
        ("ELEMENTS_A_WARP", (256, 512, 1024, 2048))
        if region.reduces
        else ("BLOCK", (1024, 2048, 4096, 8192))
    )

    def compilations(
        params: Mapping[str, int], sizes: Mapping[str, int]
    ) -> tuple[Compilation, ...]:
        return (compilation(op, region, (sizes["width"],), params=params),)

    return (Search(regime="rows", values={name: values}, compilations=compilations),)


def launch(
    region: Region, widths: Sequence[int], params: Mapping[str, int], rows: int
) -> tuple[dict[str, int | bool], int]:
    """Constants and warps with which the generated wrapper starts the kernel."""
    rounded = [_power(width) for width in widths]
    tags = [f"_{at}" if len(widths) > 1 else "" for at in range(len(widths))]
    constants: dict[str, int | bool] = {
        f"WIDTH{tag}": width for tag, width in zip(tags, widths, strict=True)
    }
    whole = True
    if region.reduces:
        blocks = [min(size, params["MAX_BLOCK"] // _power(len(widths))) for size in rounded]
        whole = all(width <= block for width, block in zip(widths, blocks, strict=True))
        constants |= {f"BLOCK{tag}": block for tag, block in zip(tags, blocks, strict=True)}
        constants["WHOLE"] = whole
        size, room, a_warp = _power(sum(blocks)), params["ELEMENTS_A_WARP"], "ELEMENTS_A_WARP"
    else:
        size, room, a_warp = min(max(rounded), params["BLOCK"]), params["BLOCK"], ""
        constants |= {"BLOCK": size, "BLOCKS": -(-max(widths) // size)}
    together = max(min(room // size, _power(-(-rows // params["PROGRAMS"]))), 1) if whole else 1
    warps = min(max(size * together // params.get(a_warp, 512), 1), 32)
    return constants | {"INNER": 1, "ROWS": together, "OVERLAP": params["OVERLAP"] == 1}, warps


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def compilation(
    op: str,
    region: Region,
    widths: Sequence[int],
    *,
    dtypes: Mapping[int, str] = DTYPES,
    params: Mapping[str, int] | None = None,
    rows: int = 1 << 20,
    source: str = "",
) -> Compilation:
    """How the gate compiles a region for rows of these widths, one a class.

    dtypes  of inputs by place; bf16 where none is given
    source  text of the module where no folder has it
    """
    constants, warps = launch(region, widths, params or tunables(region), rows)
    pointers = {
        f"{stem_of(each)}_ptr": f"*{dtypes.get(place, 'bf16')}"
        for place, each in enumerate(region.inputs)
        if each.kind != "scalar"
    }
    for place in region.outputs:
        origin = region.dtype_of(place)
        dtype = "fp32" if origin is None else dtypes.get(origin, "bf16")
        pointers[f"{stem_of(region.values[place])}_ptr"] = f"*{dtype}"
    strides = [
        f"{stem_of(each)}_stride_{letter}"
        for each in region.inputs
        if each.kind == "row"
        for letter in "tn"
    ]
    return Compilation(
        kernel=f"{op}_kernel",
        types={
            **pointers,
            **{stem_of(each): "fp32" for each in region.inputs if each.kind == "scalar"},
            **dict.fromkeys(("rows", *strides), "i32"),
        },
        constants=constants,
        multiples_of_16=tuple(strides),
        num_warps=warps,
        # columns of odd offsets and rows shorter than a warp's 512 bytes have no 16-byte loads
        streams=all(width % 8 == 0 for width in widths) and max(widths) >= 512,
        source=source,
    )


def load_source(name: str, text: str) -> types.ModuleType:
    """A module made from a generated text, which Triton and tracebacks can read."""
    file = f"<generated {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    module.__file__ = file
    exec(compile(text, file, "exec", dont_inherit=True), vars(module))  # noqa: S102 - our own text
    return module


def generated(op: str, region: Region) -> Callable[..., Any]:
    """The op as a graph calls it: its torch form, with its Spec as attribute `spec`."""
    sources = {"reference": reference_source(op, region), "triton": triton_source(op, region)}
    function: Callable[..., Any] = getattr(load_source(op, sources["reference"]), op)
    function.spec = Spec(  # type: ignore[attr-defined]
        op=op,
        infer=region.infer,
        params=tunables(region),
        sources=sources,
        fused=region.ops,
    )
    return function


@cache
def primitive(op: str, kinds: tuple[Kind, ...]) -> Callable[..., Any]:
    """An op of the table alone, for arguments of these kinds; numbers of rows without a row are
    rows of one column."""
    rows = Builder()
    plain = "row" in kinds
    make: dict[Kind, Callable[[], int]] = {
        "row": lambda: rows.row(ALONE),
        "vector": lambda: rows.vector(ALONE),
        "number": rows.number if plain else lambda: rows.row(ALONE),
        "scalar": rows.scalar,
    }
    region = rows.region(rows.step(op, *(make[kind]() for kind in kinds)))
    name = op if set(kinds) == {"row"} else "_".join((op, *kinds))
    function = generated(name, region)
    function.primitive = op  # type: ignore[attr-defined]
    return function
