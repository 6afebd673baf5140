"""Records, record layouts and byte blocks: a stream is cut into blocks of complete records.

Each layout (see formats.py) cuts and parses in separate functions, so that one process can cut a stream while others
parse its blocks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple, cast

BLOCK_BYTES = 1 << 20
EMPTY = "is an empty document"
CONTINUED = "continued"
JOINED_BY = "\n\n"
TOOLS = "tools"  # beside messages: the functions that they can call, for the template


class TextRecord(NamedTuple):
    """A text, or, with text None, the problem that prevents it.

    `line` counts lines, array elements or table rows from 0, from where reading began. `start` and `size` are bytes of
    the unpacked file (0 in a table). `lost_bytes`: the file cannot be read from here on, and this is how much of it, as
    it is on disk, is lost; None: other records follow.
    """

    text: str | None
    problem: str
    line: int
    start: int
    size: int
    lost_bytes: int | None = None

    @property
    def is_empty(self) -> bool:
        return self.problem == EMPTY

    @property
    def is_loss(self) -> bool:
        """Whether a document, or the rest of the file, is unreadable; it is so once for each of them."""
        return self.problem not in ("", EMPTY, CONTINUED)


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read from files.

    Attributes:
        text_key: key in a JSON object, or column of a table.
        columns: if given, these keys or columns instead, joined by a blank line.
        messages_key: if given, this key or column instead, a list of chat messages; the text is then a JSON object of
            `messages` and `tools`, which `ChatTemplate.render` takes.
        documents: what a document of a .txt file is: the "file", or each part between blank lines ("blank-line").
        largest_bytes: longer documents are refused, because each is held in memory as one piece.
        kind: what all files hold, whatever their names; "": what the names say (see `find_inputs`).
        every_text: the text is a JSON array of all texts in the `columns`, or in all keys or columns if none are given.
    """

    text_key: str = "text"
    columns: tuple[str, ...] = ()
    documents: str = "file"
    largest_bytes: int = 32 << 20
    kind: str = ""
    messages_key: str = ""
    every_text: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        if self.every_text:
            return self.columns
        return (self.messages_key,) if self.messages_key else self.columns or (self.text_key,)

    @property
    def key_option(self) -> str:
        """The option that chooses `keys`."""
        return "--overlap-key" if self.every_text else "--messages-key" if self.messages_key else "--text-key"


@dataclass(frozen=True)
class RecordLayout:
    """How to split one kind of file into records. Functions that take a `start` get the bytes' offset in the file.

    Attributes:
        parse: returns the records of a block.
        cut: number of leading bytes that are complete records, 0 if there are none.
        first_end: end of the first record, 0 if it does not end in the buffer.
        count: number of units of `TextRecord.line` in a block; default: of lines.
        unfinished: the problem of a file that ends with these bytes, "" if they are a valid record.
        name: display name of a record, from its path and number.
        mismatch: the problem of a file whose content is of another layout; "" if it is not.
        whole_file: the file is one record or one container of records, so an empty file counts as a record too.
        behind_too_long: appended to the message about an oversized record if nothing after it can be read.
    """

    parse: Callable[[bytes, int, ReadOptions], Iterator[TextRecord]]
    cut: Callable[[bytearray, int], int] = lambda buffer, start: 0
    first_end: Callable[[bytearray], int] = lambda buffer: 0
    count: Callable[[bytes, int], int] = lambda content, start: content.count(b"\n")
    unfinished: Callable[[bytes, int], str] = lambda content, start: ""
    name: Callable[[str, int], str] = lambda path, number: f"{path}:{number + 1}"
    mismatch: Callable[[bytearray, int], str] = lambda buffer, start: ""
    whole_file: bool = False
    behind_too_long: str = ""

    @property
    def ends_at_problems(self) -> bool:
        """Whether nothing can be read after a block that is not complete records."""
        return bool(self.behind_too_long)


class ByteBlock(NamedTuple):
    """Bytes of complete records, and their offset in the file; with `problem`, bytes of an unreadable record.

    The rest of such a record follows in blocks with the problem `CONTINUED`, which are only counted.
    """

    content: bytes
    start: int
    problem: str = ""
    lost_bytes: int | None = None  # as in TextRecord


