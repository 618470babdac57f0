"""Keeps text, labels and its layers; runs the model's own forward and records what it does not hold. Read `round.py` first."""
