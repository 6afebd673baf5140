"""Arrays that take long to make, kept in files under a name that says what they were made of, and mapped into memory.

Safe when many ranks on many nodes open the same one at once: each file is complete or absent (temporary name, fsync,
rename), and everybody who makes it makes the same bytes. A lock lets one make it while the others wait; where the file
system has no locks, or they do not reach over nodes, it is made once a node or more often, which is slow and not wrong.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.utils.atomic_files import locked, sync_directory, write_atomically, writing_to

Arrays = Mapping[str, npt.NDArray[Any]]

# A temporary file that nobody has written to for so long is of a process that was killed.
_ABANDONED_SECONDS = 3600.0


class ArrayCache:
    """Args: directory: None makes the arrays in memory, each time."""

    # NumPy reads a file's header with `ast`, whose parser Python 3.11.7 lets two threads of a process confuse.
    _one_header_at_a_time = threading.Lock()

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def get(self, facts: tuple[object, ...], make: Callable[[], Arrays]) -> Arrays:
        """What `make()` gives for these facts, from the files if they are there.

        Raises:
            DataError: a folder that cannot be written.
        """
        if self._directory is None:
            return make()
        folder = self._directory / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        known = self._mapped(folder)
        if known is None:
            with locked(folder / "lock"):
                known = self._mapped(folder)  # another process made it meanwhile
                if known is None:
                    self._write(folder, make())
                    known = self._mapped(folder)
            assert known is not None, folder
        return known

    @classmethod
    def _mapped(cls, folder: Path) -> dict[str, npt.NDArray[Any]] | None:
        names = folder / "names"
        try:
            with cls._one_header_at_a_time:
                return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names.read_text().split()}
        except (OSError, ValueError, EOFError):  # not there, or damaged: it is made again
            return None

    @staticmethod
    def _write(folder: Path, arrays: Arrays) -> None:
        with writing_to(folder):
            for left in folder.glob(".*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                        left.unlink()
            for name, array in arrays.items():
                write_atomically(folder / f"{name}.npy", functools.partial(np.save, arr=array))
            # The last: it says that the others are there.
            write_atomically(folder / "names", lambda file: file.write(" ".join(arrays).encode()))
            sync_directory(folder)
