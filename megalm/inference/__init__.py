"""Evaluates checkpoints and generates text with them, in one process without an engine."""
