"""What runs a step: in virtual time (simulated.py) or on a device (live.py)."""
