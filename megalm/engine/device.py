"""This process's device: whether it works, its cores, memory and peak FLOP/s; settings of kernels and allocators."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import psutil
import torch

from megalm.cost_model.gpu_specs import FLOAT8_CAPABILITY, data_sheet_peak
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.errors import ConfigError
from megalm.planning.resolve import DeviceFacts
from megalm.rank_environment import RankFacts, node_name, sign_of_gpus

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


def speed_up_fp32_products() -> None:
    """Let oneDNN compute fp32 matrix products on AMD's CPUs with AVX-512, where it is twice as fast as MKL.

    MKL keeps to AVX2 on them. torch offers oneDNN for fp32 only where products may round to bf16 ("medium"), but oneDNN
    rounds only on CPUs with AMX, and else computes in full precision: a product that bf16 cannot hold decides. Does
    nothing on other CPUs.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _cpu_info():
        return
    torch.set_float32_matmul_precision("medium")
    if not _is_exact_in_fp32():
        torch.set_float32_matmul_precision("highest")


def _is_exact_in_fp32() -> bool:
    finer_than_bf16 = torch.full((256, 256), 1 + 2**-20)
    return torch.equal(finer_than_bf16 @ torch.eye(256), finer_than_bf16)


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


# Enough repeats to get past slowdowns of many milliseconds on a shared machine.
_REPEATS, _SECONDS = 12, 0.3


def peak_flops(device: torch.device, low_precision: bool, float8_share: float = 0.0) -> tuple[float, str]:
    """Return the peak FLOP/s of one rank's device, the base of model FLOPs utilization (MFU), and its source.

    It is of dense matrix products, without sparsity: a known GPU's from its data sheet, with `float8_share` of the
    operations in float8; any other device's measured, without float8.
    """
    if device.type == "cuda":
        known = data_sheet_peak(torch.cuda.get_device_name(device), low_precision, float8_share)
        if known is not None:
            return known
    return measured_peak(device, low_precision), "measured matrix product"


def measured_peak(
    device: torch.device, low_precision: bool, repeats: int = _REPEATS, most_seconds: float = float("inf")
) -> float:
    """Return the FLOP/s of the fastest of some matrix products (`fastest_seconds`), with this rank's threads.

    1024 x 1024 on a CPU, a few milliseconds each; 8192 x 8192 on a GPU, where a smaller one would time the launch.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    low = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    left, right = (torch.rand(size, size, device=device).to(low if low_precision else torch.float32) for _ in range(2))
    return 2 * size**3 / fastest_seconds(lambda: left @ right, device, repeats, _SECONDS, most_seconds)


def fastest_seconds(
    work: Callable[[], object],
    device: torch.device,
    repeats: int,
    total_seconds: float = 0.0,
    most_seconds: float = float("inf"),
) -> float:
    """Return the seconds of the fastest run of `work`: of at least `repeats`, within at least `total_seconds`.

    After `most_seconds` there is no other run.
    """
    fastest, done, began, passed = float("inf"), 0, time.perf_counter(), 0.0
    while (done < repeats and passed < most_seconds) or passed < total_seconds:
        done += 1
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        fastest = min(fastest, time.perf_counter() - start)
        passed = time.perf_counter() - began
    return fastest


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class DeviceReport:
    """A rank's device, which all ranks compare before they form a process group (distributed.py:agree_on_device).

    Attributes:
        node: the host's name.
        problem: why this rank cannot train there; empty: it can.
    """

    node: str
    facts: DeviceFacts
    problem: str = ""


def open_device(ranks: RankFacts) -> tuple[torch.device, DeviceReport]:
    """Claim this rank's device. A problem is reported, not raised: all ranks have to learn of it."""
    node = node_name()
    try:
        device = claim_device(ranks)
    except ConfigError as error:
        return torch.device("cpu"), DeviceReport(node, DeviceFacts("cpu", False, 0), problem=str(error))
    return device, DeviceReport(node, device_facts(ranks.local_world_size))


def device_facts(local_world_size: int) -> DeviceFacts:
    """Return this rank's device facts; memory is one rank's share, in bytes."""
    # Total memory, not free memory: every rank and every resume must derive the same batch size.
    share = psutil.virtual_memory().total // local_world_size
    if _computes_on_cuda():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return DeviceFacts(
            "cuda",
            torch.cuda.is_bf16_supported(including_emulation=False),
            properties.total_memory,
            share,
            torch.cuda.get_device_name(),
            float8=(properties.major, properties.minor) >= FLOAT8_CAPABILITY,
            compiles=properties.major >= _FIRST_TRITON_MAJOR and _has_triton_and_compiler(),
        )
    return DeviceFacts("cpu", _cpu_has_bf16(), share)


