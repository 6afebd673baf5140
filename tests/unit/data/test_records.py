"""Cutting streams: wherever a block ends, the records, their lines and their places are the same."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.readers.formats import format_of
from megalm.data.readers.records import CONTINUED, ReadOptions, blocks_of
from tests.messages import assert_names

PARTS = ReadOptions(documents="blank-line")
texts = st.lists(st.text(alphabet='ab"\\[]{},: \né😀', min_size=1, max_size=30), max_size=8)
sizes = st.integers(1, 60)


def read(
    content: bytes, kind: str, options: ReadOptions, block_bytes: int, largest: int = 10**6
) -> list[tuple[str | None, str, int, int, bytes]]:
    layout, found, line = format_of(kind, options), [], 0
    for block in blocks_of(io.BytesIO(content), layout, largest, block_bytes):
        if block.problem and block.problem != CONTINUED:
            found.append((None, block.problem, line, block.start, b""))
        elif not block.problem:
            for record in layout.parse(block.content, block.start, options):
                raw = content[record.start : record.start + record.size]
                found.append((record.text, record.problem, line + record.line, record.start, raw))
        line += layout.count(block.content, block.start)
    return found


@given(documents=texts, block_bytes=sizes, ending=st.sampled_from([b"", b"\n", b"\n\n"]))
@settings(max_examples=150)
def test_lines(documents: list[str], block_bytes: int, ending: bytes) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in documents]
    content = b"\xef\xbb\xbf" + b"\n".join(lines) + ending
    found = read(content, ".jsonl", ReadOptions(), block_bytes)
    assert [(text, line, raw) for text, _, line, _, raw in found] == list(
        zip(documents, range(len(lines)), lines, strict=True)
    )


@given(documents=texts, block_bytes=sizes, indent=st.sampled_from([None, 1]))
@settings(max_examples=150)
def test_arrays(documents: list[str], block_bytes: int, indent: int | None) -> None:
    values = [{"text": text, "more": [1, {"a": "]}"}]} if number % 2 else text for number, text in enumerate(documents)]
    content = b" " + json.dumps(values, indent=indent).encode() + b"\n"
    found = read(content, ".json", ReadOptions(), block_bytes)
    assert [text for text, *_ in found] == documents
    assert [line for _, _, line, _, _ in found] == list(range(len(documents)))
    assert [json.loads(raw) for *_, raw in found] == values


@given(documents=texts, block_bytes=sizes, gap=st.sampled_from(["\n\n", "\n\n\n", "\n \n", "\r\n\r\n"]))
@settings(max_examples=150)
def test_parts_between_blank_lines(documents: list[str], block_bytes: int, gap: str) -> None:
    wanted = [part for text in documents if (part := text.replace("\n", "").strip())]
    content = (gap + gap.join(wanted) + gap).encode()
    found = read(content, ".txt", PARTS, block_bytes)
    assert [text for text, *_ in found] == wanted
    assert [raw.decode() for *_, raw in found] == wanted
    for _, _, line, start, _ in found:
        assert content.count(b"\n", 0, start) == line


@pytest.mark.parametrize("block_bytes", [1, 16, 50])
@pytest.mark.parametrize("gap", ["\n\n", "\n \n", "\r\n\r\n", "\n\t\n \n"])
def test_parts_take_no_memory_together(block_bytes: int, gap: str) -> None:
    wanted = [f"document {number}" for number in range(40)]
    found = read(gap.join(wanted).encode(), ".txt", PARTS, block_bytes, largest=60)
    assert [(text, problem) for text, problem, *_ in found] == [(text, "") for text in wanted]


def test_an_array_is_not_read_on_behind_what_is_too_long() -> None:
    content = json.dumps(["a", "b" * 500, "c"]).encode()
    found = read(content, ".json", ReadOptions(), 30, largest=100)
    assert [text for text, *_ in found] == ["a", None]
    assert_names(found[1][1], 100, "--max-document-mb")


@pytest.mark.parametrize("block_bytes", [1, 7, 30, 1000])
def test_a_record_without_end_takes_no_memory(block_bytes: int) -> None:
    content = b'{"text": "a"}\n' + b"x" * 500 + b'\n{"text": "b"}\n'
    found = read(content, ".jsonl", ReadOptions(), block_bytes, largest=100)
    if block_bytes < 1000:  # a block that is read at once is parsed, and its records are measured there
        assert [(text, line) for text, _, line, _, _ in found] == [("a", 0), (None, 1), ("b", 2)]
        assert_names(found[1][1], 100, "--max-document-mb")


@pytest.mark.parametrize("block_bytes", range(1, 60))
def test_the_part_behind_one_that_is_too_long(block_bytes: int) -> None:
    """Wherever a block ends: between the two newlines, too."""
    content = b"a\n\n" + b"x" * 500 + b"\n\nb\n \nc"
    found = read(content, ".txt", PARTS, block_bytes, largest=100)
    assert [text for text, *_ in found] == ["a", None, "b", "c"]


@pytest.mark.parametrize("block_bytes", [1, 5, 1000])
@pytest.mark.parametrize("cut", range(1, 30))
def test_an_array_cut_anywhere_is_never_taken_for_whole(block_bytes: int, cut: int) -> None:
    content = b'["first", {"text": "b"}, "c"]\n'
    found = read(content[:cut], ".json", ReadOptions(), block_bytes)
    assert ([problem for _, problem, *_ in found if problem] == []) == (cut >= 29)
