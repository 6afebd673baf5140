"""`megalm presets`: the shipped runs and models."""

from __future__ import annotations

import textwrap

import typer

from megalm.cli import show
from megalm.config.presets import describe_preset, preset_path, preset_paths

_TEXT_WIDTH = 80


def command(name: str = typer.Argument(None, help="Show this preset's YAML instead of the list.")) -> None:
    """List the shipped presets, or show one; any of them goes after --config."""
    if name is None:
        rows = []
        for preset in preset_paths():
            first, *more = textwrap.wrap(describe_preset(preset), _TEXT_WIDTH) or [""]
            rows += [[preset, first], *(["", line] for line in more)]
        typer.echo(show.table(["preset", "what it is"], rows))
    else:
        typer.echo(preset_path(name).read_text(encoding="utf-8").rstrip())
