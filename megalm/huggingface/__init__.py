"""Models in Hugging Face form: written from checkpoints, and read as starting points. Needs no transformers."""
