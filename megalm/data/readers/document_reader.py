"""Read records from a file, a span of it, or bytes cut by another process, and documents from many files.

Text files are .jsonl, .json, .txt, .md and .parquet, also packed as .gz, .zst, .bz2 or .xz. Damage is a record too.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megalm.data.readers.formats import format_of
from megalm.data.readers.input_files import (
    BROKEN,
    InputFile,
    PackedBytes,
    ReadReport,
    find_inputs,
    packing_of_content,
    unpacked,
)
from megalm.data.readers.records import (
    BLOCK_BYTES,
    CONTINUED,
    TOOLS,
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
    """Number of lines that `read_span` has read (see `TextRecord.line`), and bytes of the file as it is on disk."""

    lines: int = 0
    disk_bytes: int = 0


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
    if block is None:
        count.disk_bytes = (span.file.size if span.end is None else span.end) - span.start
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
        packed = PackedBytes(raw)

        def lost_bytes() -> int:
            if not place:  # nothing was read
                return span.file.size
            return max(0, span.file.size - (packed.used if span.file.packing else place))

        try:
            if place:
                raw.seek(place)
            elif not span.file.packing and (packing := packing_of_content(raw)):
                yield ByteBlock(b"", 0, f"is compressed; give it the ending {packing}", lost_bytes())
                return
            stream = unpacked(packed, span.file.packing) if span.file.packing else raw
            for block in blocks_of(stream, layout, options.largest_bytes, block_bytes, span.start, span.end):
                if layout.ends_at_problems and block.problem and block.problem != CONTINUED:
                    yield block._replace(lost_bytes=lost_bytes())
                else:
                    yield block
                place = block.start + len(block.content)
        except BROKEN as error:
            yield ByteBlock(b"", place, damage(error, span.file), lost_bytes())


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
    elif block.problem != CONTINUED or not layout.ends_at_problems:
        size = len(block.content)
        batch.append(TextRecord(None, block.problem, count.lines, block.start, size, block.lost_bytes))
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
        with file.open_raw() as raw:
            return int(pyarrow.parquet.ParquetFile(raw).metadata.num_row_groups)
    except (pyarrow.ArrowException, OSError):
        return 0


def _read_table(span: Span, options: ReadOptions, count: SpanCount) -> Iterator[list[TextRecord]]:
    import pyarrow
    import pyarrow.parquet

    span.file.check_unchanged()
    count.disk_bytes = span.file.size  # of a table that cannot be opened, which is one span
    rows = 0
    try:
        with _table_file(span.file) as raw:
            table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK_BYTES)
            groups = list(range(table.metadata.num_row_groups))[span.start : span.end]
            rows = sum(table.metadata.row_group(group).num_rows for group in groups)
            count.disk_bytes = span.file.size * rows // max(1, table.metadata.num_rows)
            names = table.schema_arrow.names
            missing = [key for key in options.keys if key not in names]
            if missing:
                problem = (
                    f"has no column {missing[0]!r} (its columns: {', '.join(names)}; {options.key_option} chooses one)"
                )
                yield [TextRecord(None, problem, 0, 0, 0, count.disk_bytes)]
                return
            columns = [*(options.keys or names), *({TOOLS} & set(names) if options.messages_key else ())]
            for batch in table.iter_batches(TABLE_ROWS, row_groups=groups, columns=columns):
                yield [
                    TextRecord(*_row_text(row, options), count.lines + place, 0, 0)
                    for place, row in enumerate(batch.to_pylist())
                ]
                count.lines += batch.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError, *BROKEN) as error:
        damage(error, span.file)
        said = (str(error).splitlines() or [type(error).__name__])[0]
        lost_bytes = count.disk_bytes * (rows - count.lines) // rows if rows else count.disk_bytes
        problem = f"is not a readable parquet table from here on ({said})"
        yield [TextRecord(None, problem, count.lines, 0, 0, lost_bytes)]


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

        with span.file.open_raw() as raw:
            metadata = pyarrow.parquet.ParquetFile(raw).metadata
        return sum(metadata.row_group(group).num_rows for group in range(span.start))
    with span.file.open_raw() as file:
        lines, left = 0, span.start
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
        return lines


# Documents from many files

OnError = Literal["fail", "skip"]


class Document(NamedTuple):
    """A text and its source: "file:line" or "file"."""

    text: str
    source: str


@dataclass(frozen=True)
class LossPolicy:
    """What to do where a document cannot be read or is empty.

    Attributes:
        on_error: "fail" at what is unreadable; "skip" leaves it out and counts it.
        empty_documents: "fail" or "skip", likewise.
        max_loss: the largest share that "skip" may leave out, see `Losses.check`; None: the usual one.
    """

    on_error: OnError = "fail"
    empty_documents: OnError = "skip"
    max_loss: float | None = None

    def check(self, record: TextRecord, name: Callable[[], str]) -> None:
        """Raises DataError for a record, named by `name`, that is not to be skipped."""
        if (record.is_empty and self.empty_documents == "fail") or (record.is_loss and self.on_error == "fail"):
            option = "--empty-documents" if record.is_empty else "--on-error"
            rest = "the rest of such files" if record.lost_bytes is not None else "such documents"
            raise DataError(f"{name()}: {record.problem}; correct it, or skip {rest} ({option} skip)")


def iter_documents(
    paths: Iterable[str | Path],
    on_error: OnError = "fail",
    report: ReadReport | None = None,
    options: ReadOptions | None = None,
    stdin_kind: str = ".jsonl",
) -> Iterator[Document]:
    """Read documents from files, folders (all files below, sorted), globs and standard input ("-"), in the given order.

    A .txt or .md file is one document; .jsonl holds one object or string per line; .json an array of them, or lines.

    Args:
        on_error: "skip" skips what is unreadable, of whatever share, and counts it in `report`.

    Raises:
        DataError: with file and line, at the first unreadable record; and, whatever `on_error`, for a path that
            matches nothing.
    """
    report = report or ReadReport()
    policy = LossPolicy(on_error, max_loss=1.0)
    yield from read_documents(find_inputs(paths, report, stdin_kind), policy, report, options)


def read_documents(
    files: Iterable[InputFile], policy: LossPolicy, report: ReadReport, options: ReadOptions | None = None
) -> Iterator[Document]:
    """Read documents from files that `find_inputs` returned, and count them in `report`.

    Raises:
        DataError: with file and line, at the first record that `policy` does not skip; at the end, more is lost than
            it allows.
    """
    options, losses = options or ReadOptions(), report.losses
    for file in files:
        count, is_lost = SpanCount(), False
        for records in read_span(Span(file), options, count):
            for record in records:
                losses.count(record)
                name = record_name(file, options, record.line)
                if record.text is not None:
                    report.documents += 1
                    yield Document(record.text, name)
                    continue
                policy.check(record, lambda: name)  # noqa: B023  called at once
                is_lost |= record.lost_bytes is not None
                if record.is_loss:
                    report.note(f"{name}: {record.problem}")
        losses.input_bytes += count.disk_bytes
        losses.lost_files += is_lost
    losses.check(policy.max_loss, "the input", report.messages)
