"""Writes an output folder that is complete or absent, and checks the path that the user gave for it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from megalm.errors import ConfigError, DataError
from megalm.utils.atomic_files import make_directory, sync_directory, temporary_name, writing_to
from megalm.utils.formatting import format_bytes

T = TypeVar("T")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def require_free(target: Path) -> None:
    """Raises: ConfigError: `target` exists and is not an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target} exists and is not a folder; name another path")
    if target.name in ("", ".."):  # the finished folder is renamed to it
        raise ConfigError(f"{target} does not name a new folder; give its full path")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not empty; name another folder, or remove it first")


def require_room(target: Path, needed: int) -> None:
    """Check the free space for `target`, after removing the temporary folders that killed processes left beside it.

    Args:
        needed: bytes that `target` will take.

    Raises:
        DataError: the disk has less free.
    """
    _remove_abandoned(target)
    free = _free_bytes(target)
    if free < needed:
        raise DataError(_disk_full(target, needed, free))


def complete_folder(target: Path, needed: int, fill: Callable[[Path], T]) -> T:
    """Let `fill` write a temporary folder beside `target`, sync it and rename it to `target`; return `fill`'s result.

    Args:
        needed: bytes that the folder will take.

    Raises:
        ConfigError: `target` is not free, or cannot be created.
        DataError: the disk has too little space.
    """
    require_free(target)
    require_room(target, needed)
    temporary = temporary_name(target)
    try:
        make_directory(target.parent)
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(f"{target} cannot be created ({error}); name a path that you can write to") from None
    try:
        with writing_to(target):
            result = fill(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                sync_directory(path)
            require_free(target)
            temporary.replace(target)  # also replaces an empty folder
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_full(error):
            raise DataError(_disk_full(target, needed, _free_bytes(target))) from error
        raise
    sync_directory(target.parent)
    return result


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary folders of processes of this node that no longer run."""
    prefix = temporary_name(target).name.removesuffix(f"{os.getpid()}.tmp")
    running = set(psutil.pids()) - {os.getpid()}  # a folder with this process's number is an earlier process's
    found: list[Path] = []
    with contextlib.suppress(OSError):  # the parent folder does not exist yet, or cannot be read
        found += target.parent.iterdir()
    for path in found:
        number = path.name.removeprefix(prefix).removesuffix(".tmp")
        if path.name == f"{prefix}{number}.tmp" and number.isdecimal() and int(number) not in running:
            shutil.rmtree(path, ignore_errors=True)


def _free_bytes(target: Path) -> int:
    """Free space on the disk of `target`, which may not exist yet."""
    existing = next(path for path in (target.parent, *target.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__
    return False


def _disk_full(target: Path, needed: int, free: int) -> str:
    sizes = f"{target} takes {format_bytes(needed)}, and its disk has {format_bytes(free)} free"
    if free >= needed:  # another process has freed space since, or there is a quota
        return f"{sizes} now, but the disk was full during the write; try again, check your quota, or name another disk"
    return f"{sizes}: {format_bytes(needed - free)} are missing; free some space, or name a folder on another disk"
