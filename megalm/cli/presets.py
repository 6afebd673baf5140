"""`megalm presets`: the shipped runs and models."""

from __future__ import annotations

import typer

from megalm.config.loading import describe_preset, preset_path, preset_paths
from megalm.utils.formatting import table, terminal_width

_WIDTH = 104  # of the list, also where there is no terminal: longer lines are hard to read


def command(name: str = typer.Argument(None, help="Show this preset's YAML instead of the list.")) -> None:
    """List the shipped presets, or show one; any of them goes after --config."""
    if name is None:
        rows = [[preset, describe_preset(preset)] for preset in preset_paths()]
        typer.echo(table(["preset", "what it is"], rows, min(terminal_width() or _WIDTH, _WIDTH)))
    else:
        typer.echo(preset_path(name).read_text(encoding="utf-8").rstrip())
