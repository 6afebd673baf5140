"""Layout-free checkpoints: safetensors and JSON, complete or absent. Knows nothing of DeepSpeed."""
