"""The op `gate_up_silu` of plans/ops.py: its rules, its reference and its kernels."""
