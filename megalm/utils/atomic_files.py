"""Atomic file writes (temporary name, fsync, rename) and small JSON files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from megalm.errors import ConfigError, DataError, MegalmError

# The file is gone: by its name, or on a network file system the open one itself.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_TEMPORARY = re.compile(r"\..+\.tmp")


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory: Path) -> None:
    """Make a folder and its missing parents, durably against a power cut."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a name beside `path`, so that a rename is atomic, and unique to this process and node."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether `path` has a name made by `temporary_name`, as a killed process leaves behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


def write_atomically(path: Path, fill: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Let `fill` write a file that appears as `path` once complete; its directory is not synced.

    Without `durable`, a power cut can leave it empty; use that for files that can be made again.
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


def still_names(path: Path, descriptor: int) -> bool:
    """Return whether `path` is the open file or folder `descriptor`; also if a temporary failure hides that."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        return error.errno not in _GONE


def is_stranger(path: Path, folder: bool = False) -> bool:
    """Return whether `path` exists and is not a file (a folder with `folder`): opening a pipe, say, waits forever."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode))


def clear_away(path: Path) -> None:
    """Delete the folder `path`, which this program made; set aside a link or a file that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.found-{number}")):
        number += 1
    path.rename(aside)


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path`, atomically and durably."""
    write_atomically(path, lambda file: file.write(content))
    sync_directory(path.parent)


def refuse_overwriting_inputs(outputs: Iterable[Path], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse to write over a file that the same command reads, by whatever path or link each is named.

    Args:
        outputs: the files that the command writes or appends to; missing ones are harmless.
        inputs: the files that it reads; a folder stands for every file in it, and what does not exist is ignored.

    Raises:
        ConfigError: an output is an input; the message names both paths.
    """
    written = {identity: path for path in outputs if (identity := file_identity(path)) is not None}
    if not written:
        return
    for path in map(Path, inputs):
        folders = os.walk(path) if path.is_dir() else [("", [], [str(path)])]
        for file in (Path(folder, name) for folder, _, names in folders for name in names):
            identity = file_identity(file)
            if identity in written:
                output = written[identity]
                other = f", as {file}" if file != output else ""
                raise ConfigError(f"{output}: this command reads this file{other}; name another output or input")


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of the file at the end of all links; None if there is none that can be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a null character in the name
        return None
    return status.st_dev, status.st_ino


# Dataset files: failures are DataErrors


def write_bytes_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content`: a reader sees the old file or the new one.

    Without `durable`, a power cut can undo the write or leave an empty file; use that for files that can be made again.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content), durable)
        if durable:
            sync_directory(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write `value` as indented JSON with a fixed key order, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
    # A file name can hold bytes that are not UTF-8, as lone surrogates: backslashreplace writes JSON's own escape.
    write_bytes_atomically(path, (text + "\n").encode(errors="backslashreplace"), durable)


def json_hash(value: Any) -> str:
    """Return a hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read the JSON value in `path`.

    Raises:
        DataError: the file is not readable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); build it again") from error


def discard(file: IO[bytes], temporary: Path | None = None) -> None:
    """Close and remove an unfinished file; ignores that flushing its buffer can fail on a full disk too."""
    with contextlib.suppress(OSError):
        file.close()
    if temporary is not None:
        temporary.unlink(missing_ok=True)


CACHE_ADVICE = "choose another folder with data.cache or MEGALM_CACHE, or check its rights and space"


@contextlib.contextmanager
def writing_to(
    path: Path, advice: str = "check the folder, its rights and space", kind: type[MegalmError] = DataError
) -> Iterator[None]:
    """Turn an OSError (full disk, permissions) into a one-line error that names the path and gives `advice`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error  # NumPy's own errors have no strerror
        raise kind(f"{path}: cannot be written ({reason}); {advice}") from error
