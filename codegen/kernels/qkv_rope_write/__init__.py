"""The op `qkv_rope_write` of plans/ops.py: its rules, its reference and its kernels."""
