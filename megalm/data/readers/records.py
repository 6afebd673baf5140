"""Records and blocks: a stream cut into runs of whole records, however each kind of file is taken apart (layouts.py).

Cutting and parsing are separate functions of each layout, so that one process can cut a stream while others parse its
blocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple, cast

BLOCK_BYTES = 1 << 20
JOINED_BY = "\n\n"


class TextRecord(NamedTuple):
    """A text, or (text None) why there is none.

    `line` counts from 0 in what was read: lines, elements of an array, or rows of a table. `start` and `size` are
    bytes of the unpacked file (of a table: 0).
    """

    text: str | None
    problem: str
    line: int
    start: int
    size: int


@dataclass(frozen=True)
class ReadOptions:
    """What of a file is a document.

    Attributes:
        text_key: of a JSON object, or the column of a table.
        columns: where stated, these keys or columns instead, joined by a blank line.
        documents: of a .txt file: the whole "file", or each part between blank lines ("blank-line").
        largest_bytes: longer documents are refused, because each is held in memory as a whole.
    """

    text_key: str = "text"
    columns: tuple[str, ...] = ()
    documents: str = "file"
    largest_bytes: int = 32 << 20

    @property
    def keys(self) -> tuple[str, ...]:
        return self.columns or (self.text_key,)


@dataclass(frozen=True)
class RecordLayout:
    """How to take one kind of file apart. `start` is where the given bytes lie in the file.

    Attributes:
        cut: how many of the first bytes are whole records, 0 if none is.
        first_end: where the first record ends, 0 if it does not.
        parse: the records of a block.
        count: what `Record.line` numbers, in a block.
        unfinished: what is wrong with a file that ends with these bytes, "" if they are a record like others.
        name: path and number of a record, for people.
        whole_file: the file is one record, or one thing that holds all: a file of nothing is one, too.
        behind_too_long: said of a record that is too long where nothing behind it can be read.
    """

    cut: Callable[[bytearray, int], int]
    first_end: Callable[[bytearray], int]
    parse: Callable[[bytes, int, ReadOptions], Iterator[TextRecord]]
    count: Callable[[bytes, int], int]
    unfinished: Callable[[bytes, int], str]
    name: Callable[[str, int], str]
    whole_file: bool = False
    behind_too_long: str = ""


class ByteBlock(NamedTuple):
    """Bytes of whole records, and where they start in the file; with `problem`, of a record that cannot be had.

    The rest of such a record follows with the problem `CONTINUED`: it is there only to be counted.
    """

    content: bytes
    start: int
    problem: str = ""


CONTINUED = "continued"


def blocks_of(
    stream: IO[bytes], layout: RecordLayout, largest: int, block_bytes: int, start: int = 0, stop: int | None = None
) -> Iterator[ByteBlock]:
    """The stream in blocks of about `block_bytes`; what it raises is raised after the whole records before.

    Args:
        largest: bytes of a record; a longer one is a problem, not an ever larger buffer.
        start: where the stream starts in its file.
        stop: where in the file to stop reading; None: at its end.
    """
    buffer = bytearray()
    inside = ended = False  # inside a record that is longer than `largest`
    while not ended:
        left = block_bytes if stop is None else min(block_bytes, stop - start - len(buffer))
        piece, failure = _read(stream, left)
        buffer += piece
        ended = not piece or failure is not None
        if inside:
            end = layout.first_end(buffer)
            inside, size = not end, end or without_end(buffer)
            yield ByteBlock(bytes(buffer[:size]), start, CONTINUED)
            start += size
            del buffer[:size]
        size = layout.cut(buffer, start)
        if size:
            yield ByteBlock(bytes(buffer[:size]), start)
            start += size
            del buffer[:size]
        if len(buffer) > largest:
            size = without_end(buffer) or len(buffer)
            yield ByteBlock(bytes(buffer[:size]), start, too_long(largest) + layout.behind_too_long)
            start += size
            del buffer[:size]
            inside = True
    if failure is not None:
        raise failure
    # A file of nothing is a record where the file is one.
    if buffer.strip() or (start == 0 and layout.whole_file):
        yield ByteBlock(bytes(buffer), start, layout.unfinished(bytes(buffer), start))


def _read(stream: IO[bytes], size: int) -> tuple[bytes, Exception | None]:
    """As many bytes, or those before the end or before what the stream raises, and that.

    One call of `read` would lose what an unpacker had given before it came to the damage.
    """
    pieces: list[bytes] = []
    try:
        while size > 0 and (piece := cast(io.BufferedIOBase, stream).read1(size)):
            pieces.append(piece)
            size -= len(piece)
    except Exception as error:  # given on: the caller knows which ones mean damage
        return b"".join(pieces), error
    return b"".join(pieces), None


def without_end(buffer: bytearray) -> int:
    """How many bytes of a buffer in which no record ends may go: an end may begin here and go over into the next."""
    newline = buffer.rfind(b"\n")
    return newline if newline >= 0 and not buffer[newline:].strip() else len(buffer)


def too_long(largest: int) -> str:
    return f"is longer than {largest:,} bytes; cut it, or allow more (--max-document-mb)"


def text_of(value: object, options: ReadOptions) -> tuple[str | None, str]:
    """(text, "") of a JSON value or a table's row, or (None, what is wrong)."""
    if isinstance(value, str):
        return (value, "") if value else (None, "is an empty document")
    if not isinstance(value, dict):
        return None, f"is {type(value).__name__}, not an object with {options.keys[0]!r}"
    texts = []
    for key in options.keys:
        if key not in value:
            keys = ", ".join(map(repr, list(value)[:8])) or "none"
            return None, f"has no {key!r} (its keys: {keys})"
        if not isinstance(value[key], str):
            return None, f"{key!r} is {type(value[key]).__name__}, not text"
        texts.append(value[key])
    text = JOINED_BY.join(texts) if len(texts) > 1 else texts[0]
    return (text, "") if any(texts) else (None, "is an empty document")
