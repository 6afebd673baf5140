"""Files that are complete or absent: temporary name, fsync, rename. Shared by everything that writes to disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from megalm.errors import DataError

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


def write_atomically(path: Path, fill: Callable[[BinaryIO], object], durable: bool = True) -> None:
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
    write_atomically(path, lambda file: file.write(content))
    sync_directory(path.parent)


# Small files of a dataset, complete or absent; what goes wrong is a DataError.


def write_bytes_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` at once: a reader sees the old file or the new one.

    Not `durable`: a power cut may undo it, or leave an empty file; for what can be made again.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content), durable)
        if durable:
            sync_directory(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write `value` as indented JSON with a fixed order of keys, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
    # A file's name may hold bytes that are not UTF-8, as lone surrogates: what replaces them is JSON's own escape.
    write_bytes_atomically(path, (text + "\n").encode(errors="backslashreplace"), durable)


def json_hash(value: Any) -> str:
    """Identity of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        DataError: where it is not readable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); build it again") from error


def discard(file: IO[bytes], temporary: Path | None = None) -> None:
    """Close and remove what was not finished; what is still buffered may find no room on the disk, either."""
    with contextlib.suppress(OSError):
        file.close()
    if temporary is not None:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses (full disk, permissions) into one line that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error  # NumPy's own errors have words only
        raise DataError(f"{path}: cannot be written ({reason}); check the folder, its rights and space") from error


@contextlib.contextmanager
def locked(
    path: Path, held: Callable[[], None] = lambda: None, no_locks: Callable[[OSError], None] = lambda error: None
) -> Iterator[IO[str]]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    Args:
        held: called where another process has it, before waiting for that; it may raise.
        no_locks: called where the file system has none, before going on without.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            no_locks(error)
        yield file
