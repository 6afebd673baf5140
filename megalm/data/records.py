"""Bytes into records: where a stream may be cut, and the text of each record, with its line and its place.

A block is a run of whole records. Cutting and parsing are separate functions of each kind of file, so that one process
can cut a stream while others parse its blocks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple, cast

import orjson

BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
# A whole string, so that brackets inside it do not count; a bracket; or the start of a string that is not all there.
JSON_MARKS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\],]', re.DOTALL)
JOINED_BY = "\n\n"


class Record(NamedTuple):
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
class Format:
    """How to take one kind of file apart. `start` is where the given bytes lie in the file.

    Attributes:
        cut: how many of the first bytes are whole records, 0 if none is.
        first_end: where the first record ends, 0 if it does not.
        parse: the records of a block.
        count: what `Record.line` numbers, in a block.
        unfinished: what is wrong with a file that ends with these bytes, "" if they are a record like others.
        name: path and number of a record, for people.
    """

    cut: Callable[[bytearray, int], int]
    first_end: Callable[[bytearray], int]
    parse: Callable[[bytes, int, ReadOptions], Iterator[Record]]
    count: Callable[[bytes, int], int]
    unfinished: Callable[[bytes, int], str]
    name: Callable[[str, int], str]


class Block(NamedTuple):
    """Bytes of whole records, and where they start in the file; with `problem`, of a record that cannot be had.

    The rest of such a record follows with the problem `CONTINUED`: it is there only to be counted.
    """

    content: bytes
    start: int
    problem: str = ""


CONTINUED = "continued"


def blocks_of(stream: IO[bytes], layout: Format, largest: int, block_bytes: int, start: int = 0) -> Iterator[Block]:
    """The stream in blocks of about `block_bytes`; what it raises is raised after the whole records before.

    Args:
        largest: bytes of a record; a longer one is a problem, not an ever larger buffer.
        start: where the stream starts in its file.
    """
    buffer = bytearray()
    inside = ended = False  # inside a record that is longer than `largest`
    while not ended:
        piece, failure = _read(stream, block_bytes)
        buffer += piece
        ended = not piece or failure is not None
        if inside:
            size = layout.first_end(buffer) or len(buffer)
            inside = not layout.first_end(buffer)
            yield Block(bytes(buffer[:size]), start, CONTINUED)
            start += size
            del buffer[:size]
        size = layout.cut(buffer, start)
        if size:
            yield Block(bytes(buffer[:size]), start)
            start += size
            del buffer[:size]
        if len(buffer) > largest:
            yield Block(bytes(buffer), start, too_long(largest))
            start += len(buffer)
            buffer.clear()
            inside = True
    if failure is not None:
        raise failure
    # A file of nothing is a record where the file is one.
    if buffer.strip() or (start == 0 and layout in (WHOLE, ARRAY)):
        yield Block(bytes(buffer), start, layout.unfinished(bytes(buffer), start))


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


def _parse_json(raw: bytes, line: int, start: int, options: ReadOptions) -> Record:
    try:
        text, problem = text_of(orjson.loads(raw), options)
    except ValueError as error:
        text, problem = None, f"is not JSON ({error})"
    return Record(text, problem, line, start, len(raw))


def _decoded(raw: bytes, line: int, start: int) -> Record:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return Record(None, f"is not UTF-8 at byte {start + error.start:,}", line, start, len(raw))
    return Record(text or None, "" if text else "is an empty document", line, start, len(raw))


def _without_bom(content: bytes, start: int) -> tuple[bytes, int]:
    return (content[len(BOM) :], start + len(BOM)) if start == 0 and content.startswith(BOM) else (content, start)


def _last_line_end(buffer: bytearray, start: int) -> int:
    return buffer.rfind(b"\n") + 1


def _count_lines(content: bytes, start: int) -> int:
    return content.count(b"\n")


def _parse_lines(content: bytes, start: int, options: ReadOptions) -> Iterator[Record]:
    content, start = _without_bom(content, start)
    for line, raw in enumerate(content.split(b"\n")):
        if raw and not raw.isspace():
            yield _parse_json(raw, line, start, options)
        start += len(raw) + 1


def _last_blank_line(buffer: bytearray, start: int) -> int:
    ends = (buffer.rfind(mark) + len(mark) for mark in (b"\n\n", b"\n\r\n") if mark in buffer)
    return max(ends, default=0)


def _first_blank_line(buffer: bytearray) -> int:
    found = BLANK_LINES.search(buffer)
    return found.end() if found else 0


def _parse_parts(content: bytes, start: int, options: ReadOptions) -> Iterator[Record]:
    content, start = _without_bom(content, start)
    line = place = 0
    bounds = [(found.start(), found.end()) for found in BLANK_LINES.finditer(content)]
    for end, following in [*bounds, (len(content), len(content))]:
        part = content[place:end]
        if not part.isspace() and part:
            lead = len(part) - len(part.lstrip(b"\r\n"))
            text = part[lead:].rstrip(b"\r\n")
            yield _decoded(text, line + part[:lead].count(b"\n"), start + place + lead)
        line += content.count(b"\n", place, following)
        place = following


def _parse_whole(content: bytes, start: int, options: ReadOptions) -> Iterator[Record]:
    content, start = _without_bom(content, start)
    yield _decoded(content, 0, start)


def _elements(content: bytes | bytearray, start: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) of each element of a part of an array that starts with [ or a comma.

    Kinds: "whole", "cut" where the end is not there, "after" for all that follows the array.
    """
    depth, first = (0 if start == 0 else 1), -1
    for mark in JSON_MARKS.finditer(content):
        sign = mark.group()
        if sign == b'"':  # the string goes on behind the buffer
            break
        if depth == 1 and sign in (b",", b"]"):
            if first >= 0:
                yield first, mark.start(), "whole"
            first = mark.end()
        if sign in (b"{", b"["):
            depth += 1
            if depth == 1:
                first = mark.end()
        elif sign in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                yield mark.end(), len(content), "after"
                return
    if first >= 0:
        yield first, len(content), "cut"


