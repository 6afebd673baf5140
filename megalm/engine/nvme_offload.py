"""Access to masters and moments that DeepSpeed keeps on an NVMe disk under ZeRO 3, and the folder they are in.

A sub-group's tensors are empty unless it is swapped in. Sub-groups of less than a megabyte stay in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megalm.errors import ConfigError
from megalm.utils.file_lock import take_lock
from megalm.utils.formatting import format_bytes


class SwappedStates:
    """The sub-groups that DeepSpeed's ZeRO-3 optimizer `outer` swaps to a disk, possibly none."""

    def __init__(self, outer: Any) -> None:
        self._outer = outer
        self._held: int | None = None
        flats = outer.fp32_partitioned_groups_flat
        swappable = (index for index in range(len(flats)) if outer._swappable_optimizer_subgroup(index))
        self._indices = {id(flats[index]): index for index in swappable}

    def holds(self, flat: nn.Parameter) -> bool:
        return id(flat) in self._indices

    @contextlib.contextmanager
    def present(self, flat: nn.Parameter, changes: bool = False) -> Iterator[None]:
        """Keep `flat` and its moments in memory inside the context; with `changes`, write them back at its end."""
        self.release_buffers()
        index = self._indices.get(id(flat))
        if index is None:
            yield
            return
        self._outer._optimizer_states_and_gradient_swap_in(index)
        yield  # no cleanup on errors: they end the job
        if changes:
            self._outer._optimizer_states_and_gradient_swap_out(index)
        else:
            self._outer._release_swap_buffers(index)

    def read(self, flat: nn.Parameter, values: Callable[[], Tensor], is_last: bool) -> Tensor:
        """Return a copy of `values()`, a view of `flat` or a moment; keep the sub-group in memory until `is_last`."""
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
        """Release a sub-group that an unfinished read left swapped in: DeepSpeed's buffers hold only one."""
        held, self._held = self._held, None
        if held is not None:
            self._outer._release_swap_buffers(held)


class SwapFolder:
    """This process's own folder below `nvme_path`, so that two jobs with the same path do not overwrite each other.

    Removes folders that killed processes of this machine left. Whether a folder's process is alive is decided by a
    kernel lock on it, not by a process id, which means nothing in another container.

    Args:
        nvme_path: the configured `nvme_path`.
        needed: bytes for all ranks of this machine.

    Raises:
        ConfigError: the folder cannot be created, has too little space, or its file system has no direct I/O.
    """

    def __init__(self, nvme_path: str, needed: int) -> None:
        base = Path(nvme_path).expanduser()
        try:
            base.mkdir(parents=True, exist_ok=True)
            with take_lock(base, is_folder=True):  # a folder that is created but not yet locked looks abandoned
                for folder in base.glob(f"megalm-{socket.gethostname()}-*"):
                    _remove_if_abandoned(folder)
                _require_space(base, nvme_path, needed)
                self.path = Path(tempfile.mkdtemp(prefix=f"megalm-{socket.gethostname()}-{os.getpid()}-", dir=base))
                self._lock = take_lock(self.path, is_folder=True)
            _require_direct_io(self.path)
        except OSError as error:
            raise ConfigError(
                f"offload_optimizer.nvme_path={nvme_path} cannot be used ({error.strerror}); name a writable "
                "folder on an NVMe disk"
            ) from None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the folder if its process has ended; without locks this is unknown, so it stays."""
    with (
        contextlib.suppress(OSError),  # its process is alive, or it is another user's, or gone
        take_lock(folder, wait_seconds=0.0, is_folder=True) as lock,
    ):
        if lock.in_kernel:
            shutil.rmtree(folder, ignore_errors=True)


def _require_space(base: Path, nvme_path: str, needed: int) -> None:
    free = shutil.disk_usage(base).free
    if free < needed:
        raise ConfigError(
            f"offload_optimizer.nvme_path={nvme_path} has {format_bytes(free)} free, but the optimizer states of this "
            f"machine's ranks need {format_bytes(needed)}; name a larger disk, or use more ranks"
        )


def _require_direct_io(folder: Path) -> None:
    """Check that the file system has direct I/O; if not, remove the folder and raise OSError."""
    try:
        os.close(os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
