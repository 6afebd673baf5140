"""Masters and moments on an NVMe disk: what DeepSpeed swaps in and out under ZeRO 3, for who reads or writes them.

A sub-group's tensors are empty but while it is swapped in; sub-groups of less than a megabyte stay in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from megalm.checkpoint.fragment import FragmentKey
from megalm.errors import ConfigError


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
        self.let_go()
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
            self.let_go()
            self._outer._optimizer_states_and_gradient_swap_in(index)
            self._held = index
        copy = values().clone()
        if is_last:
            self.let_go()
        return copy

    def let_go(self) -> None:
        """Before DeepSpeed steps, should a reader have stopped half way: its buffers are for one sub-group."""
        held, self._held = self._held, None
        if held is not None:
            self._outer._release_swap_buffers(held)


def own_swap_folder(stated: str, needed: int) -> Path:
    """A folder of this process below `nvme_path`: two jobs with the same path would write over each other's states.

    What processes of this machine left that were killed is removed.

    Args:
        needed: bytes, of all ranks of this machine.

    Raises:
        ConfigError: it cannot be made, is too small, or is on a file system without direct I/O.
    """
    base = Path(stated).expanduser()
    host = socket.gethostname()
    try:
        base.mkdir(parents=True, exist_ok=True)
        for left in base.glob(f"megalm-{host}-*-*"):
            number = left.name.rsplit("-", 2)[1]
            if number.isdecimal() and not psutil.pid_exists(int(number)):
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(base).free
        if free < needed:
            raise ConfigError(
                f"offload_optimizer.nvme_path={stated} has {free / 2**30:,.1f} GiB free, the states of this machine's "
                f"ranks need {needed / 2**30:,.1f} GiB; name a larger disk, or use more ranks"
            )
        own = Path(tempfile.mkdtemp(prefix=f"megalm-{host}-{os.getpid()}-", dir=base))
        os.close(os.open(own / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        raise ConfigError(
            f"offload_optimizer.nvme_path={stated} cannot be used ({error.strerror}); name a folder of an NVMe disk "
            "that you can write"
        ) from None
    return own
