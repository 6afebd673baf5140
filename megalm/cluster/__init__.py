"""Batch systems: what a job asks for, its script, and its place in the queue."""
