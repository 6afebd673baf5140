"""What the tools of this folder share: one-line errors, exit codes, and a progress line on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from megalm.data.builder.builder import BuildProgress, Built
from megalm.data.indexed.metadata import AWAITS_MERGE, DatasetMetadata
from megalm.data.readers.document_reader import ReadReport
from megalm.errors import EXIT_REFUSED, MegalmError
from megalm.utils.process_setup import keep_standard_streams
from megalm.utils.progress import ProgressBar, percent

out = Console(highlight=False, markup=False, soft_wrap=True)


def run(command: Callable[..., None]) -> None:
    """Run a typer command; what a person can mend is one line on stderr, without a traceback."""
    keep_standard_streams()
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    app()


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except MegalmError as error:
        _refuse(str(error), error.exit_code)
    except OSError as error:
        if error.strerror is None:  # none of the machine's own
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        _refuse(f"{place}{error.strerror}; mend the path, its rights or its disk, and start again", EXIT_REFUSED)


def _refuse(line: str, code: int) -> NoReturn:
    typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code) from None


class BuildBar(ProgressBar):
    """Text in MB/s, tokens/s and the time left."""

    def __init__(self) -> None:
        super().__init__("tokenizing", None, shown=percent)
        self._start = time.monotonic()

    def tell(self, done: BuildProgress) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = f"{done.text_bytes / seconds / 1e6:.1f} MB/s, {done.tokens / seconds:,.0f} tokens/s"
        self.begin(done.stage, None if done.share is None else 1.0)
        self.update(done.share or 0.0, rates)


def reading_bar(what: str, tokens: int) -> ProgressBar:
    """How much of the tokens was read, and the time left."""
    return ProgressBar(what, tokens, shown=percent)


def tell_reading(report: ReadReport) -> None:
    """Say what of the input was not read."""
    if report.ignored_files:
        out.print(f"left out {report.ignored_files:,} files of folders: of other kinds, hidden, or links to elsewhere")
    if report.skipped:
        out.print(f"skipped {report.skipped:,} documents that cannot be read, the first: {report.messages[0]}")


def tell_left_out(built: Built) -> None:
    """Say what of the input is not in the result."""
    report = built.reports[0]
    tell_reading(ReadReport(skipped=report.skipped, messages=report.messages, ignored_files=built.ignored_files))
    for name, count in report.removed.items():
        out.print(f"left out {count:,} documents by {name}")
    tell_near_copy(report)
    if report.minhash.get(AWAITS_MERGE):
        out.print("a shard: its near copies are left out when it is merged, by merge_datasets.py --dedup minhash")


def tell_near_copy(report: DatasetMetadata) -> None:
    """Say by an example what counts as a near copy."""
    for pair in report.near_copies[:1]:
        out.print(f"near copies, the first: {pair['left_out']} of {pair['copy_of']}, {pair['alike']:.0%} alike")
