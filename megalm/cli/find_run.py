"""Finding the run folder that a person means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.checkpoint.manifest import hashed_blocks
from megalm.errors import CheckpointError
from megalm.runs.metrics_log import RowBatch, read_batches
from megalm.utils.progress import ProgressBar, sizes

if TYPE_CHECKING:
    from megalm.checkpoint.checkpoint_reader import CheckpointReader
import typer

from megalm.checkpoint.discovery import first_whole, resolve_pointer
from megalm.checkpoint.manifest import MANIFEST
from megalm.config.schema import RunSection
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

# Looking at every byte of a checkpoint before it is used, with the time left: there may be a terabyte.

# Reading a long metrics.jsonl where somebody waits for it: half a million rows take some seconds.

_LONG_BYTES = 20_000_000  # half a second


def is_long(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > _LONG_BYTES


def read_watched(path: Path) -> Iterator[RowBatch]:
    """The rows of `read_batches`, with the time left where there are many.

    Raises:
        DataError: as there.
    """
    if not is_long(path):
        yield from read_batches(path)
        return
    with ProgressBar(f"reading {path}", path.stat().st_size, shown=sizes) as bar:
        for batch in read_batches(path):
            yield batch
            bar.update(batch.end)


def verify(reader: CheckpointReader) -> None:
    """Hash every file of a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    with ProgressBar(f"checking {reader.path.name}", hashed_blocks(reader.manifest)) as counter:
        if problem := reader.verify(on_progress=counter.advance):
            raise CheckpointError(problem)


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
