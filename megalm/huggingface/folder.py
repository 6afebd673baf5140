"""A folder that is complete or absent, and what a person says where it is to be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megalm.data.files import writing_to
from megalm.durable import make_directory, sync_directory, temporary_name
from megalm.errors import ConfigError


def require_free(target: Path) -> None:
    """Raises: ConfigError: there is something at `target` already, other than an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target} exists and is no folder; name another place")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not empty; name another folder, or remove it first")


def complete_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder beside `target`, which becomes `target` when it is whole and on disk.

    Raises:
        ConfigError: `target` is not free, or cannot be made.
        DataError: the disk is full.
    """
    require_free(target)
    temporary = temporary_name(target)
    try:
        make_directory(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process of the same number that was killed
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(f"{target} cannot be made ({error}); name a place that you can write") from None
    try:
        with writing_to(target):
            fill(temporary)
            _sync(temporary)
            require_free(target)
            temporary.replace(target)  # over an empty folder too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
