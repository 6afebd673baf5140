"""The peak that model FLOPs utilisation is measured against: dense matrix products, no sparsity."""

from __future__ import annotations

import time

import torch

# Dense bf16/fp16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets (without sparsity); fp32 as TF32 is off.
_CUDA_PEAKS: dict[str, tuple[float, float]] = {
    # name in the device's name: (bf16 and fp16, fp32)
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165.2e12, 82.6e12),
}
_SIZE = 1024
_REPEATS = 12


def peak_flops(device: torch.device, low_precision: bool) -> tuple[float, str]:
    """FLOP/s of one rank's device at its best, and where the number is from.

    A GPU of the table has its data sheet's; any other device, a CPU too, is measured: the fastest of a dozen
    products of 1024 x 1024 matrices, with this rank's threads, in a few milliseconds each.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, (low, full) in _CUDA_PEAKS.items():
            if key in name:
                return (low if low_precision else full), f"data sheet of {key}"
    return _measure(device, torch.bfloat16 if low_precision else torch.float32), "measured matrix product"


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    left = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    right = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    fastest = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * _SIZE**3 / fastest
