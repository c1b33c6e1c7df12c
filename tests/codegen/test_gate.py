"""The gate compiles every Triton kernel for sm_90 and rejects what would not run well."""

from dataclasses import replace

import pytest

from codegen import gate
from codegen.gate import Report, reasons_to_reject
from codegen.kernels import KERNELS, load_spec
from codegen.kernels.base import Compilation

GOOD = Report(
    registers=64,
    spill_bytes=0,
    shared_bytes=1024,
    warps=4,
    wgmma=0,
    serialised=False,
    wide_loads=8,
    wrong_boxes=[],
)
STREAM = Compilation(kernel="k", types={"x": "*bf16"}, constants={}, streams=True)
MATRIX = Compilation(kernel="k", types={"x": "*bf16"}, constants={}, tile_rows=128)


@pytest.fixture(scope="module")
def verdicts() -> tuple[gate.Verdict, ...]:
    return gate.check_kernels()


def test_every_kernel_with_a_triton_form_is_compiled(verdicts):
    ops = {op for op in KERNELS if "triton" in load_spec(op).targets}
    assert {verdict.op for verdict in verdicts if not verdict.compilation.source} == ops
    assert {verdict.op for verdict in verdicts if verdict.compilation.source} >= {"silu_mul_add"}
    assert all(load_spec(op).compilations for op in ops)


def test_no_kernel_is_rejected(verdicts):
    assert [f"{each.title}: {each.reasons}" for each in verdicts if each.reasons] == []


def test_the_table_has_a_row_for_each(verdicts):
    assert len(gate.table(verdicts).splitlines()) == len(verdicts) + 1


@pytest.mark.parametrize(
    ("changes", "compilation", "reason"),
    [
        ({"spill_bytes": 8}, STREAM, "spills 8 bytes"),
        ({"shared_bytes": 300_000}, STREAM, "shared memory 300000 > 232448"),
        ({"registers": 255, "warps": 16}, replace(STREAM, num_warps=16), "registers"),
        ({"serialised": True, "wgmma": 16}, MATRIX, "serialised"),
        ({}, MATRIX, "no wgmma at 128 rows"),
        ({"wide_loads": 0}, STREAM, "no 16-byte loads"),
        ({"warps": 8}, STREAM, "8 warps instead of 4"),
        ({"wrong_boxes": [["128x64", "64x64"]]}, STREAM, "TMA boxes"),
    ],
)
def test_each_fault_is_a_reason(changes, compilation, reason):
    (found,) = reasons_to_reject(replace(GOOD, **changes), compilation)
    assert reason in found


def test_a_good_kernel_has_no_reason():
    assert reasons_to_reject(GOOD, STREAM) == ()
    assert reasons_to_reject(replace(GOOD, wgmma=16), MATRIX) == ()


def test_a_kernel_that_does_not_compile_is_rejected_and_the_others_are_judged(monkeypatch):
    """The broken one lacks a constant, so that the child cannot even name its arguments."""
    spec = load_spec("rms_norm")
    broken = replace(spec.compilations[0], constants={"BLOCK": 128})
    both = replace(spec, compilations=(broken, spec.compilations[0]))
    monkeypatch.setattr(gate, "KERNELS", {"rms_norm": ""})
    monkeypatch.setattr(gate, "load_spec", lambda op: both)
    monkeypatch.setattr(gate, "sampled", list)
    first, second = gate.check_kernels()
    assert "does not compile" in first.reasons[0]
    assert second.reasons == ()
