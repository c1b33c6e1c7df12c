"""The vocabulary of Medha: types, units, checks and YAML.

Imports nothing of ours and never torch.
"""
