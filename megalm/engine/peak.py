"""The peak that model FLOPs utilisation is measured against: dense matrix products, no sparsity."""

from __future__ import annotations

import re
import time

import torch

# FLOP/s by NVIDIA's data sheets, without sparsity: bf16 and fp16 summed in fp32; then fp32, for which TF32 is off.
# A whole model name each: a laptop's, a PCIe or an NVL card of the same name is another device.
_DATA_SHEETS: tuple[tuple[str, float, float], ...] = (
    ("H200 NVL", 835.5e12, 60e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835.5e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 4090", 165.2e12, 82.6e12),
)
# What may follow the name: form factor and memory of the same chip at the same speed.
_SAME_CHIP = r"(-?(SXM\d?|PCIE|\d+GB|HBM\w*)| )*$"
_REPEATS = 12


def peak_flops(device: torch.device, low_precision: bool) -> tuple[float, str]:
    """FLOP/s of one rank's device at its best, and where the number is from.

    A GPU of the table has its data sheet's; any other device, a CPU too, is measured.
    """
    if device.type == "cuda":
        known = data_sheet_peak(torch.cuda.get_device_name(device), low_precision)
        if known is not None:
            return known
    return measured_peak(device, low_precision), "measured matrix product"


def data_sheet_peak(device_name: str, low_precision: bool) -> tuple[float, str] | None:
    """FLOP/s and source for a device as CUDA names it, "NVIDIA A100-SXM4-80GB"; None where the table has none."""
    for name, low, full in _DATA_SHEETS:
        if re.search(rf"\b{name}{_SAME_CHIP}", device_name, re.IGNORECASE):
            return (low if low_precision else full), f"data sheet of {name}"
    return None


def measured_peak(device: torch.device, low_precision: bool) -> float:
    """FLOP/s of the fastest of a dozen matrix products, with this rank's threads.

    1024 x 1024 on a CPU, some milliseconds each; 8192 x 8192 on a GPU, where a smaller one would time its launch.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    low = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    left, right = (torch.rand(size, size, device=device).to(low if low_precision else torch.float32) for _ in range(2))
    fastest = float("inf")
    for _ in range(_REPEATS):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
