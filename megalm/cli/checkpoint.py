"""`megalm checkpoint`: what is saved, read from the JSON manifests alone (no torch)."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import typer

from megalm.cli import show
from megalm.cli.runs import find_run
from megalm.errors import CheckpointError

MANIFEST = "manifest.json"
_LONGEST_VALUE = 160

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_command(run: str = typer.Argument(help="Run folder, or a name under runs/.")) -> None:
    """List a run's checkpoints, oldest first."""
    run_dir = find_run(run)
    folders = checkpoint_folders(run_dir)
    if not folders:
        typer.echo(f"{run_dir}: no checkpoints yet")
        return
    latest = latest_name(run_dir)
    rows: list[list[object]] = []
    losses: dict[str, float] = {}
    for folder in folders:
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
        if manifest is None:
            rows.append([folder.name, None, None, None, None, None, "incomplete", ""])
            continue
        if manifest.get("status") == "good" and manifest.get("validation_loss") is not None:
            losses[folder.name] = manifest["validation_loss"]
        rows.append(_row(folder, manifest))
    best = min(losses, key=losses.__getitem__) if losses else None
    for row in rows:
        row[-1] = " ".join(word for word, name in (("latest", latest), ("best", best)) if name == row[0])
    typer.echo(show.table(["name", "step", "tokens", "created", "size", "validation loss", "status", ""], rows))


@app.command("show")
def show_command(path: Path = typer.Argument(help="Checkpoint folder, or a run folder for its latest.")) -> None:
    """Show one checkpoint: where training was, and whether its files are there in full size."""
    folder = _checkpoint(path)
    manifest = read_manifest(folder)
    facts = [[name, _plain(name, value)] for name, value in manifest.items() if name != "files"]
    typer.echo(show.table(["checkpoint", str(folder)], facts))
    files = manifest.get("files") or {}
    rows = [
        [name, show.size(entry.get("bytes")), _presence(folder / name, entry.get("bytes"))]
        for name, entry in files.items()
    ]
    typer.echo("\n" + show.table(["file", "size", "on disk"], rows))
    damaged = [f"{name} is {presence}" for name, _, presence in rows if presence != "ok"]
    if damaged:
        raise CheckpointError(f"{folder}: {', '.join(damaged)}; it cannot be loaded, choose another checkpoint")


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """`step-*` folders in the order of their steps; unfinished `.tmp` ones are no checkpoints."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir() and not path.suffix)


def latest_name(run_dir: Path) -> str | None:
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.read_text().strip() if pointer.is_file() else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint folder.

    Raises:
        CheckpointError: absent, or no JSON object.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it is no complete checkpoint; choose another") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); choose another checkpoint") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: holds no JSON object; choose another checkpoint")
    return manifest


def _checkpoint(path: Path) -> Path:
    if (path / MANIFEST).exists() or not (path / "checkpoints").is_dir():
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; `megalm checkpoint list RUN` names the checkpoints")
        return path
    latest = latest_name(path)
    if latest is None:
        raise CheckpointError(f"{path}: has no latest checkpoint; `megalm checkpoint list {path}` shows what is there")
    return path / "checkpoints" / latest


def _row(folder: Path, manifest: dict[str, Any]) -> list[object]:
    total = sum(entry.get("bytes", 0) for entry in (manifest.get("files") or {}).values())
    loss = manifest.get("validation_loss")
    return [
        folder.name,
        manifest.get("step"),
        manifest.get("tokens"),
        _created(manifest.get("created")),
        show.size(total),
        None if loss is None else f"{loss:.4f}",
        manifest.get("status"),
        "",
    ]


def _presence(file: Path, expected_bytes: int | None) -> str:
    if not file.is_file():
        return "missing"
    found = file.stat().st_size
    return "ok" if found == expected_bytes else f"{found} bytes instead of {expected_bytes}"


def _created(value: object) -> object:
    """Unix seconds or text, as text."""
    if isinstance(value, (int, float)):
        return datetime.datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M:%S")
    return value


def _plain(name: str, value: object) -> str:
    """One line; the long ones (generator states, whole configurations) are for programs to read."""
    if name == "created":
        value = _created(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({len(text)} characters)"