def _last_element_end(buffer: bytearray, start: int) -> int:
    if not _is_array(buffer, start):
        return 0
    return max((end for _, end, kind in _elements(buffer, start) if kind != "cut"), default=0)


def _is_array(buffer: bytes | bytearray, start: int) -> bool:
    return start > 0 or _without_bom(bytes(buffer[:100]), 0)[0].lstrip()[:1] == b"["


def _parse_array(content: bytes, start: int, options: ReadOptions) -> Iterator[Record]:
    line = 0
    for first, end, kind in _elements(content, start):
        raw = content[first:end]
        place = start + first + len(raw) - len(raw.lstrip())
        if raw.strip() and kind == "after":
            yield Record(None, "is behind the end of the array", line, place, len(raw.strip()))
        elif raw.strip():
            yield _parse_json(raw.strip(), line, place, options)
            line += 1


def _count_elements(content: bytes, start: int) -> int:
    return sum(bool(content[first:end].strip()) for first, end, _ in _elements(content, start))


def _unfinished_array(content: bytes, start: int) -> str:
    if not _is_array(content, start):
        return "is not an array of objects or strings; name it .jsonl if it has an object a line"
    return "is not a whole array, it is damaged or cut short; what follows here is not read"


def _finished(content: bytes, start: int) -> str:
    return ""


def _never(buffer: bytearray, start: int = 0) -> int:
    return 0


def _line_name(path: str, number: int) -> str:
    return f"{path}:{number + 1}"


LINES = Format(_last_line_end, lambda buffer: buffer.find(b"\n") + 1, _parse_lines, _count_lines, _finished, _line_name)
PARTS = Format(_last_blank_line, _first_blank_line, _parse_parts, _count_lines, _finished, _line_name)
WHOLE = Format(_never, _never, _parse_whole, lambda content, start: 0, _finished, lambda path, number: path)
ARRAY = Format(
    _last_element_end, _never, _parse_array, _count_elements, _unfinished_array, lambda path, n: f"{path}[{n}]"
)


def format_of(kind: str, options: ReadOptions) -> Format:
    """How a file of `kind` is taken apart; tables are not (see `reader`)."""
    if kind == ".txt" and options.documents == "blank-line":
        return PARTS
    return {".jsonl": LINES, ".json": ARRAY, ".txt": WHOLE, ".md": WHOLE}[kind]
