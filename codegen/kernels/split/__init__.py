"""The op `split` of plans/ops.py: its rules, its reference and its kernels."""
