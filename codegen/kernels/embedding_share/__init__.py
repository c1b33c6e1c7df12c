"""The op `embedding_share` of plans/ops.py: its rules, its reference and its kernels."""
