"""`megalm report`: write a page about a run."""

from __future__ import annotations

from pathlib import Path

import typer

from megalm.cli.find_run import find_run, read_watched
from megalm.cli.options import Run
from megalm.errors import ConfigError
from megalm.utils.terminal import echo


def command(
    run: Run,
    output: Path = typer.Option(None, help="The file to write. Default: report.html in the run folder."),
    show_it: bool = typer.Option(False, "--open", help="Open the page in the browser."),
) -> None:
    """Write a page about a run: outcome, curves, notable events, checkpoints,
    samples, configuration and environment. The run may still be training.

    The page is one HTML file without scripts that needs no network and no
    other file, so it can be mailed and printed. A run writes it at its end.
    """
    from megalm.tracking.report import write_report  # loads the template engine

    if output is not None and output.is_dir():
        raise ConfigError(f"{output} is a folder; name a file, such as {output / 'report.html'}")
    path = write_report(find_run(run), output, read_watched)
    echo(f"{path}: {path.stat().st_size / 1000:,.0f} kB")
    if show_it:
        typer.launch(str(path))
