"""What DeepSpeed does at its start that megalm would rather not: noise, compilations, a refusal."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

from megalm.planning.checks.deepspeed import ALLOW_CPU_FP16

# How long a thread of a matrix product waits awake for the others: set before torch, with its OpenMP, is imported.

_STATED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_openmp_spin() -> None:
    """Some ten microseconds instead of milliseconds, unless the environment states something.

    Within a step the other threads are done in microseconds. Where one of them has lost its core to another program,
    the one that waits awake holds the very core that it waits for; asleep, it gives it away. GNU's OpenMP only.
    """
    if not any(name in os.environ for name in _STATED):
        os.environ["GOMP_SPINCOUNT"] = "10000"


log = logging.getLogger(__name__)

_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # read where a function is decorated


def silence() -> None:
    """Keep libraries from writing where people read the run's progress. Call before importing torch."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)(\.|$)")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def silence_deepspeed() -> None:
    """DeepSpeed sets its logger's level when it is imported, so this follows the import."""
    from deepspeed.utils import logger

    logger.setLevel(logging.INFO if _is_verbose() else logging.ERROR)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Take what DeepSpeed prints while it builds an engine out of the way of the run's progress."""
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

    The extension serves inference all-reduces only, and has to be compiled on a fresh machine. The table of
    compatible ops is made on its first reading, by probing the compiler for every op: a table that is already
    there saves that too.
    """
    import deepspeed.ops

    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}


def import_muon_uncompiled() -> None:
    """Keep `deepspeed.initialize` from loading torch's compiler, a second on every rank.

    It imports its optimizer Muon, only to ask whether ours is one, and that is decorated with `torch.compile`.
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


def allow_cpu_fp16_if_asked() -> None:
    """Let the CPU accelerator say that it can compute in fp16: it can, a thousand times slower, for tests."""
    if os.environ.get(ALLOW_CPU_FP16) == "1":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True


def _is_verbose() -> bool:
    """`--verbose` opens the root logger; nothing else does."""
    return logging.getLogger().isEnabledFor(logging.INFO)
