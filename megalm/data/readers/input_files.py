"""Find and open a build's inputs: files, folders and globs here or at addresses, and standard input; packed or not."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from backports import zstd

from megalm.data.readers.losses import Losses
from megalm.errors import DataError
from megalm.utils.remote_files import (
    RemoteVersion,
    check_address,
    has_glob,
    is_remote,
    list_remote,
    open_remote_file,
    remote_version,
)

logger = logging.getLogger(__name__)

STDIN = "-"
KINDS = (".jsonl", ".json", ".txt", ".md", ".parquet")
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
_MAGIC = re.compile(
    rb"(?P<gz>\x1f\x8b\x08)|(?P<bz2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\x00)|(?P<zst>\x28\xb5\x2f\xfd)", re.DOTALL
)
KEPT_MESSAGES = 20
WORK_SUFFIX = ".building"
# Errors that the unpackers raise on a damaged or truncated file.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
HASH_BYTES = 1 << 20
PIECE_BYTES = 1 << 13
SNIFFED_BYTES = 1 << 14
LONGEST_FIRST_LINE = 4 << 20  # an object over several lines has a shorter one
_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024
_ZSTD_WINDOW = 31  # log2 of the largest window, 2 GiB: what `zstd --ultra --long=31` writes


@dataclass
class ReadReport:
    """Counts and messages, filled while documents are read."""

    documents: int = 0
    losses: Losses = field(default_factory=Losses)
    duplicates: int = 0
    ignored_files: int = 0  # files in folders, and folders behind globs, that are not read
    ignored: list[str] = field(default_factory=list)  # the first of them, with the reason
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
    """A file as found at the start, or at an address. Standard input has path "-", no size and no time."""

    path: str
    kind: str  # of KINDS
    packing: str = ""  # of PACKINGS, or "" if not packed
    size: int = 0  # bytes
    mtime_ns: int = 0
    tag: str = ""  # of a file at an address, in place of a time; see `RemoteVersion`

    @classmethod
    def found_at(cls, path: str | Path, kind: str = "", version: RemoteVersion | None = None) -> InputFile:
        """Return the file at `path`, of the given kind, or of the kind that its name and its content say.

        Args:
            version: of a file at an address.

        Raises:
            DataError: it is a pointer of Git LFS.
        """
        named = Path(path)
        file = cls(str(path), kind or kind_of(named), packing_of(named))
        if version is not None:
            file = replace(file, size=version.bytes, tag=version.tag)
        else:
            refuse_pointer(named)
            status = named.stat()
            file = replace(file, size=status.st_size, mtime_ns=status.st_mtime_ns)
        if file.kind == ".json" and not kind and json_kind(path, file.packing) == ".jsonl":
            return replace(file, kind=".jsonl")
        return file

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    @property
    def on_disk(self) -> str:
        """The path by which the system knows the file, also one that is redirected to standard input."""
        return "/dev/stdin" if self.is_stdin else self.path

    def has_changed(self) -> bool:
        """Whether size or time differ from what they were. Raises OSError if the file is gone."""
        if self.is_stdin:
            return False
        if is_remote(self.path):
            return remote_version(self.path, _warn) != RemoteVersion(self.size, self.tag)
        status = Path(self.path).stat()
        return (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns)

    def check_unchanged(self) -> None:
        """Raise DataError if the file has changed since it was found."""
        try:
            is_changed = self.has_changed()
        except OSError as error:
            raise DataError(f"{self.path}: can no longer be read ({error.strerror}); start again") from error
        if is_changed:
            raise DataError(f"{self.path}: changed while it was being read; start again when it is complete")

    def open_raw(self) -> BinaryIO:
        return sys.stdin.buffer if self.is_stdin else open_input(self.path)

    def facts(self) -> dict[str, Any]:
        """Return its fields for a plan or a record; `tag` of a file at an address only."""
        return {name: value for name, value in asdict(self).items() if name != "tag" or value}


def open_input(path: str | Path) -> BinaryIO:
    """Open a file here or at an address; what an address cannot give raises DataError, never one of BROKEN."""
    return open_remote_file(str(path), _warn) if is_remote(str(path)) else Path(path).open("rb")


def _warn(line: str) -> None:
    logger.warning("%s", line)


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


def refuse_pointer(path: Path) -> None:
    """Raises DataError if the file is a pointer of Git LFS."""
    start = b""
    with contextlib.suppress(OSError):  # reported where it is read
        if path.stat().st_size <= _LARGEST_POINTER:
            with path.open("rb") as file:
                start = file.read(len(_POINTER))
    if start == _POINTER:
        raise DataError(f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull in its repository")


def json_kind(path: str | Path, packing: str = "") -> str:
    """Return how a file begins: ".jsonl" for an object or a string per line, ".json" for an array, "" for neither."""
    content = b""
    with contextlib.suppress(*BROKEN), open_input(path) as raw:  # reported where it is read
        stream = unpacked(raw, packing)
        while b"\n" not in content and len(content) < LONGEST_FIRST_LINE and (piece := stream.read(SNIFFED_BYTES)):
            content = (content + piece).removeprefix(codecs.BOM_UTF8).lstrip()
            if content[:1] not in (b"", b"{", b'"'):
                return ".json" if content[:1] == b"[" else ""
    line, newline, _ = content.partition(b"\n")
    if len(content) >= LONGEST_FIRST_LINE and not newline:
        return ".jsonl"
    ends = {b"{": b"}", b'"': b'"'}
    return ".jsonl" if len(line) > 1 and line.rstrip()[-1:] == ends[line[:1]] else ""


def is_sidecar(path: Path) -> bool:
    """Whether my.json describes the dataset my.idx, whole, damaged or unreadable, and is not text of the same name."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if b'"bin_sha256"' in file.read(SNIFFED_BYTES):
            return True
    return not json_kind(path)


