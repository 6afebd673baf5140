"""Records of a file, of a part of it, or of bytes that another process cut from it; damage is a record too."""

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
TABLE_ROWS = 256  # at once: rows may be whole books


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of an unpacked file, or row groups of a table; end None is its end.

    A span starts and ends between records.
    """

    file: InputFile
    start: int = 0
    end: int | None = None


@dataclass
class SpanCount:
    """What `read_span` went through, in lines (see `Record.line`)."""

    lines: int = 0


def read_span(
    span: Span, options: ReadOptions, count: SpanCount, block: ByteBlock | None = None
) -> Iterator[list[TextRecord]]:
    """Records of the span, in lists of about a megabyte; `line` counts from 0 at the span's start.

    Args:
        block: the span's bytes, where they were cut from a stream already.

    Raises:
        DataError: the file is not there any more, cannot be read, or is not the one that was found.
    """
    if block is None and span.file.kind == TABLE:
        yield from _read_table(span, options, count)
        return
    for part in read_blocks(span, options, BLOCK_BYTES) if block is None else (block,):
        yield from _read_block(span, options, count, part)


def read_blocks(span: Span, options: ReadOptions, block_bytes: int) -> Iterator[ByteBlock]:
    """The span, not of a table, in blocks of about `block_bytes`; at damage the last one has no bytes and says so.

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
    """What people read of one of BROKEN.

    Raises:
        DataError: the machine could not read, whatever is in the file: on another day it could.
    """
    # EINVAL is what a damaged table that points outside of itself gives.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise DataError(f"{file.path}: cannot be read ({error.strerror}); mend that, and start again") from error
    return f"cannot be read on from here ({error}), the file is damaged or cut short"


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
    """For people: "file:line", "array[element]", "table:row", or "file" where it is one document."""
    if file.kind == TABLE:
        return f"{file.path}:{line}"
    return format_of(file.kind, options).name(file.path, line)


def row_groups(file: InputFile) -> int:
    """How many row groups a table has; 0 where it cannot be read (reading it then says why)."""
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
    """A table is read from its end: a packed one is unpacked to a nameless file on disk first."""
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
    """How many lines, or rows of a table, lie before the span in its file; reads all of that."""
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


# Documents out of text files: .jsonl, .json, .txt, .md, .parquet, and each of these packed as .gz .zst .bz2 .xz.

__all__ = ["Document", "OnError", "ReadReport", "iter_documents"]

OnError = Literal["fail", "skip"]


class Document(NamedTuple):
    """A text, and where it came from: "file:line" or "file"."""

    text: str
    source: str


def iter_documents(
    paths: Iterable[str | Path],
    text_key: str = "text",
    on_error: OnError = "fail",
    report: ReadReport | None = None,
    options: ReadOptions | None = None,
    stdin_kind: str = ".jsonl",
) -> Iterator[Document]:
    """Documents of files, folders (all files below, sorted), globs and standard input ("-"), in the order given.

    A .txt or .md file is one document; .jsonl holds one object or string a line; .json an array of them; of an
    object, and of a parquet table, `text_key` is the text. `options` states all this more finely, in its place.

    Args:
        on_error: "skip" leaves out what cannot be read, and empty documents, and counts them in `report`; where a
            file breaks off, its rest is one such thing.

    Raises:
        DataError: with file and line, at the first thing that cannot be read; and, whatever `on_error`, for
            a path that matches nothing.
    """
    report = ReadReport() if report is None else report
    options = options or ReadOptions(text_key=text_key)
    for file in find_inputs(paths, report, stdin_kind):
        for records in read_span(Span(file), options, SpanCount()):
            for record in records:
                name = record_name(file, options, record.line)
                if record.text is not None:
                    report.documents += 1
                    yield Document(record.text, name)
                elif on_error == "fail":
                    raise DataError(f"{name}: {record.problem}; mend it, or leave such documents out (--on-error skip)")
                else:
                    report.skip(f"{name}: {record.problem}")
