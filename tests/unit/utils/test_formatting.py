"""Values as text, and tables and lines for terminals of any width."""

from __future__ import annotations

import pytest

from megalm.errors import ConfigError
from megalm.utils.formatting import (
    flatten_mapping,
    flatten_to_text,
    format_bytes,
    format_clock,
    format_duration,
    parse_bytes,
    printable,
    table,
    wrapped,
)

ROWS = [
    ["data.train", "datasets/a/rather/long/prefix and a weight", 1],
    ["run.name", "mine", 20_000],
    ["a long setting", None, None],
]


def test_a_table_fits_and_loses_nothing() -> None:
    plain = table(["setting", "value", "steps"], ROWS)
    assert len(plain.splitlines()) == 5
    narrow = table(["setting", "value", "steps"], ROWS, width=40)
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.splitlines()[2].split() == ["data.train", "datasets/a/rather", "1"], (
        "numbers stay whole, on the first"
    )
    assert sorted("".join(narrow.split()).replace("-", "")) == sorted("".join(plain.split()).replace("-", ""))


def test_a_table_that_fits_is_as_it_is_in_a_pipe() -> None:
    assert table(["setting", "value", "steps"], ROWS, width=200) == table(["setting", "value", "steps"], ROWS)


def test_columns_of_text_stay_readable() -> None:
    lines = table(["a" * 30, "b" * 30], [["x" * 30, "y" * 30]], width=10).splitlines()
    assert max(map(len, lines)) == 12 + 2 + 12


def test_long_lines_go_on_to_the_right() -> None:
    text = "short\n" + "word " * 10
    assert wrapped(text, None) == text
    lines = wrapped(text, 24).split("\n")
    assert lines[0] == "short"
    assert all(len(line) <= 24 for line in lines)
    assert all(line.startswith("  word") for line in lines[2:])
    assert " ".join(lines).split() == text.split()


def test_tables_align() -> None:
    text = table(["name", "count"], [["a", 5], ["long name", 1000], ["none", None]])
    assert text.splitlines() == [
        "name       count",
        "---------  -----",
        "a              5",
        "long name   1000",
        "none           -",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (45, "45 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (86400 * 3, "3 days"),
        (86400 * 3.5, "3.5 days"),
        (86400 * 1098, "1,098 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (4000, "1:06:40")])
def test_clocks(seconds: float, text: str) -> None:
    assert format_clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, None),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (63e6, "60.1 MiB"),
        (3 * 2**41, "6.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes(number: float | None, text: str | None) -> None:
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5 K", 1500), ("7", 7)]
)
def test_explicit_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--size") == expected


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--size"):
        parse_bytes(text, "--size")


def test_mappings_become_flat() -> None:
    content = {"a": {"b": 1, "c": {}}, "d": [{"e": None}, {"e": "text"}], "f": []}
    assert flatten_mapping(content, "x.") == {"x.a.b": 1, "x.a.c": {}, "x.d": content["d"], "x.f": []}
    assert flatten_to_text(content, numbered=True) == {
        "a.b": "1",
        "a.c": "{}",
        "d.0.e": "null",
        "d.1.e": "text",
        "f": "[]",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m\x85\x7f\x00", r"\x9b31m\x85\x7f\x00"),
        ("over\rwritten", r"over\rwritten"),
        ("a\x08\x0b\x0cb", r"a\x08\x0b\x0cb"),
        ("user\u202etxt.exe\u2066\u2069\u200f\u061c", r"user\u202etxt.exe\u2066\u2069\u200f\u061c"),
        ("a\u2028b\u2029c\u2060\U000e0041", r"a\u2028b\u2029c\u2060\U000e0041"),
        ("two\r\nlines\n\tand a tab", "two\r\nlines\n\tand a tab"),
        ("für 数 \U0001f468\u200d\U0001f469 עברית \\x1b", "für 数 \U0001f468\u200d\U0001f469 עברית \\x1b"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped_and_other_text_stays(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_a_table_has_the_width_of_what_is_shown() -> None:
    lines = table(["name", "n"], [["\x1b[31m", 1], ["plain", 2]], 80).splitlines()
    assert lines[2] == r"\x1b[31m  1"
    assert len({len(line) for line in lines}) == 1
