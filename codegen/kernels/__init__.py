"""The compute ops of a program: where each one's rules, reference and kernels stand.

A folder an op: `spec.py` (rules of its shapes, cases, tolerances, tunables), `reference.py` (plain
torch, the only copy, put into bundles as it stands), `triton.py` where a kernel of ours exists.
"""

import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from codegen.kernels.base import Spec
from plans.errors import UnknownName

KERNELS = {
    "add": "codegen.kernels.add.spec:SPEC",
    "add_rms_norm": "codegen.kernels.add_rms_norm.spec:SPEC",
    "attention": "codegen.kernels.attention.spec:SPEC",
    "embedding": "codegen.kernels.embedding.spec:SPEC",
    "embedding_share": "codegen.kernels.embedding_share.spec:SPEC",
    "join_heads": "codegen.kernels.join_heads.spec:SPEC",
    "kv_write": "codegen.kernels.kv_write.spec:SPEC",
    "linear": "codegen.kernels.linear.spec:SPEC",
    "mul": "codegen.kernels.mul.spec:SPEC",
    "paged_attention": "codegen.kernels.paged_attention.spec:SPEC",
    "rms_norm": "codegen.kernels.rms_norm.spec:SPEC",
    "rope": "codegen.kernels.rope.spec:SPEC",
    "select_rows": "codegen.kernels.select_rows.spec:SPEC",
    "silu": "codegen.kernels.silu.spec:SPEC",
    "silu_mul": "codegen.kernels.silu_mul.spec:SPEC",
    "split": "codegen.kernels.split.spec:SPEC",
    "split_heads": "codegen.kernels.split_heads.spec:SPEC",
    "to_fp32": "codegen.kernels.to_fp32.spec:SPEC",
}


@cache
def load_spec(op: str) -> Spec:
    """The rules of an op."""
    if op not in KERNELS:
        raise UnknownName("op", op, KERNELS)
    spec: Spec = pkgutil.resolve_name(KERNELS[op])
    return spec


@cache
def load_reference(op: str) -> Callable[..., Any]:
    """The function that defines an op."""
    load_spec(op)
    function: Callable[..., Any] = pkgutil.resolve_name(f"codegen.kernels.{op}.reference:{op}")
    return function


def source_texts(op: str, target: str) -> dict[str, str]:
    """Sources of an op for a target, "torch" or "triton", by module name in a bundle.

    The op's own module comes first; the files that it imports follow, each `<op>_<part>`.
    """
    folder = Path(__file__).parent / op
    if target == "torch":
        return {op: (folder / "reference.py").read_text()}
    parts = load_spec(op).parts
    texts = {}
    for name, file in ((op, "triton"), *((f"{op}_{part}", part) for part in parts)):
        text = (folder / f"{file}.py").read_text()
        for part in parts:
            text = text.replace(f"from .{part} import", f"from .{op}_{part} import")
        texts[name] = text
    return texts
