"""The op `to_fp32` of plans/ops.py: its rules, its reference and its kernels."""
