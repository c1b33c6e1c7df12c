"""Executes a plan: one engine loop, a simulated and a live executor, and their commands."""
