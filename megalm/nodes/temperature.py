"""The temperature of a rank's device, where the machine tells it."""

from __future__ import annotations

import psutil
import torch


def device_temperature(device: torch.device) -> float | None:
    """Return degrees Celsius; None where they are not known (a GPU's take the extra gpu-metrics)."""
    if device.type == "cuda":
        try:
            return float(torch.cuda.temperature(device))
        except (ImportError, RuntimeError):
            return None
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    known = [each.current for name in ("coretemp", "k10temp", "cpu_thermal") for each in sensors.get(name, ())]
    return max(known, default=None)
