"""Compile and load DeepSpeed's C++ extensions, so that a process killed while compiling does not block later ones.

torch guards a build with a file named `lock`, and waits forever if the process that created it was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError
from megalm.utils.file_lock import take_lock

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
# Words that mark the informative line of a compiler's output.
_ERROR_WORDS = ("error:", "not found", "not being installed", "No such file", "No space left")
_SHOWN_CHARACTERS = 160


def load_cpu_adam() -> None:
    """Load DeepSpeed's CPUAdam. On first use one rank of each machine compiles it while the others wait.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    with compiling_alone(builder.name):
        _load(builder)


def load_async_io() -> None:
    """Load DeepSpeed's asynchronous I/O for NVMe disks, compiled like CPUAdam.

    Raises:
        ConfigError: libaio or, for a GPU, the CUDA toolkit is not installed, or the extension cannot be compiled.
    """
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if torch.cuda.is_available() and cuda_compiler() is None:
        raise ConfigError(
            "offload_optimizer.device=nvme compiles with the CUDA toolkit where there is a GPU, and there is no nvcc: "
            f"install or load the toolkit of CUDA {torch.version.cuda} (module load cuda, CUDA_HOME), or use device=cpu"
        )
    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        raise ConfigError(
            "offload_optimizer.device=nvme needs libaio, which is not installed; install it (Debian: apt-get install "
            "libaio-dev), or use device=cpu"
        )
    with compiling_alone("pin_memory"), compiling_alone(builder.name):  # the second loads the first
        _load(builder)


def cuda_compiler() -> Path | None:
    """Return the `nvcc` that torch and DeepSpeed compile with; None: there is no CUDA toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = None if CUDA_HOME is None else Path(CUDA_HOME) / "bin/nvcc"
    return nvcc if nvcc is not None and nvcc.is_file() else None


def _load(builder: Any) -> None:
    try:
        builder.load()
    except (RuntimeError, ImportError, OSError) as error:
        log.info("%s", error)  # the full compiler output, with --verbose
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line for line in lines if any(word in line for word in _ERROR_WORDS)), lines[0]).strip()
        raise ConfigError(
            f"DeepSpeed's {builder.name}, which offload needs, cannot be compiled ({why[:_SHOWN_CHARACTERS]}); put "
            "g++ and ninja on PATH (activate .venv; see megalm doctor), or use a DeepSpeed JSON without offload"
        ) from error


@contextlib.contextmanager
def compiling_alone(name: str) -> Iterator[None]:
    """Keep other ranks and jobs from compiling extension `name`; remove a torch lock that a killed process left.

    The kernel releases our lock when its holder dies. While we hold it, a torch lock that no process has open is stale.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    with take_lock(folder / "megalm.lock"):  # on a file system without locks, torch's lock alone remains
        theirs = folder / "lock"
        while theirs.exists():
            if not _is_open(theirs):
                log.warning("removed %s, the lock of a process that was killed while compiling", theirs)
                theirs.unlink(missing_ok=True)
            time.sleep(_POLL_SECONDS)
        yield


def _is_open(path: Path) -> bool:
    """Return whether a process of this user on this machine has the file open."""
    wanted = str(path.resolve())
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == wanted:
                return True
        except OSError:  # of another user, or gone
            continue
    return False
