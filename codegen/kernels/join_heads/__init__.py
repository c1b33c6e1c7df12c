"""The op `join_heads` of plans/ops.py: its rules, its reference and its kernels."""
