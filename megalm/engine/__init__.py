"""The DeepSpeed engines and their foundations: ranks and devices, the process group, optimizer state, NVMe offload."""

import sys
from types import SimpleNamespace

# DeepSpeed imports its autotuner, which imports MLflow: half the time of `import deepspeed`, on every rank.
sys.modules.setdefault("deepspeed.autotuning.autotuner", SimpleNamespace(Autotuner=None))  # type: ignore[arg-type]
