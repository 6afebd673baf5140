"""Files that are complete or absent: temporary name, fsync, rename. Shared by everything that writes to disk."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.tmp")


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory: Path) -> None:
    """Make a folder and those above it that are missing, so that they survive a power cut."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside `path`, on the same file system so that a rename is atomic, and of this process on this node."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether it has a name as `temporary_name` gives: left behind by a process that was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


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


def write_durably(path: Path, content: bytes) -> None:
    """Make the file `path` hold `content`, atomically and on disk."""
    complete_file(path, lambda file: file.write(content))
    sync_directory(path.parent)
