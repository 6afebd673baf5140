"""The record layout of each kind of file: lines, parts between blank lines, complete files, JSON arrays."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import cast

import orjson

from megalm.data.readers.records import EMPTY, ReadOptions, RecordLayout, TextRecord, text_of

BOM = b"\xef\xbb\xbf"
ARRAY_OPTION = "--input-kind .json"
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
LEADING = re.compile(rb"(?:[ \t\r]*\n)*\r*")  # blank lines left over by a cut
# A complete string, so that brackets inside it do not count; a bracket; or the start of an incomplete string.
JSON_MARKS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\],]', re.DOTALL)


def _parse_json(raw: bytes, line: int, start: int, options: ReadOptions) -> TextRecord:
    try:
        text, problem = text_of(orjson.loads(raw), options)
    except ValueError as error:
        text, problem = _of_lenient_json(raw, options) or (None, f"is not JSON ({error})")
    return TextRecord(text, problem, line, start, len(raw))


def _of_lenient_json(raw: bytes, options: ReadOptions) -> tuple[str | None, str] | None:
    """Return `text_of` what Python writes as JSON, or None: NaN, Infinity or half a surrogate pair in another field."""
    try:
        text, problem = text_of(json.loads(raw.decode()), options)
        (text or "").encode()
    except (ValueError, RecursionError):
        return None
    return text, problem


def _decoded(raw: bytes, line: int, start: int) -> TextRecord:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return TextRecord(None, f"is not UTF-8 at byte {start + error.start:,}", line, start, len(raw))
    return TextRecord(text or None, "" if text else EMPTY, line, start, len(raw))


def _without_bom(content: bytes, start: int) -> tuple[bytes, int]:
    return (content[len(BOM) :], start + len(BOM)) if start == 0 and content.startswith(BOM) else (content, start)


def _parse_lines(content: bytes, start: int, options: ReadOptions) -> Iterator[TextRecord]:
    content, start = _without_bom(content, start)
    for line, raw in enumerate(content.split(b"\n")):
        if raw and not raw.isspace():
            record = _parse_json(raw, line, start, options)
            if record.problem and line == 0 and raw.lstrip()[:1] == b"[":
                record = record._replace(problem=f"{record.problem}; if the file is one array, say so ({ARRAY_OPTION})")
            yield record
        start += len(raw) + 1


def _last_blank_line(buffer: bytearray, start: int) -> int:
    return max((found.end() for found in BLANK_LINES.finditer(buffer)), default=0)


def _first_blank_line(buffer: bytearray) -> int:
    found = BLANK_LINES.search(buffer)
    return found.end() if found else 0


def _parse_parts(content: bytes, start: int, options: ReadOptions) -> Iterator[TextRecord]:
    content, start = _without_bom(content, start)
    line = place = 0
    bounds = [(found.start(), found.end()) for found in BLANK_LINES.finditer(content)]
    for end, following in [*bounds, (len(content), len(content))]:
        part = content[place:end]
        if not part.isspace() and part:
            lead = cast(re.Match[bytes], LEADING.match(part)).end()
            text = part[lead:].rstrip(b"\r\n")
            yield _decoded(text, line + part[:lead].count(b"\n"), start + place + lead)
        line += content.count(b"\n", place, following)
        place = following


def _parse_whole(content: bytes, start: int, options: ReadOptions) -> Iterator[TextRecord]:
    content, start = _without_bom(content, start)
    yield _decoded(content, 0, start)


def _elements(content: bytes | bytearray, start: int) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, kind) of each element in a part of an array that starts with [ or a comma.

    Kinds: "whole", "cut" if the end is missing, "after" for everything after the array.
    """
    depth, first = (0 if start == 0 else 1), -1
    for mark in JSON_MARKS.finditer(content):
        sign = mark.group()
        if sign == b'"':  # the string continues past the buffer
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


def _parse_array(content: bytes, start: int, options: ReadOptions) -> Iterator[TextRecord]:
    line = 0
    for first, end, kind in _elements(content, start):
        raw = content[first:end]
        place = start + first + len(raw) - len(raw.lstrip())
        if raw.strip() and kind == "after":
            size = len(raw.strip())
            yield TextRecord(None, "follows the end of the array", line, place, size, lost_bytes=size)
        elif raw.strip():
            yield _parse_json(raw.strip(), line, place, options)
            line += 1


def _count_elements(content: bytes, start: int) -> int:
    return sum(bool(content[first:end].strip()) for first, end, _ in _elements(content, start))


def _not_an_array(content: bytes | bytearray, start: int) -> str:
    if _is_array(content, start):
        return ""
    return (
        "holds neither an array of objects or strings nor one of them per line; write it so, or say what it holds "
        "(--input-kind .jsonl)"
    )


def _unfinished_array(content: bytes, start: int) -> str:
    return _not_an_array(content, start) or (
        "is an incomplete array; the file is damaged or cut short, and the rest is not read"
    )


LINES = RecordLayout(
    _parse_lines,
    cut=lambda buffer, start: buffer.rfind(b"\n") + 1,
    first_end=lambda buffer: buffer.find(b"\n") + 1,
)
PARTS = RecordLayout(_parse_parts, cut=_last_blank_line, first_end=_first_blank_line)
WHOLE = RecordLayout(_parse_whole, count=lambda content, start: 0, name=lambda path, number: path, whole_file=True)
ARRAY = RecordLayout(
    _parse_array,
    cut=_last_element_end,
    count=_count_elements,
    unfinished=_unfinished_array,
    name=lambda path, number: f"{path}[{number}]",
    mismatch=_not_an_array,
    whole_file=True,
    behind_too_long="; the rest of the array is not read",
)


def format_of(kind: str, options: ReadOptions) -> RecordLayout:
    """Return the record layout of a file of `kind`; tables have none (see document_reader)."""
    if kind == ".txt" and options.documents == "blank-line":
        return PARTS
    return {".jsonl": LINES, ".json": ARRAY, ".txt": WHOLE, ".md": WHOLE}[kind]
