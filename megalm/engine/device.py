"""This process's device, threads and peak FLOP/s, and the memory allocator's settings for CPU training."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.errors import ConfigError
from megalm.planning.resolve import DeviceFacts
from megalm.rank_environment import RankFacts

log = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def tune_malloc() -> None:
    """Let malloc keep freed CPU memory for later tensors instead of returning it to the system.

    Training allocates the same large tensors in every step. By default the C library maps each tensor of more than a
    few megabytes again and the kernel zeroes its pages, which took a fifth of a step's time. Peak memory does not
    change, but the process keeps it. Does nothing with a C library without `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("no mallopt: freed memory returns to the system")
        return
    mallopt(ctypes.c_int(_M_MMAP_MAX), ctypes.c_int(0))  # allocate everything from the heap
    mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(-1))  # and never shrink it


# Enough repeats to get past slowdowns of many milliseconds on a shared machine.
_REPEATS, _SECONDS = 12, 0.3


def peak_flops(device: torch.device, low_precision: bool) -> tuple[float, str]:
    """Return the peak FLOP/s of one rank's device, the base of model FLOPs utilization (MFU), and its source.

    It is of dense matrix products, without sparsity: a known GPU's from its data sheet, any other device's measured.
    """
    if device.type == "cuda":
        known = data_sheet_peak(torch.cuda.get_device_name(device), low_precision)
        if known is not None:
            return known
    return measured_peak(device, low_precision), "measured matrix product"


def measured_peak(device: torch.device, low_precision: bool) -> float:
    """Return the FLOP/s of the fastest of at least a dozen matrix products, with this rank's threads.

    1024 x 1024 on a CPU, a few milliseconds each; 8192 x 8192 on a GPU, where a smaller one would time the launch.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    low = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    left, right = (torch.rand(size, size, device=device).to(low if low_precision else torch.float32) for _ in range(2))
    return 2 * size**3 / fastest_seconds(lambda: left @ right, device, _REPEATS, _SECONDS)


def fastest_seconds(
    work: Callable[[], object], device: torch.device, repeats: int, total_seconds: float = 0.0
) -> float:
    """Return the seconds of the fastest run of `work`: of at least `repeats`, within at least `total_seconds`."""
    fastest, done, began = float("inf"), 0, time.perf_counter()
    while done < repeats or time.perf_counter() - began < total_seconds:
        done += 1
        _wait_for(device)
        start = time.perf_counter()
        work()
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_facts(local_world_size: int) -> DeviceFacts:
    """Return this rank's device facts; memory is one rank's share, in bytes."""
    # Total memory, not free memory: every rank and every resume must derive the same batch size.
    share = psutil.virtual_memory().total // local_world_size
    if _computes_on_cuda():
        properties = torch.cuda.get_device_properties(0)
        bf16 = torch.cuda.is_bf16_supported()
        float8 = torch.cuda.get_device_capability(0) >= (8, 9)
        return DeviceFacts("cuda", bf16, properties.total_memory, share, torch.cuda.get_device_name(0), float8)
    return DeviceFacts("cpu", _cpu_has_bf16(), share)


def device_name() -> str:
    """Return the device's display name."""
    if _computes_on_cuda():
        return torch.cuda.get_device_name(0)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def claim_device(ranks: RankFacts) -> torch.device:
    """Bind this process to its device and its share of the cores.

    Raises:
        ConfigError: this node has more ranks than CUDA devices.
    """
    torch.set_num_threads(ranks.threads)  # torchrun sets 1 thread, other launchers all: make them equal
    if not _computes_on_cuda():
        tune_malloc()
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {ranks.rank} needs GPU {ranks.local_rank}, but this node has {torch.cuda.device_count()}; "
            "start one rank per GPU (--num_gpus)"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def _computes_on_cuda() -> bool:
    """Return whether to compute on CUDA; DeepSpeed's own variable is honored, so that both choose the same device."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def _cpu_has_bf16() -> bool:
    """Return whether the CPU has native instructions for bf16 matrix products."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
