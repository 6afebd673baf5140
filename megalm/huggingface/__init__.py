"""Exports checkpoints to Hugging Face format and imports models from it. Needs no transformers."""
