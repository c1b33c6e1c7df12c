"""The op `embedding` of plans/ops.py: its rules, its reference and its kernels."""
