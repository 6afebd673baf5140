"""A folder that is complete or absent, and what a person says where it is to be."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megalm.errors import ConfigError, DataError
from megalm.utils.atomic_files import make_directory, sync_directory, temporary_name, writing_to
from megalm.utils.formatting import format_bytes

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def require_free(target: Path) -> None:
    """Raises: ConfigError: there is something at `target` already, other than an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target} exists and is no folder; name another place")
    if target.name in ("", ".."):  # it is put in place as a whole, by a name
        raise ConfigError(f"{target} has no name of its own; name a folder that is to be made")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not empty; name another folder, or remove it first")


def require_room(target: Path, needed: int) -> None:
    """Refuse to begin what cannot be finished; what killed processes left of `target` goes first.

    Args:
        needed: bytes that `target` will take.

    Raises:
        DataError: its disk has less.
    """
    _remove_left(target)
    free = _free_bytes(target)
    if free < needed:
        raise DataError(_too_full(target, needed, free))


def complete_folder(target: Path, needed: int, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder beside `target`, which becomes `target` when it is whole and on disk.

    Args:
        needed: bytes that it will take.

    Raises:
        ConfigError: `target` is not free, or cannot be made.
        DataError: the disk is too full.
    """
    require_free(target)
    require_room(target, needed)
    temporary = temporary_name(target)
    try:
        make_directory(target.parent)
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(f"{target} cannot be made ({error}); name a place that you can write") from None
    try:
        with writing_to(target):
            fill(temporary)
            _sync(temporary)
            require_free(target)
            temporary.replace(target)  # over an empty folder too
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_for_room(error):
            raise DataError(_too_full(target, needed, _free_bytes(target))) from error
        raise
    sync_directory(target.parent)


def _remove_left(target: Path) -> None:
    """What processes of this node began and could not remove, because they were killed."""
    beginning = temporary_name(target).name.removesuffix(f"{os.getpid()}.tmp")
    found: list[Path] = []
    with contextlib.suppress(OSError):  # no such folder yet, or none that may be read
        found += target.parent.iterdir()
    for path in found:
        number = path.name.removeprefix(beginning).removesuffix(".tmp")
        if path.name == f"{beginning}{number}.tmp" and number.isdecimal() and not _is_of_another(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _is_of_another(process: int) -> bool:
    """Whether it is alive; what has this process's own number is of an earlier one."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _free_bytes(target: Path) -> int:
    """Of the disk that `target` is on, or will be."""
    there = next(path for path in (target.parent, *target.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _is_for_room(error: BaseException | None) -> bool:
    """Whether a full disk is at the bottom of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        error = error.__cause__
    return False


def _too_full(target: Path, needed: int, free: int) -> str:
    wanted = f"{target} takes {format_bytes(needed)}, its disk has {format_bytes(free)} free"
    if free >= needed:  # somebody else has made room since, or there is a quota
        return f"{wanted} now, but it was full before the end; try again, look at your quota, or name another disk"
    return f"{wanted}: {format_bytes(needed - free)} are missing; make room, or name a folder on another disk"


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
