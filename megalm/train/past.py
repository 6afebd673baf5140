"""What any step of a run reads, from its run folder: for people who ask which text it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.loading import load_run_config
from megalm.config.schema import RunConfig
from megalm.data.files import read_json
from megalm.data.lookup import Piece, pieces_of
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.tracking.metrics import live_rows, read_metrics
from megalm.train.datasets import find_data, open_datasets
from megalm.train.run_folder import RunFolder


@dataclass(frozen=True)
class StepRead:
    """Attributes: first, end: samples [first, end); trained: false of a step that is still to come."""

    first: int
    end: int
    trained: bool
    pieces: list[Piece]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Attempt:
    """The files of one attempt: a resumed run may have changed its batch and its data."""

    config: RunConfig
    global_batch: int
    environment: Mapping[str, Any]


def step_of_run(path: Path, step: int, tell: Callable[[str], None] = lambda line: None) -> StepRead:
    """What step `step` of the run in folder `path` has read, or will read.

    Args:
        tell: called with lines for people, where a recipe is prepared again.

    Raises:
        DataError: no run there, or data that is not there any more.
        ConfigError: a configuration file that is damaged.
    """
    folder = RunFolder(path)
    if not all(file.is_file() for file in folder.config_files):
        raise DataError(f"{path}: is no folder of a run, it has no config.yaml and deepspeed.resolved.json; name one")
    rows = live_rows(read_metrics(folder.metrics)) if folder.metrics.exists() else []
    rows = [row for row in rows if row["kind"] == "train" and "samples" in row]
    # With a log interval not every step has a row: the next one says.
    row = next((row for row in rows if row["step"] >= step), None)
    attempt = _attempt(folder, row["attempt"] if row is not None else None)
    batch = attempt.global_batch
    if row is not None:
        first = row["samples"] - (row["step"] - step + 1) * batch
    else:
        last_step, samples = (rows[-1]["step"], rows[-1]["samples"]) if rows else (0, 0)
        first = samples + (step - 1 - last_step) * batch
    places = find_data(attempt.config.data, tell)

    def first_sample_of(stage_step: int) -> int:  # the batch may have changed before that step
        return int(attempt.environment.get(f"first_sample_of_step_{stage_step}", (stage_step - 1) * batch))

    data = open_datasets(attempt.config, batch, places, first_sample_of)
    pieces = list(pieces_of(data.train, first, batch))
    return StepRead(first, first + batch, row is not None, pieces, data.tokenizer)


def _attempt(folder: RunFolder, number: int | None) -> _Attempt:
    """The newest files, or those that were in force in attempt `number`."""
    newest = folder.path / "environment.json"
    facts = {"": read_json(newest)}
    for old in folder.path.glob("environment.attempt-*.json"):
        facts[old.stem.removeprefix(newest.stem)] = read_json(old)
    suffix = next((suffix for suffix, noted in facts.items() if noted.get("attempt") == number), "")
    config, _, resolved = (file.with_name(f"{file.stem}{suffix}{file.suffix}") for file in folder.config_files)
    batch = read_json(resolved)["train_batch_size"]
    return _Attempt(load_run_config(str(config), []).config, batch, facts[suffix])
