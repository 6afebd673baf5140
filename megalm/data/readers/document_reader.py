"""Read records from a file, a span of it, or bytes cut by another process, and documents from many files.

Text files are .jsonl, .json, .txt, .md and .parquet, also packed as .gz, .zst, .bz2 or .xz. Damage is a record too.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megalm.data.readers.formats import format_of
from megalm.data.readers.input_files import BROKEN, InputFile, ReadReport, find_inputs, unpacked
from megalm.data.readers.records import (
    BLOCK_BYTES,
    CONTINUED,
    ByteBlock,
    ReadOptions,
    TextRecord,
    blocks_of,
    text_of,
    too_long,
)
from megalm.errors import DataError

TABLE = ".parquet"
TABLE_ROWS = 256  # per batch: a row can be a complete book


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of an unpacked file, or row groups of a table; end None means the end of the file.

    A span starts and ends between records.
    """

    file: InputFile
    start: int = 0
    end: int | None = None


@dataclass
class SpanCount:
    """Number of lines that `read_span` has read (see `TextRecord.line`)."""

    lines: int = 0


def read_span(
    span: Span, options: ReadOptions, count: SpanCount, block: ByteBlock | None = None
) -> Iterator[list[TextRecord]]:
    """Read the span's records, in lists of about a megabyte; `line` counts from 0 at the span's start.

    Args:
        block: the span's bytes, if they were already cut from a stream.

    Raises:
        DataError: the file is missing, cannot be read, or has changed since it was found.
    """
    if block is None and span.file.kind == TABLE:
        yield from _read_table(span, options, count)
        return
    for part in read_blocks(span, options, BLOCK_BYTES) if block is None else (block,):
        yield from _read_block(span, options, count, part)


def read_blocks(span: Span, options: ReadOptions, block_bytes: int) -> Iterator[ByteBlock]:
    """Read the span (not of a table) in blocks of about `block_bytes`; damage ends it with an empty problem block.

    Raises:
        DataError: see `read_span`.
    """
    span.file.check_unchanged()
    layout, place = format_of(span.file.kind, options), span.start
    with span.file.open_raw() as raw:
        try:
            if place:
                raw.seek(place)
            stream = unpacked(raw, span.file.packing)
            for block in blocks_of(stream, layout, options.largest_bytes, block_bytes, span.start, span.end):
                yield block
                place = block.start + len(block.content)
        except BROKEN as error:
            yield ByteBlock(b"", place, damage(error, span.file))


def damage(error: BaseException, file: InputFile) -> str:
    """Return the message for one of the BROKEN errors.

    Raises:
        DataError: the machine failed to read, not the file's content: a retry can succeed.
    """
    # A damaged table that points outside itself gives EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise DataError(f"{file.path}: cannot be read ({error.strerror}); correct that, and start again") from error
    return f"is unreadable from here on ({error}); the file is damaged or cut short"


def _read_block(span: Span, options: ReadOptions, count: SpanCount, block: ByteBlock) -> Iterator[list[TextRecord]]:
    layout, batch, size = format_of(span.file.kind, options), [], 0
    if not block.problem:
        for record in layout.parse(block.content, block.start, options):
            if record.size > options.largest_bytes:
                record = record._replace(text=None, problem=too_long(options.largest_bytes))  # noqa: PLW2901
            batch.append(record._replace(line=count.lines + record.line))
            size += record.size
            if size >= BLOCK_BYTES:
                yield batch
                batch, size = [], 0
    elif block.problem != CONTINUED:
        batch.append(TextRecord(None, block.problem, count.lines, block.start, len(block.content)))
    if batch:
        yield batch
    count.lines += layout.count(block.content, block.start)


def record_name(file: InputFile, options: ReadOptions, line: int) -> str:
    """Return a record's display name: "file:line", "array[element]", "table:row", or "file" for a single document."""
    if file.kind == TABLE:
        return f"{file.path}:{line}"
    return format_of(file.kind, options).name(file.path, line)


def row_groups(file: InputFile) -> int:
    """Return a table's number of row groups; 0 if it cannot be read (reading its rows then reports why)."""
    import pyarrow.parquet

    if file.packing:
        return 0
    try:
        return int(pyarrow.parquet.ParquetFile(file.path).metadata.num_row_groups)
    except (pyarrow.ArrowException, OSError):
        return 0


