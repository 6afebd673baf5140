"""Sweeps: one run for each combination of values, ranked and drawn together."""
