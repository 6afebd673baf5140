"""Arrays that take long to make, kept in files under a name that says what they were made of, and mapped into memory.

Safe when many ranks on many nodes open the same one at once: each file is complete or absent (temporary name, fsync,
rename), and everybody who makes it makes the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.files import writing_to
from megalm.durable import complete_file, sync_directory, temporary_name

Arrays = Mapping[str, npt.NDArray[Any]]


class ArrayCache:
    """Args: directory: None makes the arrays in memory, each time."""

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
            self._write(folder, make())
            known = self._mapped(folder)
            assert known is not None, folder
        return known

    @staticmethod
    def _mapped(folder: Path) -> dict[str, npt.NDArray[Any]] | None:
        names = folder / "names"
        try:
            return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names.read_text().split()}
        except (OSError, ValueError, EOFError):  # not there, or damaged: it is made again
            return None

    @staticmethod
    def _write(folder: Path, arrays: Arrays) -> None:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, array in arrays.items():
                complete_file(folder / f"{name}.npy", functools.partial(np.save, arr=array))
            names = temporary_name(folder / "names")
            names.write_text(" ".join(arrays))
            names.replace(folder / "names")  # the last: it says that the others are there
            sync_directory(folder)
