"""Plain text for terminals and for pipes: tables, sizes, times; a terminal's lines are wrapped, nothing is cut."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

_GAP = "  "
_NARROWEST = 12  # columns of text get no narrower, also where a table is wider than the terminal then


def terminal_width() -> int | None:
    """Columns to write in; None for a pipe or a file, where a line is a fact to look for."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, width: int | None) -> str:
    """Lines that are too long go on in the next one, a little to the right."""
    if width is None:
        return text
    return "\n".join(
        line if len(line) <= width else textwrap.fill(line, width, subsequent_indent=_GAP, break_on_hyphens=False)
        for line in text.split("\n")
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Columns two spaces apart; numbers to the right, None as `-`.

    Args:
        width: cells of text take several lines where a table would be wider; None: the terminal's, if there is one.
    """
    width = width or terminal_width()
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(headings), *cells]) for column in range(len(headings))]
    numeric = [
        bool(rows) and all(row[column] is None or isinstance(row[column], (int, float)) for row in rows)
        for column in range(len(headings))
    ]

    if width is not None:
        widths = _narrowed(widths, numeric, width)

    def lines(values: Sequence[str]) -> str:
        parts = [
            [value] if len(value) <= room else textwrap.wrap(value, room, break_on_hyphens=False)
            for value, room in zip(values, widths, strict=True)
        ]
        return "\n".join(map(line, zip_longest(*parts, fillvalue="")))

    def line(values: Sequence[str]) -> str:
        padded = [
            value.rjust(room) if right else value.ljust(room)
            for value, room, right in zip(values, widths, numeric, strict=True)
        ]
        return _GAP.join(padded).rstrip()

    return "\n".join([lines(headings), line(["-" * room for room in widths]), *map(lines, cells)])


def _narrowed(widths: Sequence[int], numeric: Sequence[bool], width: int) -> list[int]:
    """Take from the widest column of text until all fit."""
    found = list(widths)
    text = [column for column, is_number in enumerate(numeric) if not is_number]
    while text and sum(found) + len(_GAP) * (len(found) - 1) > width:
        widest = max(text, key=found.__getitem__)
        if found[widest] <= _NARROWEST:
            break
        found[widest] -= 1
    return found


def size(count: float | None) -> str | None:
    """Bytes as people say them: `1.5 GiB`."""
    if count is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float | None) -> str | None:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return None
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
