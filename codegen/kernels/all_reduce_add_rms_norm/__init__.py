"""The op `all_reduce_add_rms_norm` of plans/ops.py: its rules, its reference and its kernels."""
