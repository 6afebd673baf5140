"""Finds the run or checkpoint that the user names, and reads it with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.checkpoint.discovery import first_whole, resolve_pointer
from megalm.checkpoint.manifest import MANIFEST, hashed_blocks
from megalm.config.schema import RunSection
from megalm.errors import CheckpointError, ConfigError
from megalm.inference.run_checkpoints import good_checkpoints
from megalm.runs.metrics_log import RowBatch, read_batches
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.progress import ProgressBar, sizes
from megalm.utils.terminal import echo

if TYPE_CHECKING:
    from megalm.checkpoint.checkpoint_reader import CheckpointReader

_LARGE_BYTES = 20_000_000  # takes half a second to read


def warn(line: str) -> None:
    """Write a line to stderr; stdout holds results only."""
    echo(f"megalm: {line}", err=True)


def is_long(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > _LARGE_BYTES


def read_watched(path: Path) -> Iterator[RowBatch]:
    """The rows of `read_batches`, with a progress bar for a large file.

    Raises:
        DataError: as `read_metrics`.
    """
    if not is_long(path):
        yield from read_batches(path)
        return
    with ProgressBar(f"reading {path}", path.stat().st_size, shown=sizes) as bar:
        for batch in read_batches(path):
            yield batch
            bar.update(batch.ends[-1])


def verify(reader: CheckpointReader) -> None:
    """Hash every file of a checkpoint, with a progress bar.

    Raises:
        CheckpointError: a file is damaged.
    """
    with ProgressBar(f"checking {reader.path.name}", hashed_blocks(reader.manifest)) as bar:
        if problem := reader.verify(on_progress=bar.advance):
            raise CheckpointError(problem)


def find_run(name: str) -> Path:
    """The run folder with this path, or with this name under the default run root.

    Raises:
        ConfigError: neither is a folder.
    """
    root = Path(RunSection().root)
    for candidate in (Path(name), root / name):
        if candidate.is_dir():
            return candidate
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    elsewhere = "" if Path(name).parent == root else f", and no {root / name}"
    meant = did_you_mean(Path(name).name, known)
    raise ConfigError(f"{name}: no such run folder{elsewhere}{meant}; give its path")


def find_place(path: Path) -> Path:
    """A checkpoint or run folder; follows `latest` and `best`, and looks for a bare name under the run root."""
    path = resolve_pointer(path)
    return path if path.exists() or len(path.parts) > 1 else find_run(str(path))


def checkpoint_at(path: Path) -> Path:
    """The checkpoint folder itself, or the checkpoint that `--resume auto` takes in a run; warns of damaged ones.

    Raises:
        CheckpointError: no such folder, or the run has no checkpoint.
    """
    path = find_place(path)
    if (path / MANIFEST).exists() or not (path / "checkpoints").is_dir():
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; `megalm checkpoint list RUN` lists the checkpoints")
        return path
    newest, damaged = first_whole(path / "checkpoints", "auto")
    for problem in damaged:
        warn(f"skipped: {problem}")
    if newest is None:
        raise CheckpointError(f"{path} has no checkpoint yet; `megalm checkpoint list {path}` lists incomplete ones")
    return newest


def good_checkpoints_at(place: Path, option: str) -> tuple[Path, list[Path]]:
    """A run folder and its good checkpoints by step; warns of the others.

    Args:
        option: needs a run folder; for the message.

    Raises:
        ConfigError: the place is not a run folder.
        CheckpointError: the run has no good checkpoint.
    """
    run = find_place(place)
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"{option} needs a run folder, but {run} has no folder checkpoints")
    good, others = good_checkpoints(run)
    for reason in others:
        warn(f"skipped {reason}")
    return run, good
