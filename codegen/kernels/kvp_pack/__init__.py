"""The op `kvp_pack` of plans/ops.py: its rules, its reference and its kernel."""
