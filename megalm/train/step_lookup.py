"""Look up the samples of any training step of a run, from its run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.loading import load_run_config
from megalm.config.schema import RunConfig
from megalm.data.analysis.sample_sources import TokenSpan, spans_of
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.planning.batch_size import TrainingStages
from megalm.runs.metrics_log import ATTEMPT_EVENTS, Row, live_rows, read_metrics
from megalm.runs.run_folder import RunFolder
from megalm.train.datasets import find_data, open_datasets
from megalm.utils.atomic_files import read_json


@dataclass(frozen=True)
class StepSamples:
    """Samples [first, end) of a step; `trained` is false for a step that is not trained yet."""

    first: int
    end: int
    trained: bool
    pieces: list[TokenSpan]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Attempt:
    """One attempt of a run; a later attempt may have other batches and other data."""

    saved: RunConfig
    stages: TrainingStages
    environment: Mapping[str, Any]

    @property
    def config(self) -> RunConfig:
        """The attempt's configuration, with the sequence length at the start of the sample order."""
        lengths = self.environment.get("sequence_lengths_before", [])
        first = lengths[0][0] if lengths else self.saved.data.sample_length
        data = self.saved.data.with_sample_length(first)
        return self.saved.model_copy(update={"data": data})

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Return (samples consumed, sequence length from there on) for each change of the sequence length."""
        before = self.environment.get("sequence_lengths_before", [])
        after = [length for length, _ in before[1:]] + [self.saved.data.sample_length]
        return [(consumed, length) for (_, consumed), length in zip(before, after, strict=False)]

    def first_sample_of(self, step: int) -> int:
        """Return the number of the first sample of `step`, at which a stage of the mixture begins."""
        return int(self.environment.get(f"first_sample_of_step_{step}", self.stages.samples(step - 1)))


def samples_of_step(path: Path, step: int, on_progress: Callable[[str], None] = lambda line: None) -> StepSamples:
    """Return the samples that step `step` of the run in folder `path` has read, or will read.

    Args:
        on_progress: called with progress lines if a recipe is prepared again.

    Raises:
        DataError: there is no run, or its data is missing.
        ConfigError: a configuration file is damaged.
    """
    folder = RunFolder(path)
    if missing := [file.name for file in folder.config_files if not file.is_file()]:
        raise DataError(f"{path} is not a run folder, it has no {', '.join(missing)}; name a run folder")
    rows = live_rows(read_metrics(folder.metrics)) if folder.metrics.exists() else []
    number = next(
        (
            row.get("attempt") or 1
            for row in reversed(rows)
            if row.get("event") in ATTEMPT_EVENTS and (row.get("step") or 0) < step
        ),
        1,
    )
    attempt = _attempt(folder, number)
    first, trained = _first_sample(rows, number, step, attempt.stages)
    end = first + attempt.stages.at(step).samples
    places = find_data(attempt.config.data, on_progress)
    data = open_datasets(attempt.config, attempt.stages, places, attempt.first_sample_of)
    samples = data.train
    for consumed, length in attempt.cuts:
        samples = samples.recut(consumed, length)
    pieces = list(spans_of(samples, first, end - first))
    return StepSamples(first, end, trained, pieces, data.tokenizer)


def _first_sample(rows: list[Row], attempt: int, step: int, stages: TrainingStages) -> tuple[int, bool]:
    """Return the number of the step's first sample, and whether the step has been trained.

    With a log interval not every step has a row; within an attempt samples are consecutive.
    """
    trained = [row for row in rows if row["kind"] == "train" and row.get("samples") is not None]
    here = [row for row in trained if row.get("attempt") == attempt] or trained[-1:]
    row: Row = next((row for row in here if row["step"] >= step), here[-1] if here else {"step": 0, "samples": 0})
    more, less = stages.samples(step - 1, after=row["step"]), stages.samples(row["step"], after=step - 1)
    return row["samples"] + more - less, any(row["step"] >= step for row in trained)


def _attempt(folder: RunFolder, number: int) -> _Attempt:
    """Return the files in force in attempt `number`: a rollback begins an attempt without writing new ones."""
    newest = folder.path / "environment.json"
    facts = {"": read_json(newest)}
    for old in folder.path.glob("environment.attempt-*.json"):
        facts[old.stem.removeprefix(newest.stem)] = read_json(old)
    before = {suffix: noted["attempt"] for suffix, noted in facts.items() if noted.get("attempt", number + 1) <= number}
    suffix = max(before, key=before.__getitem__, default="")
    config, _, resolved = (file.with_name(f"{file.stem}{suffix}{file.suffix}") for file in folder.config_files)
    saved = load_run_config(str(config), []).config
    return _Attempt(saved, TrainingStages.of(saved, read_json(resolved)["train_batch_size"]), facts[suffix])
