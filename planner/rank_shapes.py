"""Shapes of the ops of one layer on one rank, as codegen lowers it for a degree of tp and spp."""

from collections.abc import Container

from planner.memory import local_kv_heads
from planner.world import World
from plans.mesh import Parallelism


class Shapes:
    """What one rank computes and sends."""

    def __init__(self, world: World, parallelism: Parallelism) -> None:
        model, tp = world.model, parallelism.tp
        self.tp = tp
        self.stage_layers = model.layers / parallelism.spp
        self.model = model
        self.hidden = model.hidden
        self.head_dim = model.head_dim
        self.heads = model.heads // tp
        self.kv_heads = local_kv_heads(model, tp)
        self.ffn = model.ffn // tp
        self.size = 2  # bytes of a bf16 or fp16 number
        self.sizes = (
            *(tp, self.stage_layers, self.hidden, self.ffn),
            *(self.head_dim, self.heads, self.kv_heads, model.qk_norm),
        )

    def products(self, ops: Container[str]) -> list[tuple[str, int, int]]:
        """(op, n, k) of a layer; with its epilogue where `ops` has it."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        wide = self.heads * self.head_dim
        return [
            ("qkv_rope_write" if "qkv_rope_write" in ops else "linear", qkv, self.hidden),
            ("linear", self.hidden, wide),
            ("gate_up_silu" if "gate_up_silu" in ops else "linear", 2 * self.ffn, self.hidden),
            ("linear", self.hidden, self.ffn),
        ]

    def rows(self, ops: Container[str]) -> list[tuple[str, int, int]]:
        """(op, width, rows of a token) of a layer, without what `ops` does in a product."""
        found = [("add_rms_norm", self.hidden, 2)]
        if "qkv_rope_write" not in ops:
            found += [("rope", self.heads * self.head_dim, 1), ("rope", self.key_width, 1)]
            found.append(("kv_write", self.key_width, 1))
            if self.model.qk_norm:
                found += [("rms_norm", self.head_dim, n) for n in (self.heads, self.kv_heads)]
        if "gate_up_silu" not in ops:
            found.append(("silu_mul", self.ffn, 1))
        return found

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys."""
        return self.kv_heads * self.head_dim
