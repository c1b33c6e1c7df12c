"""Compiles Triton kernels for sm_90 without a GPU; the child process of codegen/gate.py.

Started as a module of its own, since a failed compilation may end the process, and since an
interpreter asked for by the environment would replace the compiler.

stdin   JSON list of {op, module, kernel, types, constants, multiples_of_16, num_warps, num_stages,
        source}
stdout  one JSON object a line, in order: what gate.Report holds, or {"error": text}
"""

import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from codegen.rowwise_op import load_source

TMA_BOX = re.compile(
    r"async_tma_copy_global_to_local.*?tensordesc<tensor<([\dx]+)x\w+"
    r".*?-> !ttg\.memdesc<([\dx]+)x\w+"
)
BUFFERS = re.compile(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf|f)")
WAITS = re.compile(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", re.DOTALL)
"""What runs between the wait for all products but one and the wait for all."""


def main() -> None:
    """Answers each row of stdin with a line on stdout."""
    for row in json.load(sys.stdin):
        try:
            answer = compile_sm90(**row)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises rejects the kernel
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer goes to the parent


def compile_sm90(
    *,
    op: str,
    module: str,
    kernel: str,
    types: dict[str, str],
    constants: dict[str, Any],
    multiples_of_16: list[str],
    num_warps: int,
    num_stages: int,
    source: str = "",
) -> dict[str, Any]:
    """Resources of one kernel, as ptxas and the disassembler tell them."""
    if source:
        function = getattr(load_source(op, source), kernel)
    else:
        function = pkgutil.resolve_name(f"codegen.kernels.{op}.{module}:{kernel}")
    names = function.arg_names
    gluon = function.is_gluon()
    if gluon:  # whose descriptors know how their boxes lie in shared memory
        layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        types = {
            name: re.sub(r"^(tensordesc<.*)>$", rf"\1,{layout!r}>", each)
            for name, each in types.items()
        }
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*") or name in multiples_of_16
    }
    compiled = triton.compile(
        (GluonASTSource if gluon else ASTSource)(function, signature, fixed, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    ptx, sass, ir = compiled.asm["ptx"], compiled.asm["sass"], compiled.asm["ttgir"]
    log = _ptxas_log(ptx)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log),
        "shared_bytes": compiled.metadata.shared,
        "warps": _number(r"\.reqntid (\d+)", ptx) // 32,
        "wgmma": sass.count("HGMMA"),
        "serialised": "Potential Performance Loss" in log,
        "wide_loads": len(re.findall(r"LDG\.E\.128|LDG\.E\.\w+\.128", sass)),
        "wrong_boxes": [box for box in TMA_BOX.findall(ir) if box[0] != box[1]],
        "buffers": max((int(count) for count in BUFFERS.findall(ir)), default=0),
        "overlapped": min((part.count("MUFU.EX2") for part in WAITS.findall(sass)), default=0),
    }


def _ptxas_log(ptx: str) -> str:
    """What ptxas says of registers and spills; Triton itself does not keep it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            "-arch=sm_90a",
            "kernel.ptx",
            "-o",
            "kernel.cubin",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603 - Triton's own ptxas
    return done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main()
