"""Row-wise regions that have a name: the ops that most models' graphs turn into.

No kernel here is written by hand: a region that the pass finds and that equals one of these gets
its name, and with it the tuner's records and the rows of a device's profile. Their sources stand in
folders of codegen/kernels, where other kernels import them, as the generator prints them.

    python -m codegen.rowwise_library      writes them again after a change of the generator
"""

from collections.abc import Mapping, Sequence
from typing import Any

from codegen.kernels import FOLDER
from codegen.kernels.base import Compilation, Spec
from codegen.rowwise import Builder, Region
from codegen.rowwise_op import compilation, searches
from codegen.rowwise_source import reference_source, triton_source, tunables

WIDTH = 64
"""Any even one: all their widths follow from their arguments."""


def _add_rms_norm() -> Region:
    """The residual stream and the norm that the next block reads."""
    rows = Builder()
    x, residual = rows.row(WIDTH, "x_TD"), rows.row(WIDTH, "residual_TD")
    weight, eps = rows.vector(WIDTH, "weight_D"), rows.scalar("eps")
    total = rows.step("add", x, residual)
    return rows.region(rows.step("rms_norm", total, weight, eps), total)


def _rms_norm() -> Region:
    """A norm alone: of the first layer, of a stage's input, of heads."""
    rows = Builder()
    x, weight, eps = rows.row(WIDTH, "x_TD"), rows.vector(WIDTH, "weight_D"), rows.scalar("eps")
    return rows.region(rows.step("rms_norm", x, weight, eps))


def _silu_mul() -> Region:
    """A gated activation."""
    rows = Builder()
    return rows.region(rows.step("silu_mul", rows.row(2 * WIDTH, "gate_up_TF2")))


LIBRARY: Mapping[str, Region] = {
    "add_rms_norm": _add_rms_norm(),
    "rms_norm": _rms_norm(),
    "silu_mul": _silu_mul(),
}


def _samples() -> dict[str, Region]:
    """Regions of no name, of the kinds that the generator treats differently."""
    last = Builder()  # the last norm, whose sum nothing reads
    total = last.step("add", last.row(8192), last.row(8192))
    normed = last.step("rms_norm", total, last.vector(8192), last.scalar())
    twice = Builder()  # one norm behind another, and a third type
    total = twice.step("add", twice.row(4096), twice.row(4096))
    inner = twice.step("rms_norm", total, twice.vector(4096), eps := twice.scalar())
    outer = twice.step("rms_norm", inner, twice.vector(4096), eps)
    heads = Builder()  # short rows, columns of a wider one, and a cut of what was computed
    wide = heads.row(384)
    normed_heads = heads.step(
        "rms_norm", heads.cut(wide, 128, 128), heads.vector(128), heads.scalar()
    )
    halves = [heads.cut(normed_heads, first, 64) for first in (0, 64)]
    gated = Builder()  # no reduction, several results
    gate_up, residual = gated.row(2 * 14336), gated.row(14336)
    product = gated.step("silu_mul", gate_up)
    softmax = Builder()  # two reductions, of which one is no sum
    wide = softmax.step("to_fp32", logits := softmax.row(4096))
    power = softmax.step("exp", softmax.step("sub", wide, softmax.step("max", wide)))
    share = softmax.step("div", power, softmax.step("sum", power))
    bent = Builder()  # erf, tanh and a number of each row from outside
    both = bent.step("plus", bent.step("gelu", row := bent.row(4096)), bent.step("tanh", row))
    larger = bent.step("maximum", bent.step("times", both, bent.number()), bent.scalar())
    return {
        "softmax": softmax.region(softmax.step("cast", share, logits)),
        "gelu_and_more": bent.region(larger),
        "add_rms_norm_2": last.region(normed),
        "add_rms_norm_rms_norm": twice.region(total, twice.step("to_fp32", outer)),
        "rms_norm_mul": heads.region(heads.step("mul", *halves), normed_heads),
        "silu_mul_add": gated.region(product, gated.step("add", product, residual)),
    }


def sampled() -> list[tuple[str, Compilation]]:
    """What the gate compiles of _samples, at the widths they were made with, and longer rows."""
    found = []
    for op, region in _samples().items():
        text = triton_source(op, region)
        sizes = {
            "add_rms_norm_2": ((8192,), (20480,)),
            "add_rms_norm_rms_norm": ((4096,), (20480,)),
            "rms_norm_mul": (tuple(width or 128 for width in region.widths),),
            "silu_mul_add": ((14336,),),
            "softmax": ((4096,), (20480,)),
            "gelu_and_more": ((4096,),),
        }[op]
        found += [(op, compilation(op, region, widths, source=text)) for widths in sizes]
    return found


def named(
    op: str,
    *,
    cases: Sequence[Mapping[str, Any]],
    tolerance: Mapping[str, float],
    compiled: Sequence[tuple[str, int]],
) -> Spec:
    """The Spec of a region of LIBRARY; `compiled` are dtypes and widths for the gate."""
    region = LIBRARY[op]
    return Spec(
        op=op,
        infer=region.infer if len(region.ops) > 1 else _alike,
        params=tunables(region),
        searches=searches(op, region),
        cases=tuple(cases),
        tolerance=tolerance,
        compilations=tuple(
            compilation(
                op,
                region,
                (width,),
                dtypes=dict.fromkeys(range(len(region.inputs)), dtype),
            )
            for dtype, width in compiled
        ),
        fused=region.ops if len(region.ops) > 1 else (),
    )


def _alike(x: Any, weight: Any, eps: float) -> Any:
    """Of rms_norm, which is an op of its own: as x."""
    assert weight.shape == x.shape[-1:], f"weight {weight} for {x}"
    return x


def texts() -> dict[str, str]:
    """Content of each generated file by its path below codegen/kernels."""
    found = {f"{op}/triton.py": triton_source(op, region) for op, region in LIBRARY.items()}
    for op, region in LIBRARY.items():
        if len(region.ops) > 1:  # one op alone is the reference of others
            found[f"{op}/reference.py"] = reference_source(op, region)
    return found


def main() -> None:
    """Writes the files."""
    for name, text in texts().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
