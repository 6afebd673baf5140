"""Which rank this process is, on what device, with how many threads: read from any launcher's environment."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.errors import ConfigError
from megalm.planning.resolve import DeviceFacts

# The C library's memory allocator, told what training is like: the same large tensors again in every step.

log = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def tune_malloc() -> None:
    """Keep what tensors on a CPU give back, for the next ones, instead of returning it to the system.

    By default each tensor of more than some megabytes is mapped anew and its pages are zeroed by the kernel, in every
    step again; that was a fifth of the time of a step. What the process holds at most does not change, only that it
    keeps holding it. Nothing happens where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("no mallopt here: freed memory goes back to the system")
        return
    mallopt(ctypes.c_int(_M_MMAP_MAX), ctypes.c_int(0))  # nothing is mapped by itself
    mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(-1))  # and the heap is never cut


# The peak that model FLOPs utilisation is measured against: dense matrix products, no sparsity.

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


_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankFacts:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    threads: int


def rank_facts() -> RankFacts:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without any of them: one rank.

    A bare `python launch/pretrain.py` gets an address of its own, so two such runs never meet.

    Raises:
        ConfigError: where a launcher set only some of them.
    """
    present = [name for name in _NAMES if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    elif len(present) < len(_NAMES):
        missing = ", ".join(name for name in _NAMES if name not in present)
        raise ConfigError(f"the launcher set {', '.join(present)} but not {missing}; start with deepspeed or torchrun")
    world_size = int(os.environ["WORLD_SIZE"])
    # torchrun and Slurm scripts say LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return RankFacts(
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=local_size,
        threads=max(1, len(os.sched_getaffinity(0)) // local_size),
    )


def device_facts(local_world_size: int) -> DeviceFacts:
    """What this rank computes on; memory is the share of one rank, in bytes."""
    if _computes_on_cuda():
        properties = torch.cuda.get_device_properties(0)
        return DeviceFacts(kind="cuda", bf16=torch.cuda.is_bf16_supported(), memory_bytes=properties.total_memory)
    # Of the whole memory, not of what is free now: every rank and every resume must come to the same batch.
    return DeviceFacts(kind="cpu", bf16=_cpu_has_bf16(), memory_bytes=psutil.virtual_memory().total // local_world_size)


def device_name() -> str:
    """The device in a person's words."""
    if _computes_on_cuda():
        return torch.cuda.get_device_name(0)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def claim_device(ranks: RankFacts) -> torch.device:
    """Bind this process to its device and its share of the cores.

    Raises:
        ConfigError: with more ranks on this node than CUDA devices.
    """
    torch.set_num_threads(ranks.threads)  # torchrun says 1 thread, others say all: equal under every launcher
    if not _computes_on_cuda():
        tune_malloc()
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {ranks.rank} wants GPU {ranks.local_rank} but this node has {torch.cuda.device_count()}; "
            "start one rank a GPU (--num_gpus)"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def _computes_on_cuda() -> bool:
    """DeepSpeed's own variable decides where there is a choice: the two must not disagree about the device."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def _cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 are done by the CPU's own instructions, not emulated."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
