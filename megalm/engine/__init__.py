"""The only place that imports deepspeed: ranks and devices, the process group, the ZeRO engine and its state."""