def _read_table(span: Span, options: ReadOptions, count: SpanCount) -> Iterator[list[TextRecord]]:
    import pyarrow
    import pyarrow.parquet

    span.file.check_unchanged()
    try:
        with _table_file(span.file) as raw:
            table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK_BYTES)
            names = table.schema_arrow.names
            missing = [key for key in options.keys if key not in names]
            if missing:
                problem = f"has no column {missing[0]!r} (its columns: {', '.join(names)})"
                yield [TextRecord(None, problem, 0, 0, 0)]
                return
            groups = list(range(table.metadata.num_row_groups))[span.start : span.end]
            for batch in table.iter_batches(TABLE_ROWS, row_groups=groups, columns=list(options.keys)):
                yield [
                    TextRecord(*_row_text(row, options), count.lines + place, 0, 0)
                    for place, row in enumerate(batch.to_pylist())
                ]
                count.lines += batch.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError, *BROKEN) as error:
        damage(error, span.file)
        said = (str(error).splitlines() or [type(error).__name__])[0]
        yield [TextRecord(None, f"is not a readable parquet table from here on ({said})", count.lines, 0, 0)]


def _row_text(row: dict[str, Any], options: ReadOptions) -> tuple[str | None, str]:
    text, problem = text_of(row, options)
    largest = options.largest_bytes
    if text is not None and len(text) * 4 > largest and len(text.encode()) > largest:
        return None, too_long(largest)
    return text, problem


def _table_file(file: InputFile) -> IO[bytes]:
    """Open a table. Its footer is at the end, so a packed table is first unpacked to an unnamed file on disk."""
    raw = file.open_raw()
    if not file.packing:
        return raw
    with raw:
        spooled = tempfile.TemporaryFile()  # noqa: SIM115  given to the caller
        try:
            shutil.copyfileobj(unpacked(raw, file.packing), spooled, BLOCK_BYTES)
        except BaseException:
            spooled.close()
            raise
    spooled.seek(0)
    return spooled


def lines_before(span: Span) -> int:
    """Return the number of lines, or table rows, before the span in its file; reads everything before it."""
    if not span.start:
        return 0
    if span.file.kind == TABLE:
        import pyarrow.parquet

        metadata = pyarrow.parquet.ParquetFile(span.file.path).metadata
        return sum(metadata.row_group(group).num_rows for group in range(span.start))
    with span.file.open_raw() as file:
        lines, left = 0, span.start
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
        return lines


# Documents from many files

__all__ = ["Document", "OnError", "ReadReport", "iter_documents"]

OnError = Literal["fail", "skip"]


class Document(NamedTuple):
    """A text and its source: "file:line" or "file"."""

    text: str
    source: str


def iter_documents(
    paths: Iterable[str | Path],
    on_error: OnError = "fail",
    report: ReadReport | None = None,
    options: ReadOptions | None = None,
    stdin_kind: str = ".jsonl",
) -> Iterator[Document]:
    """Read documents from files, folders (all files below, sorted), globs and standard input ("-"), in the given order.

    A .txt or .md file is one document; .jsonl holds one object or string per line; .json an array of them.

    Args:
        on_error: "skip" skips unreadable records and empty documents, and counts them in `report`; the rest of a
            truncated file counts as one.

    Raises:
        DataError: with file and line, at the first unreadable record; and, whatever `on_error`, for a path that
            matches nothing.
    """
    report = report or ReadReport()
    yield from read_documents(find_inputs(paths, report, stdin_kind), on_error, report, options)


def read_documents(
    files: Iterable[InputFile],
    on_error: OnError = "fail",
    report: ReadReport | None = None,
    options: ReadOptions | None = None,
) -> Iterator[Document]:
    """Read documents from files that `find_inputs` returned; see `iter_documents`."""
    report, options = report or ReadReport(), options or ReadOptions()
    for file in files:
        for records in read_span(Span(file), options, SpanCount()):
            for record in records:
                name = record_name(file, options, record.line)
                if record.text is not None:
                    report.documents += 1
                    yield Document(record.text, name)
                elif on_error == "fail":
                    raise DataError(f"{name}: {record.problem}; correct it, or skip such documents (--on-error skip)")
                else:
                    report.skip(f"{name}: {record.problem}")
