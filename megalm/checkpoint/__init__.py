"""Layout-free checkpoints in safetensors and JSON, complete or absent. Independent of DeepSpeed."""
