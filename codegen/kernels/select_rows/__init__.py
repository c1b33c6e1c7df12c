"""The op `select_rows` of plans/ops.py: its rules, its reference and its kernels."""
