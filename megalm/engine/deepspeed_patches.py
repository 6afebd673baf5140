"""Settings and workarounds at startup: OpenMP, tanh, CUDA's allocator, log noise, less compilation, fp16 on CPUs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.planning.engine_checks import ALLOW_CPU_FP16

if TYPE_CHECKING:  # it imports torch
    from megalm.parallel.process_groups import AxisGroup

# Environment variables by which a user configures OpenMP's spinning.
_OPENMP_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# And torch's CUDA allocator; the second is the older name.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def limit_openmp_spin() -> None:
    """Let OpenMP threads spin for tens of microseconds, not milliseconds, unless the environment configures it.

    Call before importing torch; GNU OpenMP only. Within a step, threads finish within microseconds of each other. If
    one has lost its core to another program, spinning threads occupy the cores it needs; sleeping threads free them.
    """
    if not any(name in os.environ for name in _OPENMP_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def decompose_tanh() -> None:
    """Let compiled CPU code take tanh from an exponential, as GELU needs it, unless the environment configures it.

    Call before importing torch. The vector library's tanh makes a GELU twice as slow; both are within 2e-7 of the
    exact one.
    """
    os.environ.setdefault("TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH", "1")


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, which fragments less, unless the environment configures it.

    Call before importing torch.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


log = logging.getLogger(__name__)

_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # read where a function is decorated


def silence() -> None:
    """Keep libraries from writing between the run's progress lines. Call before importing torch."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes when it starts and stops
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)(\.|$)")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def silence_deepspeed() -> None:
    """Raise the level of DeepSpeed's logger. Call after importing deepspeed, which sets the level itself."""
    from deepspeed.utils import logger

    logger.setLevel(logging.INFO if _is_verbose() else logging.ERROR)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Redirect DeepSpeed's prints while it builds an engine to the log; with `--verbose`, leave it on stdout."""
    if _is_verbose():
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if text := printed.getvalue().strip():
            log.info("%s", text)


def avoid_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling `shm_comm` at the first process group on a CPU.

    The extension serves inference all-reduces only, and must be compiled on a fresh machine. DeepSpeed fills its table
    of compatible ops on first access by probing the compiler for every op; setting the table here saves that too.
    """
    import deepspeed.ops

    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}


def import_muon_uncompiled() -> None:
    """Keep `deepspeed.initialize` from loading torch's compiler, which takes a second on every rank.

    It imports its optimizer Muon just to check the type of ours, and Muon is decorated with `torch.compile`.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with contextlib.suppress(ImportError):  # not in every version
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before


def use_secondary_group(node: AxisGroup | None) -> None:
    """Set the ranks that share a second copy of the weights, before the engine is built.

    DeepSpeed makes groups of its own at the first block, refuses the second one for it, and never forgets them.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None if node is None else node.process_group


def allow_cpu_fp16_for_tests() -> None:
    """For tests: make the CPU accelerator report fp16 support. It works, a thousand times slower."""
    if os.environ.get(ALLOW_CPU_FP16) == "1":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True


def _is_verbose() -> bool:
    """Return whether `--verbose` was given: only that lowers the root logger's level."""
    return logging.getLogger().isEnabledFor(logging.INFO)
