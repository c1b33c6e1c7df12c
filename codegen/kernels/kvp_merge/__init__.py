"""The op `kvp_merge` of plans/ops.py: its rules, its reference and its kernel."""
