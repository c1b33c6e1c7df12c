"""The op `rope` of plans/ops.py: its rules, its reference and its kernels."""
