"""Files that are complete or absent: temporary name, fsync, rename. Shared by everything that writes to disk."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A name beside `path`, on the same file system so that a rename is atomic, and of this process on this node."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def complete_file(path: Path, fill: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Let `fill` write a file that appears as `path` when it is whole; its directory is not synced.

    Not `durable`: a power cut may leave it empty; for what can be made again.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            fill(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
