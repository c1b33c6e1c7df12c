"""The op `sample` of plans/ops.py: its rules, its reference and its kernels."""