def kind_of(path: Path) -> str:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in PACKINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def packing_of(path: Path) -> str:
    return path.suffix if path.suffix in PACKINGS else ""


def packing_of_content(raw: BinaryIO) -> str:
    """Return the packing that the next bytes begin, without reading them; "" for none."""
    found = _MAGIC.match(cast(io.BufferedReader, raw).peek(SNIFFED_BYTES))
    return f".{found.lastgroup}" if found else ""


def find_inputs(
    paths: Iterable[str | Path], report: ReadReport, stdin_kind: str = ".jsonl", input_kind: str = ""
) -> list[InputFile]:
    """Return the files that `paths` name, and standard input for "-".

    In a folder, files of known kinds are read, those behind links too. Other files, hidden files, the builder's own and
    links that lead nowhere are left out, and counted and named in `report`; a file that is named or matched by a glob
    is always read.

    Args:
        stdin_kind: the kind of standard input.
        input_kind: the kind of all other files, whatever their names; "": by their names, and for .json by what it
            holds, an array or lines.

    Raises:
        DataError: a missing path, a glob or folder without files, a folder without read permission, a file of unknown
            kind, or that is a pointer of Git LFS; standard input named twice, or as a table, which cannot be read from
            a stream.
    """
    found: list[InputFile] = []
    for given in paths:
        if str(given) == STDIN:
            if stdin_kind not in KINDS or stdin_kind == ".parquet":
                raise DataError(f"standard input cannot be read as {stdin_kind!r}; choose .jsonl, .json, .txt or .md")
            found.append(InputFile(STDIN, stdin_kind))
        elif is_remote(str(given)):
            found += _find_remote(str(given), report, input_kind)
        else:
            found += (InputFile.found_at(file, input_kind) for file in _find_files(str(given), report, input_kind))
    if sum(file.is_stdin for file in found) > 1:
        raise DataError("standard input (-) can be read only once; name it once")
    return found


