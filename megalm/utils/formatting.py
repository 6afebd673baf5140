"""Format values as text: tables, sizes, times, flat names. Lines for a terminal are wrapped, never truncated."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from megalm.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)
# C0, DEL and C1; bidirectional controls; line separators; interlinear notes; tags.
_ACTING = re.compile(
    r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_GAP = "  "
_NARROWEST = 12  # minimum width of a text column, even if the table is then wider than the terminal


def printable(text: str) -> str:
    """Escape what acts on a terminal instead of being shown: control characters but line ends and tabs, and invisible
    characters that reorder or hide text. `\\x1b[2J` is then seen, not obeyed."""
    return _ACTING.sub(lambda match: ascii(match[0])[1:-1], text)


class PrintableFormatter(logging.Formatter):
    """Formats log records as `printable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def terminal_width() -> int | None:
    """Return the terminal's width in columns; None for a pipe or a file, where lines stay unwrapped for searching."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, width: int | None) -> str:
    """Wrap lines longer than `width`; continuation lines are indented."""
    if width is None:
        return text
    return "\n".join(
        line if len(line) <= width else textwrap.fill(line, width, subsequent_indent=_GAP, break_on_hyphens=False)
        for line in text.split("\n")
    )


def sections_text(sections: Mapping[str, str]) -> str:
    """Return texts below their titles, wrapped for the terminal if there is one."""
    width = terminal_width()
    return "\n\n".join(f"{title}\n{wrapped(text, width)}" for title, text in sections.items())


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Format a table: columns two spaces apart, numbers right-aligned, None as `-`.

    Args:
        width: text cells wrap if the table would be wider; None means the terminal's width, if there is one.
    """
    width = width or terminal_width()
    headings = [printable(heading) for heading in headings]
    cells = [["-" if cell is None else printable(str(cell)) for cell in row] for row in rows]
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
    """Narrow the widest text column repeatedly until the table fits."""
    found = list(widths)
    text = [column for column, is_number in enumerate(numeric) if not is_number]
    while text and sum(found) + len(_GAP) * (len(found) - 1) > width:
        widest = max(text, key=found.__getitem__)
        if found[widest] <= _NARROWEST:
            break
        found[widest] -= 1
    return found


def format_bytes(count: float | None) -> str | None:
    """Format a byte count, e.g. `1.5 GiB`; None stays None."""
    if count is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_bytes(text: str, option: str, unit: str = "") -> int:
    """Parse a size in bytes: `5GB` and `500MB` in powers of 1000, `5GiB` in powers of 1024.

    Args:
        unit: of a number without one.

    Raises:
        ConfigError: it is not a size above 0; the message names the `option`.
    """
    text = text.strip()
    match = _SIZE.fullmatch(f"{text}{unit}" if text[-1:].isdecimal() else text)
    if match is not None:
        base = 1024 if match[3] else 1000
        found = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
        if found > 0:
            return found
    raise ConfigError(f"{option} {text!r} is not a size; write it as 5GB, 500MB or 2GiB")


def format_duration(seconds: float) -> str:
    """Format a duration for a sentence or a table: `0.4 s`, `45 s`, `3 min 20 s`, `2 h 05 min`, `3 days`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 9.95 else f"{max(0.0, seconds):.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    days = seconds / 86400
    return f"{days:,.0f} days" if days >= 100 else f"{days:.3g} days"


def format_clock(seconds: float) -> str:
    """Format a duration for a progress line, where digits must stay aligned: `1:15`, `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a loss in nats; a very large one is cut, because a float would overflow."""
    return math.exp(min(loss, 700.0))


def flatten_mapping(content: Mapping[str, Any], prefix: str = "", numbered: bool = False) -> dict[str, Any]:
    """Flatten `{"a": {"b": 1}}` to `{"a.b": 1}`; an empty mapping and a list stay one value.

    Args:
        numbered: also flatten a list of mappings: its entries become `a.0.b`, `a.1.b`.
    """
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = value
        if numbered and isinstance(value, list) and value and isinstance(value[0], Mapping):
            inner = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(inner, Mapping) and inner:
            flat |= flatten_mapping(inner, f"{prefix}{name}.", numbered)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def flatten_to_text(content: Mapping[str, Any], prefix: str = "", numbered: bool = False) -> dict[str, str]:
    """As `flatten_mapping`, with every value as text; values that are not text become JSON."""
    flat = flatten_mapping(content, prefix, numbered)
    return {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in flat.items()}
