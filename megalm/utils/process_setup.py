"""What a command sets up first in its process: standard streams, open files enough, /proc, what its launcher needs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.errors import EXIT_DONE, EXIT_REFUSED, EXIT_START_AGAIN, ConfigError
from megalm.utils.stop_signals import answer_stop_signals

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Connections of a process group, libraries, data and checkpoints; a run of a few ranks has up to a hundred open.
_FEWEST_FILES = 192
_USUAL_FILES = 4096


class _Output(io.FileIO):
    """Standard output; what nobody reads any more is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        if not memoryview(data).nbytes:  # click asks in this way whether the stream takes bytes, and ignores errors
            return 0
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # a full disk is reported once, not at the exit again
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, "standard output") from None
            return memoryview(data).nbytes


def keep_standard_streams() -> None:
    """Call first in a command.

    A standard stream that is closed (`>&-`) is opened on /dev/null: else the next file gets its number, and what a
    library prints lands there. A pipe whose reader has gone (`| head`) does not end the command.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - for the process
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):
        return
    if stdout is not sys.__stdout__:  # a caller's own
        stdout.reconfigure(errors="backslashreplace")
        return
    with contextlib.suppress(OSError, ValueError):
        stdout.flush()
        output = _Output(stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            output if stdout.write_through else io.BufferedWriter(output),  # `python -u`, as DeepSpeed's launcher does
            encoding=stdout.encoding,
            errors="backslashreplace",  # an encoding without a character is no reason to fail
            line_buffering=stdout.line_buffering,
            write_through=stdout.write_through,
        )


def require_extra(package: str, wanted_by: str = "", extra: str = "") -> None:
    """Check that a package of an extra of setup.py is there.

    Args:
        wanted_by: the setting that needs it, for the message.
        extra: the extra's name, if it is not the package's.

    Raises:
        ConfigError: it is missing; the message has the command that installs it.
    """
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        wanted = f"{wanted_by} needs {package}, which" if wanted_by else package
        raise ConfigError(
            f"{wanted} is not installed; run pip install -e '.[{extra or package}]' in megalm's folder"
        ) from None


def require_system() -> None:
    """Let this process open enough files, and refuse to train where it cannot.

    Raises:
        ConfigError: the limit of open files is too low, or /proc is missing.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _USUAL_FILES:
        soft = _USUAL_FILES if hard == resource.RLIM_INFINITY else min(_USUAL_FILES, hard)
        if soft < _FEWEST_FILES:
            raise ConfigError(
                f"a process may open only {soft} files here, training needs {_FEWEST_FILES}; raise the limit with "
                f"ulimit -n {_USUAL_FILES}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if not Path("/proc/self/stat").exists():
        raise ConfigError("/proc is not there, which training needs; mount it in the container or jail")


_END_FILE = "MEGALM_END_FILE"


def begin_under_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Undo what slurm/rank.sh set up for a launcher that restarts ranks, and what an earlier start left; call first."""
    path = environment.get(_END_FILE)
    if path:
        answer_stop_signals()
        Path(path).unlink(missing_ok=True)


def code_for_launcher(code: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the exit code for the launcher; where it must not start the ranks again, 0, and the real one in a file.

    `torchrun --max-restarts` takes any code but 0 for a failure. slurm/rank.sh, which started it, ends with the code in
    the file.
    """
    path = environment.get(_END_FILE)
    if not path or code not in (EXIT_REFUSED, EXIT_START_AGAIN):
        return code
    try:
        Path(path).write_text(f"{code}\n")
    except OSError:
        return code
    return EXIT_DONE


_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however that comes; a fork does not inherit it.

    Args:
        parent: the parent's number, which tells whether it has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