def blocks_of(
    stream: IO[bytes], layout: RecordLayout, largest: int, block_bytes: int, start: int = 0, stop: int | None = None
) -> Iterator[ByteBlock]:
    """Cut the stream into blocks of about `block_bytes`; an error of the stream is raised after the records before it.

    Args:
        largest: maximum bytes of a record; a longer one becomes a problem block, so the buffer stays bounded.
        start: offset of the stream in its file.
        stop: file offset at which to stop reading; None for the end.
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
            problem = layout.mismatch(buffer, start) or too_long(largest) + layout.behind_too_long
            yield ByteBlock(bytes(buffer[:size]), start, problem)
            start += size
            del buffer[:size]
            inside = True
    if failure is not None:
        raise failure
    # An empty file is a record if the layout has one record per file.
    if buffer.strip() or (start == 0 and layout.whole_file):
        yield ByteBlock(bytes(buffer), start, layout.unfinished(bytes(buffer), start))


def _read(stream: IO[bytes], size: int) -> tuple[bytes, Exception | None]:
    """Read up to `size` bytes; return those before the end or before an error, and the error.

    A single call of `read` would lose the bytes unpacked before the damage.
    """
    pieces: list[bytes] = []
    try:
        while size > 0 and (piece := cast(io.BufferedIOBase, stream).read1(size)):
            pieces.append(piece)
            size -= len(piece)
    except Exception as error:  # returned: the caller knows which errors mean damage
        return b"".join(pieces), error
    return b"".join(pieces), None


def without_end(buffer: bytearray) -> int:
    """Return how many bytes to drop from a buffer without a record end; keeps the start of an end that may follow."""
    newline = buffer.rfind(b"\n")
    return newline if newline >= 0 and not buffer[newline:].strip() else len(buffer)


def too_long(largest: int) -> str:
    return f"is longer than {largest:,} bytes; split it, or raise the limit (--max-document-mb)"


def text_of(value: object, options: ReadOptions) -> tuple[str | None, str]:
    """Return (text, "") of a JSON value or a table row, or (None, problem). A key whose value is null has no text."""
    if options.messages_key or options.every_text:
        return _every_text(value, options) if options.every_text else _conversation(value, options)
    if isinstance(value, str):
        return (value, "") if value else (None, EMPTY)
    if not isinstance(value, dict):
        return None, f"is {type(value).__name__}, not an object with {options.keys[0]!r}"
    texts = []
    for key in options.keys:
        if key not in value:
            return _without(value, key, options)
        if value[key] is None:  # as tables and exports of tables mark what is missing
            continue
        if not isinstance(value[key], str):
            return None, f"{key!r} is {type(value[key]).__name__}, not text"
        texts.append(value[key])
    return (JOINED_BY.join(texts), "") if any(texts) else (None, EMPTY)


def _without(value: object, key: str, options: ReadOptions) -> tuple[None, str]:
    keys = ", ".join(map(repr, list(value)[:8])) or "none" if isinstance(value, dict) else type(value).__name__
    return None, f"has no {key!r} (its keys: {keys}; {options.key_option} chooses one)"


def _conversation(value: object, options: ReadOptions) -> tuple[str | None, str]:
    """Return the messages and tools of a JSON value or a table row, as `text_of` does."""
    key = options.messages_key
    if not isinstance(value, dict) or key not in value:
        return _without(value, key, options)
    messages, tools = value[key], value.get(TOOLS)
    if isinstance(messages, list) and not messages:
        return None, EMPTY
    wrong = not isinstance(messages, list) or any(
        not isinstance(message, dict) or not isinstance(message.get("role"), str) for message in messages
    )
    if wrong:
        return None, f"{key!r} is not a list of messages, objects with a 'role'"
    return json.dumps({"messages": messages, "tools": tools or None}, ensure_ascii=False), ""


def _every_text(value: object, options: ReadOptions) -> tuple[str | None, str]:
    """Return the strings in a JSON value or a table row, also in lists and objects in it, as `text_of` does."""
    if isinstance(value, dict) and options.columns:
        if missing := [key for key in options.columns if key not in value]:
            return _without(value, missing[0], options)
        value = [value[key] for key in options.columns]
    return json.dumps(list(_strings(value))), ""


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
