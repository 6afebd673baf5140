"""Shared by the data tools: one-line errors, exit codes, and a progress line on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# A checkout works without being installed, and beside another one that is. It is then no place for other imports.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import megalm  # noqa: F401

sys.path.pop(0)

import typer
from rich.console import Console

from megalm.cli.options import expand_home
from megalm.data.builder.builder import BuildProgress, Built
from megalm.data.builder.decontamination import describe_overlap
from megalm.data.indexed.metadata import AWAITS_MERGE, DatasetMetadata
from megalm.data.readers.input_files import ReadReport
from megalm.data.readers.losses import Losses
from megalm.utils.formatting import printable
from megalm.utils.process_setup import keep_standard_streams
from megalm.utils.progress import ProgressBar, percent
from megalm.utils.terminal import echo_text, one_line_errors

NAMED = 3


class _Output(Console):
    """Standard output, where text from files is shown and never obeyed."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print messages, escaped for files and programs, too."""
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)

    def text(self, text: str) -> None:
        """Print a text that is a result: a file or a program gets it unchanged."""
        echo_text(text)


out = _Output(highlight=False, markup=False, soft_wrap=True)


def run(command: Callable[..., None]) -> None:
    """Run a typer command; a user's error is one line on stderr, without a traceback."""
    keep_standard_streams()
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    with one_line_errors():
        app(args=expand_home(sys.argv[1:]))


class BuildBar(ProgressBar):
    """Shows MB/s of text, tokens/s and the time left."""

    def __init__(self) -> None:
        super().__init__("tokenizing", None, shown=percent)
        self._start = time.monotonic()

    def tell(self, done: BuildProgress) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = f"{done.text_bytes / seconds / 1e6:.1f} MB/s, {done.tokens / seconds:,.0f} tokens/s"
        self.begin(done.stage, None if done.share is None else 1.0)
        self.update(done.share or 0.0, rates)


def print_skipped(report: ReadReport) -> None:
    """Print the numbers of unread files and documents."""
    if report.ignored_files:
        named = "; ".join(report.ignored[:NAMED])
        more = "; ..." if report.ignored_files > NAMED else ""
        out.print(f"left out {report.ignored_files:,} other files: {named}{more}")
    for line in report.losses.lines():
        out.print(f"skipped {line}")
    if report.messages:
        out.print(f"the first: {report.messages[0]}")
    if report.losses.empty:
        out.print(f"left out {report.losses.empty:,} empty documents")


def print_removed(built: Built) -> None:
    """Print the numbers of documents that are not in the result."""
    report = built.reports[0]
    print_skipped(replace(built.reading, losses=Losses.from_report(report.losses), messages=report.messages))
    for name, count in report.removed.items():
        out.print(f"removed {count:,} documents by {name}")
    for line in describe_overlap(report.overlap):
        out.print(line)
    print_near_copy(report)
    if report.minhash.get(AWAITS_MERGE):
        out.print("this shard still holds its near copies; merge_datasets.py --dedup minhash removes them")


def print_near_copy(report: DatasetMetadata) -> None:
    """Print an example of a near copy."""
    for pair in report.near_copies[:1]:
        out.print(f"first near copy: {pair['left_out']} of {pair['copy_of']}, {pair['alike']:.0%} alike")
