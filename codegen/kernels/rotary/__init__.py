"""The op `rotary` of plans/ops.py: its rules, its reference and its kernels."""