def _find_files(given: str, report: ReadReport, input_kind: str) -> list[Path]:
    if not given:  # Path("") is the current folder
        raise DataError("an input has an empty name; give files, folders or globs")
    path, left_out = Path(given), list[str]()
    if path.is_dir():
        reasons = {file: _left_out_because(file, path, input_kind) for file in sorted(_walk(path))}
        found = [file for file, reason in reasons.items() if not reason]
        left_out = [f"{file}: {reason}" for file, reason in reasons.items() if reason]
    elif path.is_file():
        found = [path]
    else:
        matches = [Path(name) for name in sorted(glob.glob(given, recursive=True))]
        found = [match for match in matches if match.is_file()]
        if "**" not in given:  # which matches all folders on the way
            left_out = [f"{match}: a folder; name it as an input" for match in matches if match.is_dir()]
    _check_found(given, found, left_out, report, input_kind)
    return found


def _check_found(
    given: str, found: Sequence[str | Path], left_out: list[str], report: ReadReport, input_kind: str
) -> None:
    """Count what is left out, and refuse an input without files, or with one of unknown kind."""
    report.ignored_files += len(left_out)
    report.ignored += left_out[: KEPT_MESSAGES - len(report.ignored)]
    if not found:
        others = f" (left out: {'; '.join(left_out[:3])})" if left_out else ""
        raise DataError(f"{given}: no input file found{others}; give files, folders or globs of {_known_kinds()}")
    for file in found:
        if not input_kind and kind_of(Path(file)) not in KINDS:
            raise DataError(
                f"{file}: unknown file type; the known types are {_known_kinds()}; say what it holds if it is one of "
                "them by another name (--input-kind .jsonl)"
            )


def _find_remote(given: str, report: ReadReport, input_kind: str) -> list[InputFile]:
    """Return the files at an address: one file, a glob, or all of known kinds below a folder."""
    check_address(given, given)
    versions = list_remote(given, _warn)
    found, left_out = [], []
    for address in versions:
        inner = address.removeprefix(given.rstrip("/"))
        if address == given or has_glob(given) or input_kind or kind_of(Path(address)) in KINDS:
            found += [] if "/." in inner else [address]
        else:
            left_out.append(f"{address}: unknown file type")
    _check_found(given, found, left_out, report, input_kind)
    return [InputFile.found_at(address, input_kind, versions[address]) for address in found]


def sha256_of(path: str | Path, stop: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of a file; "" if `stop` returns True before the end."""
    digest = hashlib.sha256()
    with open_input(path) as file:
        while (block := file.read(HASH_BYTES)) and not stop():
            digest.update(block)
    return "" if block else digest.hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, and below folders elsewhere that links in it lead to; no folder twice."""
    root, linked, entered = folder.resolve(), [folder], set[Path]()
    for start in linked:  # grows meanwhile
        for place, folders, names in os.walk(start, onerror=_refuse_folder):
            if start is not folder:
                here = Path(place).resolve()
                if here in entered or here.is_relative_to(root):
                    folders.clear()
                    continue
                entered.add(here)
            yield from (Path(place, name) for name in names)
            linked += (path for name in sorted(folders) if (path := Path(place, name)).is_symlink())


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); change its permissions, or choose another input"
    )


def _left_out_because(file: Path, folder: Path, input_kind: str) -> str:
    """Return why a file of a folder is not read; "" if it is."""
    parts = file.relative_to(folder).parts
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if any(part.endswith(WORK_SUFFIX) for part in parts):
        return "of an unfinished build"
    if not input_kind and kind_of(file) not in KINDS:
        return "unknown file type"
    if not file.is_file():
        return "a link that leads nowhere" if file.is_symlink() else "not a regular file"
    described = file.with_suffix("")  # such as my.model, of a tokenizer's report my.model.json
    is_report = described.suffix == ".model" and described.exists()
    if file.suffix == ".json" and (is_report or (file.with_suffix(".idx").exists() and is_sidecar(file))):
        return "of a dataset or tokenizer"
    return ""


def _known_kinds() -> str:
    return f"{' '.join(KINDS)}, also compressed as {' '.join(PACKINGS)}"