def device_name() -> str:
    """Return the device's display name."""
    if _computes_on_cuda():
        return torch.cuda.get_device_name()
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def claim_device(ranks: RankFacts) -> torch.device:
    """Bind this process to its device and its share of the cores.

    Raises:
        ConfigError: the job is for GPUs but CUDA or this rank's GPU does not work, or there are more ranks than GPUs.
    """
    torch.set_num_threads(ranks.threads)  # torchrun sets 1 thread, other launchers all: make them equal
    node = node_name()
    if (sign := sign_of_gpus()) and (problem := cuda_problem()):
        raise ConfigError(
            f"this job is for GPUs ({sign}), but CUDA does not work on node {node}: {problem}; mend that or leave the "
            "node out, or set DS_ACCELERATOR=cpu to train on the CPU"
        )
    if not _computes_on_cuda():
        tune_malloc()
        speed_up_fp32_products()
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {ranks.rank} needs GPU {ranks.local_rank}, but node {node} has {torch.cuda.device_count()}; "
            "start one rank per GPU (--num_gpus)"
        )
    device = torch.device("cuda", ranks.local_rank)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device).add_(1).item()  # fails where torch has no kernels for the GPU, or it is broken
    except (RuntimeError, AssertionError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"GPU {ranks.local_rank} of node {node} does not work with torch {torch.__version__}: {why}; leave the "
            "node out, or install a torch for this GPU"
        ) from error
    return device


def bind_to_numa_node(device: torch.device, sysfs: Path = Path("/sys")) -> None:
    """Keep this rank on the cores that are next to its GPU, and so its memory too; with one NUMA node do nothing.

    For offload: the CPU computes on what it copies from and to the GPU. Call before threads start, which inherit it.
    """
    cores = cores_next_to(torch.cuda.get_device_properties(device), sysfs) & os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(min(torch.get_num_threads(), len(cores)))


def cores_next_to(properties: Any, sysfs: Path) -> set[int]:
    """Return the cores of the NUMA node of a GPU; empty if there is one node only, or if it is not known."""
    nodes = sysfs / "devices/system/node"
    if len(list(nodes.glob("node[0-9]*"))) < 2:
        return set()
    try:
        place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        node = (sysfs / "bus/pci/devices" / place / "numa_node").read_text().strip()  # -1: not known
        ranges = (nodes / f"node{node}" / "cpulist").read_text().strip().split(",")
    except (OSError, AttributeError):  # not every torch build says where a GPU is
        return set()
    ends = [[int(end) for end in text.split("-")] for text in ranges if text]
    return {core for first, *last in ends for core in range(first, (last or [first])[0] + 1)}


def make_deterministic(compiled: bool) -> None:
    """Let the device's kernels add in the same order each time; call before the first of them runs.

    Flash attention's backward pass then adds without atomics, and cuBLAS keeps one workspace. A kernel that has no such
    form raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # For debugging: torch would write into every empty tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if compiled:
        from torch._inductor import config as inductor

        inductor.deterministic = True  # no choice of kernels by time


def pin_batch(batch: GlobalBatch) -> GlobalBatch:
    """Return the batch in page-locked memory, from which a copy to the GPU does not wait.

    torch's allocator finds each block again by its address, so it reuses none before its copy is done.
    """

    def pinned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return torch.from_numpy(array).pin_memory().numpy()

    def pinned_batch(micro: MicroBatch) -> MicroBatch:
        return replace(micro, **{name: pinned(array) for name, array in vars(micro).items() if array is not None})

    return replace(batch, micro_batches=tuple(map(pinned_batch, batch.micro_batches)))


def _computes_on_cuda() -> bool:
    """Return whether to compute on CUDA; DeepSpeed's own variable is honored, so that both choose the same device."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def cuda_problem() -> str:
    """Return why CUDA does not work here, in torch's own words where it has some; empty: it works."""
    with warnings.catch_warnings(record=True) as caught:  # otherwise they are filtered
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build"
    reasons = [str(warning.message) for warning in caught]
    if not reasons:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reasons = [str(error)]
    return " ".join((reasons or ["torch finds no device"])[-1].split())


# Triton has no kernels for earlier GPUs.
_FIRST_TRITON_MAJOR = 7


def _has_triton_and_compiler() -> bool:
    """Return whether torch.compile can build kernels for a GPU: Triton compiles its launchers with a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    has_header = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    return compiler is not None and has_header and importlib.util.find_spec("triton") is not None


def _cpu_has_bf16() -> bool:
    """Return whether the CPU has native instructions for bf16 matrix products."""
    flags = _cpu_info()
    return "avx512_bf16" in flags or "amx_bf16" in flags
