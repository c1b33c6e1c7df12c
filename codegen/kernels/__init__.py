"""The compute ops of a program: where each one's rules, reference and kernels stand.

A folder an op: `spec.py` (rules of its shapes, cases, tolerances, tunables), `reference.py` (plain
torch, the only copy, put into bundles as it stands), `triton.py` where a kernel of ours exists.
"""

import pkgutil
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from codegen.kernels.base import Spec
from plans.errors import UnknownName

FOLDER = Path(__file__).parent
IMPORT = re.compile(r"from (?:codegen\.kernels\.(\w+))?\.(\w+) import")
"""A file of an op's folder, its own or another's: siblings in a bundle."""

KERNELS = {
    "add": "codegen.kernels.add.spec:SPEC",
    "add_rms_norm": "codegen.kernels.add_rms_norm.spec:SPEC",
    "all_reduce_add_rms_norm": "codegen.kernels.all_reduce_add_rms_norm.spec:SPEC",
    "attention": "codegen.kernels.attention.spec:SPEC",
    "embedding": "codegen.kernels.embedding.spec:SPEC",
    "embedding_share": "codegen.kernels.embedding_share.spec:SPEC",
    "gate_up_silu": "codegen.kernels.gate_up_silu.spec:SPEC",
    "join_heads": "codegen.kernels.join_heads.spec:SPEC",
    "kv_write": "codegen.kernels.kv_write.spec:SPEC",
    "kvp_merge": "codegen.kernels.kvp_merge.spec:SPEC",
    "kvp_pack": "codegen.kernels.kvp_pack.spec:SPEC",
    "linear": "codegen.kernels.linear.spec:SPEC",
    "mul": "codegen.kernels.mul.spec:SPEC",
    "paged_attention": "codegen.kernels.paged_attention.spec:SPEC",
    "qkv_rope_write": "codegen.kernels.qkv_rope_write.spec:SPEC",
    "rms_norm": "codegen.kernels.rms_norm.spec:SPEC",
    "rope": "codegen.kernels.rope.spec:SPEC",
    "rotary": "codegen.kernels.rotary.spec:SPEC",
    "sample": "codegen.kernels.sample.spec:SPEC",
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


@cache
def load_kernel(op: str) -> Callable[..., Any]:
    """What computes an op on a GPU: our kernel where it has one, else its reference."""
    if "triton" not in load_spec(op).targets:
        return load_reference(op)
    function: Callable[..., Any] = pkgutil.resolve_name(f"codegen.kernels.{op}.triton:{op}")
    return function


def source_texts(
    op: str,
    target: str,
    params: Mapping[str, int] = MappingProxyType({}),
    sources: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Sources of an op for "torch", "triton" or one of its libraries, by module name in a bundle.

    The op's own module comes first; the files that it imports follow, each `<folder>_<file>`.
    params  tunables whose constants get these values in the op's own module
    sources  of Spec, for an op without a folder
    """
    file = {"torch": "reference"}.get(target, target)
    text = sources[file] if sources else (FOLDER / op / f"{file}.py").read_text()
    texts = {op: _with_params(op, text, params) if file == "triton" else text}
    folders = {op: op}
    for name in (queue := [op]):
        own = folders[name]
        for folder, part in IMPORT.findall(texts[name]):
            other = f"{folder or own}_{part}"
            if other not in texts:
                folders[other] = folder or own
                texts[other] = (FOLDER / folders[other] / f"{part}.py").read_text()
                queue.append(other)
        texts[name] = re.sub(r"from \.(\w+) import", rf"from .{own}_\1 import", texts[name])
        texts[name] = re.sub(
            r"from codegen\.kernels\.(\w+)\.(\w+) import", r"from .\1_\2 import", texts[name]
        )
    return texts


def _with_params(op: str, text: str, params: Mapping[str, int]) -> str:
    """A kernel's source with other values of its module constants."""
    for name, value in params.items():
        text, count = re.subn(rf"(?m)^{name} = \d+$", f"{name} = {value}", text)
        assert count == 1, f"{op}: {name} is no constant of its triton.py"
    return text
