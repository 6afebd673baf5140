"""megalm: large-model pretraining with DeepSpeed, proven on a CPU before it is sent to a cluster."""

__version__ = "0.1.0"
