"""Documents out of text files: .jsonl, .json, .txt, .md, .parquet, and each of these packed as .gz .zst .bz2 .xz."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Literal, NamedTuple, cast

import orjson

from megalm.data.zstd import ZstdFile
from megalm.errors import DataError

OnError = Literal["raise", "skip"]
KEPT_MESSAGES = 20
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
# What the unpackers raise on a damaged or shortened file.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Document(NamedTuple):
    """A text, and where it came from: "file:line" or "file"."""

    text: str
    source: str


@dataclass
class ReadReport:
    """What reading did; filled while `iter_documents` runs."""

    documents: int = 0
    skipped: int = 0
    duplicates: int = 0
    ignored_files: int = 0  # in folders, not of a kind that is read
    messages: list[str] = field(default_factory=list)  # the first of what was skipped

    def skip(self, message: str) -> None:
        self.skipped += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(message)


class _Problem(NamedTuple):
    """Stands in a stream of documents where one could not be read."""

    message: str


def iter_documents(
    paths: Iterable[str | Path],
    text_key: str = "text",
    on_error: OnError = "raise",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents of files, folders (all files below, sorted) and globs, in the order given.

    A .txt or .md file is one document; .jsonl holds one object a line; .json an array of objects or strings;
    of an object, and of a parquet table, `text_key` is the text.

    Args:
        on_error: "skip" leaves out what cannot be read and counts it in `report`; where a packed file breaks
            off, its rest is one such thing.

    Raises:
        DataError: with file and line, at the first thing that cannot be read; and, whatever `on_error`, for
            a path that matches nothing.
    """
    report = ReadReport() if report is None else report
    for path in find_files(paths, report):
        for item in _read_file(path, text_key):
            if isinstance(item, Document):
                report.documents += 1
                yield item
            elif on_error == "raise":
                raise DataError(f"{item.message}; mend it, or skip such documents (on_error=skip)")
            else:
                report.skip(item.message)


def find_files(paths: Iterable[str | Path], report: ReadReport | None = None) -> list[Path]:
    """The files that `paths` name; of a folder those of a known kind, the others counted in `report`.

    Raises:
        DataError: a path that is not there, a glob or folder without files, a file of an unknown kind.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.is_file())
            matches = [file for file in below if _kind(file) in READERS and not file.name.startswith(".")]
            if report is not None:
                report.ignored_files += len(below) - len(matches)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(str(given), recursive=True)) if Path(name).is_file()]
        if not matches:
            raise DataError(f"{given}: no file to read there; give files, folders or globs of {_known_kinds()}")
        for file in matches:
            if _kind(file) not in READERS:
                raise DataError(f"{file}: unknown kind of file; known are {_known_kinds()}")
        found += matches
    return found


def _known_kinds() -> str:
    return f"{' '.join(READERS)}, also packed as {' '.join(PACKINGS)}"


def _kind(path: Path) -> str:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in PACKINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path, text_key: str) -> Iterator[Document | _Problem]:
    try:
        with path.open("rb") as raw:
            yield from READERS[_kind(path)](_unpacked(raw, path.suffix), path, text_key)
    except BROKEN as error:
        yield _Problem(f"{path}: cannot be read to its end ({error}), it is damaged or cut short")


def _unpacked(raw: BinaryIO, suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, ZstdFile(raw))))
    return raw


def _read_text(file: IO[bytes], path: Path, text_key: str) -> Iterator[Document | _Problem]:
    try:
        yield Document(file.read().decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        yield _Problem(f"{path}: is not UTF-8 at byte {error.start:,}")


def _read_json_lines(file: IO[bytes], path: Path, text_key: str) -> Iterator[Document | _Problem]:
    for number, line in enumerate(file, 1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield _parse(content, f"{path}:{number}", text_key)


def _parse(line: bytes, source: str, text_key: str) -> Document | _Problem:
    try:
        value = orjson.loads(line)
    except ValueError as error:
        return _Problem(f"{source}: is not JSON ({error})")
    if not isinstance(value, dict):
        return _Problem(f"{source}: is {type(value).__name__}, not an object with {text_key!r}")
    return _text_of(value, source, text_key)


def _text_of(value: object, source: str, text_key: str) -> Document | _Problem:
    if isinstance(value, dict):
        if text_key not in value:
            keys = ", ".join(map(repr, list(value)[:8])) or "none"
            return _Problem(f"{source}: has no {text_key!r} (its keys: {keys})")
        value = value[text_key]
    if not isinstance(value, str):
        return _Problem(f"{source}: {text_key!r} is {type(value).__name__}, not text")
    return Document(value, source)


def _read_json(file: IO[bytes], path: Path, text_key: str) -> Iterator[Document | _Problem]:
    try:
        values = orjson.loads(file.read().removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        yield _Problem(f"{path}: is not JSON ({error}); name it .jsonl if it has an object a line")
        return
    if not isinstance(values, list):
        yield _Problem(f"{path}: is {type(values).__name__}, not an array of objects or strings")
        return
    for number, value in enumerate(values):
        yield _text_of(value, f"{path}[{number}]", text_key)


def _read_parquet(file: IO[bytes], path: Path, text_key: str) -> Iterator[Document | _Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A table is read from its end: a packed one is unpacked into memory first.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix in PACKINGS else file)
        if text_key not in table.schema_arrow.names:
            yield _Problem(f"{path}: has no column {text_key!r} (its columns: {', '.join(table.schema_arrow.names)})")
            return
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for value in batch.column(0):
                yield _text_of(value.as_py(), f"{path}:{row}", text_key)
                row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield _Problem(f"{path}: is not a readable parquet table ({str(error).splitlines()[0]})")


READERS: dict[str, Callable[[IO[bytes], Path, str], Iterator[Document | _Problem]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".txt": _read_text,
    ".md": _read_text,
    ".parquet": _read_parquet,
}
