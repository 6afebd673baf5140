"""Masters and moments on an NVMe disk: what DeepSpeed swaps in and out under ZeRO 3, for who reads or writes them.

A sub-group's tensors are empty but while it is swapped in; sub-groups of less than a megabyte stay in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megalm.checkpoint.shard_spec import FragmentKey
from megalm.errors import ConfigError
from megalm.utils.formatting import format_bytes


@dataclass(frozen=True)
class SwappedFragment:
    """A fragment that is read from the disk when it is asked for: a checkpoint of them takes no memory."""

    key: FragmentKey
    read: Callable[[], Tensor]

    @property
    def tensor(self) -> Tensor:
        return self.read()


class SwappedStates:
    """The sub-groups of DeepSpeed's ZeRO-3 optimizer `outer` that lie on a disk; without any, everything is present."""

    def __init__(self, outer: Any) -> None:
        self._outer = outer
        self._held: int | None = None
        flats = getattr(outer, "fp32_partitioned_groups_flat", ()) if getattr(outer, "swap_optimizer", False) else ()
        swappable = (index for index in range(len(flats)) if outer._swappable_optimizer_subgroup(index))
        self._indices = {id(flats[index]): index for index in swappable}

    def holds(self, flat: nn.Parameter) -> bool:
        return id(flat) in self._indices

    @contextlib.contextmanager
    def present(self, flat: nn.Parameter, changes: bool = False) -> Iterator[None]:
        """`flat` and its moments are in memory; with `changes` they are written back."""
        self.release_buffers()
        index = self._indices.get(id(flat))
        if index is None:
            yield
            return
        self._outer._optimizer_states_and_gradient_swap_in(index)
        yield  # what fails here ends the job
        if changes:
            self._outer._optimizer_states_and_gradient_swap_out(index)
        else:
            self._outer._release_swap_buffers(index)

    def read(self, flat: nn.Parameter, values: Callable[[], Tensor], is_last: bool) -> Tensor:
        """A copy of `values()`, a view of `flat` or of a moment; the sub-group stays in memory until its last one."""
        index = self._indices[id(flat)]
        if self._held != index:
            self.release_buffers()
            self._outer._optimizer_states_and_gradient_swap_in(index)
            self._held = index
        copy = values().clone()
        if is_last:
            self.release_buffers()
        return copy

    def release_buffers(self) -> None:
        """Before DeepSpeed steps, should a reader have stopped half way: its buffers are for one sub-group."""
        held, self._held = self._held, None
        if held is not None:
            self._outer._release_swap_buffers(held)


class SwapFolder:
    """A folder of this process below `nvme_path`: two jobs with the same path would write over each other's states.

    What processes of this machine left that were killed is removed. The kernel's lock on a folder tells whether its
    process is alive, in another container too, where numbers of processes mean nothing.

    Args:
        needed: bytes, of all ranks of this machine.

    Raises:
        ConfigError: it cannot be made, is too small, or is on a file system without direct I/O.
    """

    def __init__(self, stated: str, needed: int) -> None:
        base = Path(stated).expanduser()
        try:
            base.mkdir(parents=True, exist_ok=True)
            with _locked(base):  # between its making and its locking a folder looks like one that was left
                for left in base.glob(f"megalm-{socket.gethostname()}-*"):
                    _remove_if_left(left)
                _require_space(base, stated, needed)
                self.path = Path(tempfile.mkdtemp(prefix=f"megalm-{socket.gethostname()}-{os.getpid()}-", dir=base))
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            _require_direct_io(self.path)
        except OSError as error:
            raise ConfigError(
                f"offload_optimizer.nvme_path={stated} cannot be used ({error.strerror}); name a folder of an NVMe "
                "disk that you can write"
            ) from None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_if_left(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # another user's, or gone
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its process is alive
    finally:
        os.close(handle)


def _require_space(base: Path, stated: str, needed: int) -> None:
    free = shutil.disk_usage(base).free
    if free < needed:
        raise ConfigError(
            f"offload_optimizer.nvme_path={stated} has {format_bytes(free)} free, the states of this machine's "
            f"ranks need {format_bytes(needed)}; name a larger disk, or use more ranks"
        )


def _require_direct_io(folder: Path) -> None:
    """Raises: OSError: the file system has none; nothing of the folder stays then."""
    try:
        os.close(os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
