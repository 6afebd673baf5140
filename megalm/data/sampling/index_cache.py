"""Cache expensive arrays in memory-mapped files, named by a hash of the facts that determine them.

Safe for many ranks on many nodes at once: each file is complete or absent (temporary name, fsync, rename), and every
process writes the same bytes. One process holds a lock and writes while the others wait. Without locks, or with locks
that do not span nodes, several processes write the same files, which is slow but correct.
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

from megalm.utils.atomic_files import CACHE_ADVICE, sync_directory, write_atomically, writing_to
from megalm.utils.file_lock import take_lock

Arrays = Mapping[str, npt.NDArray[Any]]

# A temporary file without writes for this long belongs to a killed process.
_ABANDONED_SECONDS = 3600.0


class ArrayCache:
    """Args: directory: the cache's folder; None computes the arrays in memory each time."""

    # NumPy parses a file's header with `ast`, which is not thread-safe in Python 3.11.7.
    _one_header_at_a_time = threading.Lock()

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def get(self, facts: tuple[object, ...], make: Callable[[], Arrays]) -> Arrays:
        """Return the result of `make()` for these facts, from the cache if present.

        Raises:
            DataError: the folder cannot be written.
        """
        if self._directory is None:
            return make()
        folder = self._directory / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        known = self._mapped(folder)
        if known is None:
            with writing_to(folder, CACHE_ADVICE):
                folder.mkdir(parents=True, exist_ok=True)
                lock = take_lock(folder / "lock")
            with lock:
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
        except (OSError, ValueError, EOFError):  # missing or damaged: made again
            return None

    @staticmethod
    def _write(folder: Path, arrays: Arrays) -> None:
        with writing_to(folder, CACHE_ADVICE):
            for left in folder.glob(".*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                        left.unlink()
            for name, array in arrays.items():
                write_atomically(folder / f"{name}.npy", functools.partial(np.save, arr=array))
            # Written last: it marks the other files as complete.
            write_atomically(folder / "names", lambda file: file.write(" ".join(arrays).encode()))
            sync_directory(folder)
