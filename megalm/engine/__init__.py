"""The only place that imports deepspeed: ranks and devices, the process group, the ZeRO engine and its state."""

import sys
from types import SimpleNamespace

# DeepSpeed imports its autotuner, and that MLflow: half of the time that `import deepspeed` takes, on every rank.
sys.modules.setdefault("deepspeed.autotuning.autotuner", SimpleNamespace(Autotuner=None))  # type: ignore[arg-type]
