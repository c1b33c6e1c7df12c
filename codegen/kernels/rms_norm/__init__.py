"""The op `rms_norm` of plans/ops.py: its rules, its reference and its kernels."""
