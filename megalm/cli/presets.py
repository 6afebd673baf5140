"""`megalm presets`: list the presets for runs and models."""

from __future__ import annotations

import typer

from megalm.config.loading import describe_preset, preset_path, preset_paths
from megalm.utils.formatting import table, terminal_width

_WIDTH = 104  # the largest width of the list; longer lines are hard to read


def command(name: str = typer.Argument(None, help="Print this preset's YAML instead of the list.")) -> None:
    """List the presets, or print one; --config takes their names."""
    if name is None:
        rows = [[preset, describe_preset(preset)] for preset in preset_paths()]
        typer.echo(table(["preset", "description"], rows, min(terminal_width() or _WIDTH, _WIDTH)))
    else:
        typer.echo(preset_path(name).read_text(encoding="utf-8").rstrip())
