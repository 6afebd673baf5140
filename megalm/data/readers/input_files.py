"""Find and open a build's inputs: files, folders, globs and standard input, of known kinds, packed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from backports import zstd

from megalm.data.readers.losses import Losses
from megalm.errors import DataError

STDIN = "-"
KINDS = (".jsonl", ".json", ".txt", ".md", ".parquet")
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
KEPT_MESSAGES = 20
WORK_SUFFIX = ".building"
# Errors that the unpackers raise on a damaged or truncated file.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
HASH_BYTES = 1 << 20
PIECE_BYTES = 1 << 12
_ZSTD_WINDOW = 31  # log2 of the largest window, 2 GiB: what `zstd --ultra --long=31` writes


@dataclass
class ReadReport:
    """Counts and messages, filled while documents are read."""

    documents: int = 0
    losses: Losses = field(default_factory=Losses)
    duplicates: int = 0
    ignored_files: int = 0  # files in folders, of unknown kinds
    messages: list[str] = field(default_factory=list)  # about the first unreadable documents and files

    @property
    def skipped(self) -> int:
        """Number of documents that were skipped, unreadable or empty; the lost rest of a file counts as one."""
        return self.losses.skipped + self.losses.lost_files + self.losses.empty

    def note(self, message: str) -> None:
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(message)


@dataclass(frozen=True)
class InputFile:
    """A file as found at the start. Standard input has path "-", no size and no time."""

    path: str
    kind: str  # of KINDS
    packing: str = ""  # of PACKINGS, or "" if not packed
    size: int = 0  # bytes
    mtime_ns: int = 0

    @classmethod
    def found_at(cls, path: Path) -> InputFile:
        status = path.stat()
        return cls(str(path), kind_of(path), packing_of(path), status.st_size, status.st_mtime_ns)

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    def check_unchanged(self) -> None:
        """Raise DataError if the file has changed since it was found."""
        try:
            same = self.is_stdin or InputFile.found_at(Path(self.path)) == self
        except OSError as error:
            raise DataError(f"{self.path}: can no longer be read ({error.strerror}); start again") from error
        if not same:
            raise DataError(f"{self.path}: changed while it was being read; start again when it is complete")

    def open_raw(self) -> BinaryIO:
        return sys.stdin.buffer if self.is_stdin else Path(self.path).open("rb")


def unpacked(raw: BinaryIO | PackedBytes, packing: str) -> IO[bytes]:
    """Return a stream of the unpacked content; truncation or damage raises one of BROKEN, never an early end."""
    if packing == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=cast(BinaryIO, raw)))
    if packing == ".bz2":
        return io.BufferedReader(_PackedStreams(raw, bz2.BZ2Decompressor, bz2.BZ2Decompressor, padding_unit=0))
    if packing == ".xz":
        following = partial(lzma.LZMADecompressor, format=lzma.FORMAT_XZ)
        return io.BufferedReader(_PackedStreams(raw, lzma.LZMADecompressor, following, padding_unit=4))
    if packing == ".zst":
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
        return cast(IO[bytes], zstd.ZstdFile(cast(BinaryIO, raw), options=options))
    return cast(BinaryIO, raw)


class PackedBytes:
    """Reads a packed file in small pieces. `used`: bytes before the last piece, which damage spares."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._end = self.used = 0

    def read(self, size: int = -1) -> bytes:
        piece = self._raw.read(min(size, PIECE_BYTES) if size >= 0 else PIECE_BYTES)
        self.used, self._end = self._end, self._end + len(piece)
        return piece


