"""Tables and lines for terminals of any width."""

from __future__ import annotations

from megalm.cli.show import table, wrapped

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
