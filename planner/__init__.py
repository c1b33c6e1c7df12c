"""The planner: from a model, a machine and a workload to the best feasible plan, with reasons."""
