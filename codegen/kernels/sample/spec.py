"""Rules of `sample`: a token a row, and whether the row's best logit is finite.

No graph calls it: it stands behind the program, where the runtime draws. The last stage of a
program with kernels of ours names it as SAMPLE, which the runtime finds there; its result is that
of draw() in runtime/sampling.py, and its controls are the table of that file's controls().
"""

from codegen.kernels.base import Compilation, Spec, Value


def infer(logits: Value, controls: Value) -> Value:
    """Two numbers a row."""
    assert len(logits.shape) == 2, f"logits {logits}"
    assert controls.shape == (logits.shape[0], 5), f"controls {controls} for {logits}"
    return Value(shape=(2, logits.shape[0]), dtype="int64")


def _best(groups: int) -> Compilation:
    return Compilation(
        kernel="group_best_kernel",
        module="tiles",
        types={
            "logits_ptr": "*fp32",
            "controls_ptr": "*fp64",
            "keys_ptr": "*i64",
            "sums_ptr": "*fp64",
            **dict.fromkeys(("stride", "vocab", "groups"), "i32"),
        },
        constants={"GROUPS": groups},
        multiples_of_16=("stride", "vocab"),
        streams=True,
    )


def _pick(groups: int) -> Compilation:
    return Compilation(
        kernel="pick_kernel",
        module="tiles",
        types={
            "logits_ptr": "*fp32",
            "controls_ptr": "*fp64",
            "keys_ptr": "*i64",
            "sums_ptr": "*fp64",
            "chosen_ptr": "*i32",
            "list_ptr": "*i32",
            "out_ptr": "*i64",
            **dict.fromkeys(("stride", "rows", "vocab", "groups"), "i32"),
        },
        constants={"CANDIDATES": 64, "ALL": groups},
        multiples_of_16=("stride", "vocab"),
        num_warps=8 if groups <= 2048 else 16,
    )


SPEC = Spec(
    op="sample",
    infer=infer,
    params={"GROUPS": 32, "CANDIDATES": 64},
    # Checked by tests/codegen/test_sample.py, token for token.
    compilations=(_best(32), _pick(2048), _pick(4096)),  # vocabularies of 128K and 152K tokens
    parts=("tiles",),
)
