"""The op `paged_attention` of plans/ops.py: its rules, its reference and its kernels."""