class _PackedStreams(io.RawIOBase):
    """The content of all compressed streams of a file, one after the other.

    The standard library's BZ2File and LZMAFile drop what follows a finished stream if it is not another stream, without
    an error. Here only the padding that the .xz format allows may follow.

    Args:
        first, following: make the decompressor of the first stream and of each other.
        padding_unit: zero bytes may follow a stream in multiples of this; 0: none may.
    """

    def __init__(
        self, raw: BinaryIO | PackedBytes, first: Callable[[], Any], following: Callable[[], Any], padding_unit: int
    ) -> None:
        self._raw = raw
        self._decompressor = first()
        self._following = following
        self._padding_unit = padding_unit
        self._packed = b""  # read, and not yet given to the decompressor

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = b""
        while not piece:
            if self._decompressor.eof and not self._begin_next():
                return 0
            if self._decompressor.needs_input and not self._packed:
                self._packed = self._raw.read(HASH_BYTES)
                if not self._packed:
                    raise EOFError("the file ends within a compressed stream")
            packed, self._packed = self._packed, b""
            piece = self._decompressor.decompress(packed, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def _begin_next(self) -> bool:
        """Begin the stream that follows; return False at the end of the file."""
        rest, padding = self._decompressor.unused_data, 0
        while rest or (rest := self._raw.read(HASH_BYTES)):
            stripped = rest.lstrip(b"\0") if self._padding_unit else rest
            padding += len(rest) - len(stripped)
            rest = stripped
            if rest:
                break
        if padding and padding % self._padding_unit:
            raise lzma.LZMAError(f"{padding} bytes of padding after a stream, not a multiple of {self._padding_unit}")
        if rest:
            self._decompressor, self._packed = self._following(), rest
        return bool(rest)


def kind_of(path: Path) -> str:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in PACKINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def packing_of(path: Path) -> str:
    return path.suffix if path.suffix in PACKINGS else ""


def find_inputs(paths: Iterable[str | Path], report: ReadReport, stdin_kind: str = ".jsonl") -> list[InputFile]:
    """Return the files that `paths` name, and standard input for "-".

    In a folder, files of known kinds are read. Other files, hidden files, and links that lead outside the folder or
    nowhere are skipped and counted in `report`; a file that is named or matched by a glob is always read.

    Raises:
        DataError: a missing path, a glob or folder without files, a folder without read permission, a file of unknown
            kind; standard input named twice, or as a table, which cannot be read from a stream.
    """
    found: list[InputFile] = []
    for given in paths:
        if str(given) == STDIN:
            if stdin_kind not in KINDS or stdin_kind == ".parquet":
                raise DataError(f"standard input cannot be read as {stdin_kind!r}; choose .jsonl, .json, .txt or .md")
            found.append(InputFile(STDIN, stdin_kind))
        else:
            found += map(InputFile.found_at, _find_files(str(given), report))
    if sum(file.is_stdin for file in found) > 1:
        raise DataError("standard input (-) can be read only once; name it once")
    return found


def _find_files(given: str, report: ReadReport) -> list[Path]:
    if not given:  # Path("") is the current folder
        raise DataError("an input has an empty name; give files, folders or globs")
    path = Path(given)
    if path.is_dir():
        found, left_out = _below(path)
        report.ignored_files += left_out
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
    if not found:
        raise DataError(f"{given}: no input file found; give files, folders or globs of {_known_kinds()}")
    for file in found:
        if kind_of(file) not in KINDS:
            raise DataError(f"{file}: unknown file type; the known types are {_known_kinds()}")
    return found


def sha256_of(path: str | Path, stop: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of a file; "" if `stop` returns True before the end."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while (block := file.read(HASH_BYTES)) and not stop():
            digest.update(block)
    return "" if block else digest.hexdigest()


def _below(folder: Path) -> tuple[list[Path], int]:
    """Return (a folder's files to read, sorted; the number of other files and of links to folders elsewhere)."""
    found: list[Path] = []
    left_out = 0
    for place, folders, names in os.walk(folder, onerror=_refuse_folder):
        below = [Path(place, name) for name in names]
        found += [file for file in below if _belongs(file, folder)]
        links = [path for name in folders if (path := Path(place, name)).is_symlink()]
        left_out += len(below) + sum(not _inside(link, folder) for link in links)
    return sorted(found), left_out - len(found)


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); change its permissions, or choose another input"
    )


def _belongs(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    # Files that the builder writes beside its inputs are not inputs.
    if kind_of(file) not in KINDS or any(part.startswith(".") or part.endswith(WORK_SUFFIX) for part in parts):
        return False
    if file.suffix == ".json" and (file.with_suffix(".idx").exists() or _is_of_tokenizer(file)):
        return False
    return file.is_file() and (not file.is_symlink() or _inside(file, folder))


def _is_of_tokenizer(file: Path) -> bool:
    """Whether it is a tokenizer's report, such as my.model.json beside my.model."""
    return file.with_suffix("").suffix == ".model" and file.with_suffix("").exists()


def _inside(link: Path, folder: Path) -> bool:
    return link.resolve().is_relative_to(folder.resolve())


def _known_kinds() -> str:
    return f"{' '.join(KINDS)}, also compressed as {' '.join(PACKINGS)}"
