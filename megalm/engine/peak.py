"""The peak that model FLOPs utilisation is measured against: dense matrix products, no sparsity."""

from __future__ import annotations

import time

import torch

from megalm.estimate.data_sheet import data_sheet_peak

# A machine that others use as well has slow moments of many milliseconds.
_REPEATS, _SECONDS = 12, 0.3


def peak_flops(device: torch.device, low_precision: bool) -> tuple[float, str]:
    """FLOP/s of one rank's device at its best, and where the number is from.

    A GPU of the table has its data sheet's; any other device, a CPU too, is measured.
    """
    if device.type == "cuda":
        known = data_sheet_peak(torch.cuda.get_device_name(device), low_precision)
        if known is not None:
            return known
    return measured_peak(device, low_precision), "measured matrix product"


def measured_peak(device: torch.device, low_precision: bool) -> float:
    """FLOP/s of the fastest of at least a dozen matrix products, with this rank's threads.

    1024 x 1024 on a CPU, some milliseconds each; 8192 x 8192 on a GPU, where a smaller one would time its launch.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    low = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    left, right = (torch.rand(size, size, device=device).to(low if low_precision else torch.float32) for _ in range(2))
    fastest, repeats, began = float("inf"), 0, time.perf_counter()
    while repeats < _REPEATS or time.perf_counter() - began < _SECONDS:
        repeats += 1
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
