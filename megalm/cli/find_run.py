"""Finding the run folder that a person means."""

from __future__ import annotations

from pathlib import Path

import typer

from megalm.checkpoint.discovery import first_whole, resolve_pointer
from megalm.checkpoint.manifest import MANIFEST
from megalm.config.schema import RunSection
from megalm.errors import CheckpointError, ConfigError
from megalm.utils.did_you_mean import did_you_mean


def find_run(name: str) -> Path:
    """A run folder by its path, or by its name under the default run root.

    Raises:
        ConfigError: neither is a folder.
    """
    root = Path(RunSection().root)
    for candidate in (Path(name), root / name):
        if candidate.is_dir():
            return candidate
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    elsewhere = "" if Path(name).parent == root else f", nor {root / name}"
    meant = did_you_mean(Path(name).name, known)
    raise ConfigError(f"{name}: no such run folder{elsewhere}{meant}; give its path")


def find_place(path: Path) -> Path:
    """A checkpoint or a run folder: `latest` and `best` are followed, a bare name is looked for under the run root."""
    path = resolve_pointer(path)
    return path if path.exists() or len(path.parts) > 1 else find_run(str(path))


def checkpoint_at(path: Path) -> Path:
    """A checkpoint folder, or of a run what `--resume auto` would take; damaged ones that it passes over are told.

    Raises:
        CheckpointError: there is no such folder, or the run has no checkpoint yet.
    """
    path = find_place(path)
    if (path / MANIFEST).exists() or not (path / "checkpoints").is_dir():
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; `megalm checkpoint list RUN` names the checkpoints")
        return path
    newest, damaged = first_whole(path / "checkpoints", "auto")
    for problem in damaged:
        typer.echo(f"megalm: passed over: {problem}", err=True)
    if newest is None:
        raise CheckpointError(f"{path}: has no checkpoint yet; `megalm checkpoint list {path}` shows what is there")
    return newest
