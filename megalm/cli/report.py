"""`megalm report`: one page about a run."""

from __future__ import annotations

from pathlib import Path

import typer

from megalm.cli.find_run import find_run, read_watched
from megalm.errors import ConfigError


def command(
    run: str = typer.Argument(help="Run folder, or a name under runs/; it may be training."),
    output: Path = typer.Option(None, help="Where the page goes; report.html in the run folder without it."),
    show_it: bool = typer.Option(False, "--open", help="Show it in this machine's browser."),
) -> None:
    """Write one page about a run: what became of it, its curves, what was
    unusual, its checkpoints, samples, configuration and environment.

    One HTML file that needs no network, no script and no other file: it can
    be mailed, printed and read on a phone. A run writes it at its end.
    """
    from megalm.tracking.report import write_report  # the template engine, for nobody who asks for --help

    if output is not None and output.is_dir():
        raise ConfigError(f"{output}: a folder; name the file, {output / 'report.html'} for instance")
    path = write_report(find_run(run), output, read_watched)
    typer.echo(f"{path}: {path.stat().st_size / 1000:,.0f} kB")
    if show_it:
        typer.launch(str(path))
