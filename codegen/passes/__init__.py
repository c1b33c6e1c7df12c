"""The passes, in order. Each edits a program in place and returns how many matches it changed.

A pass runs on shapes alone, leaves the numbers as they are, and finds nothing when run again.
"""

from collections.abc import Callable

from codegen.graph import Program
from codegen.passes.buffers import plan_buffers
from codegen.passes.fuse import fuse_all_reduce, fuse_gate, fuse_gate_up, fuse_projections
from codegen.passes.kv import fuse_qkv_write, page_attention
from codegen.passes.lower import lower
from codegen.passes.rowwise import rowwise
from codegen.passes.shard import shard
from codegen.passes.stages import cut_stages
from plans.plan import Plan

PASSES: tuple[Callable[[Program, Plan], int], ...] = (
    cut_stages,
    shard,
    fuse_projections,
    fuse_gate,
    fuse_gate_up,
    page_attention,
    fuse_qkv_write,
    fuse_all_reduce,
    rowwise,
    lower,
    plan_buffers,
)
