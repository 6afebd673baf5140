"""Small files of a dataset, complete or absent; what goes wrong is a DataError."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megalm.durable import complete_file, sync_directory
from megalm.errors import DataError


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` at once: a reader sees the old file or the new one.

    Not `durable`: a power cut may undo it, or leave an empty file; for what can be made again.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        complete_file(path, lambda file: file.write(content), durable)
        if durable:
            sync_directory(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write `value` as indented JSON with a fixed order of keys, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
    # A file's name may hold bytes that are not UTF-8, as lone surrogates: what replaces them is JSON's own escape.
    write_atomically(path, (text + "\n").encode(errors="backslashreplace"), durable)


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
