"""The op `split_heads` of plans/ops.py: its rules, its reference and its kernels."""
