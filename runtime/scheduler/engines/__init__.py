"""Whole steps as other engines compose them, for comparison only: budgets in tokens, not in time.

Rules as read from vLLM 0.33, SGLang 0.5.23 and LMDeploy of August 2026. Ours remain the book, the
pages, the shards (no chunk crosses the edge of one) and the bound on the tokens of a step.
"""
