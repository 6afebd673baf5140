"""Rank the runs of a sweep by their last validation loss, with its uncertainty, and find the effect of each value.

Runs that differ only in the seed are one entry: their mean, with a standard error by the scatter over seeds, pooled
over all entries. Without seeds, an entry's standard error is that of its validation by the choice of the samples (the
column loss_stderr of metrics.jsonl). Two entries do not differ where the difference of their losses is within
`noise_factor` standard errors of that difference: 95% confidence, by Student's t for the seeds' degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megalm.sweeps.expansion import SEED, SweptRun
from megalm.sweeps.sweep_folder import State
from megalm.tracking.compare_runs import Measure, RunRecord, measure_of, results

# Student's t at 97.5% for 1, 2, ... degrees of freedom (two-sided 95%).
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
_T_OF_MORE = 2.09
_NORMAL = 1.96
_TRAINING_SHARE = 0.1  # of the steps, at the end: the loss of a run without validation

Score = Literal["validation loss", "bits per byte", "training loss"]


@dataclass(frozen=True)
class RankedRun:
    """A run of the sweep, with what it reached.

    Attributes:
        record: None before its first row.
        score: lower is better; None for a run that is not finished, or whose loss is not finite.
        stderr: of the score by the choice of the validation samples.
    """

    run: SweptRun
    state: State
    record: RunRecord | None = None
    score: float | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in the seed.

    Attributes:
        score: their mean.
        stderr: of the mean; None if not known.
    """

    values: Mapping[str, str]
    runs: tuple[RankedRun, ...]
    score: float
    stderr: float | None


@dataclass(frozen=True)
class ValueEffect:
    """The mean score at one value of a key; `count`: the runs in it."""

    value: str
    score: float
    stderr: float | None
    count: int


@dataclass(frozen=True)
class Ranking:
    """The runs of a sweep in order.

    Attributes:
        scored_by: what the score is.
        entries: finished runs by score, the best first.
        rest: the runs without a score.
        by_seeds: whether the standard errors are those of seeds.
        noise_factor: standard errors of a difference within which it is none.
    """

    scored_by: Score
    entries: tuple[Entry, ...]
    rest: tuple[RankedRun, ...]
    by_seeds: bool
    noise_factor: float

    @property
    def runs(self) -> list[RankedRun]:
        """All runs, the best first."""
        return [*(run for entry in self.entries for run in entry.runs), *self.rest]

    @property
    def best(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    def noise(self, entry: Entry) -> float | None:
        """Return the largest difference from the best that is none; None if the uncertainty is not known."""
        best = self.best
        if best is None or best.stderr is None or entry.stderr is None:
            return None
        return self.noise_factor * math.hypot(best.stderr, entry.stderr)

    def equals_best(self, entry: Entry) -> bool:
        """Return whether the entry is not known to differ from the best."""
        noise = self.noise(entry)
        return self.best is not None and noise is not None and entry.score - self.best.score <= noise


def score_runs(found: Sequence[tuple[SweptRun, State, RunRecord | None]]) -> tuple[list[RankedRun], Score]:
    """Return the runs with their scores, and what these are."""
    finished = [record for _, state, record in found if record is not None and state == "finished"]
    measure = measure_of(finished)
    scored_by: Score = "bits per byte" if measure == "bits_per_byte" else "validation loss"
    if finished and not any(record.validations for record in finished):
        scored_by = "training loss"
    ranked = []
    for run, state, record in found:
        if record is None:
            ranked.append(RankedRun(run, state))
            continue
        score, stderr = _score(record, scored_by, measure) if state == "finished" else (None, None)
        ranked.append(RankedRun(run, state, record, score, stderr))
    return ranked, scored_by


def rank(runs: Sequence[RankedRun], scored_by: Score = "validation loss") -> Ranking:
    """Rank runs; those that differ only in the seed are one entry."""
    groups: dict[tuple[tuple[str, str], ...], list[RankedRun]] = {}
    for run in runs:
        if run.score is not None:
            others = tuple((key, value) for key, value in run.run.values.items() if key != SEED)
            groups.setdefault(others, []).append(run)
    deviation, freedom = _pooled([[run.score for run in group if run.score is not None] for group in groups.values()])
    entries = []
    for values, group in groups.items():
        scores = [run.score for run in group if run.score is not None]
        stderr = _stderr_of_samples(group) if deviation is None else deviation / math.sqrt(len(scores))
        entries.append(Entry(dict(values), tuple(group), sum(scores) / len(scores), stderr))
    factor = _NORMAL if deviation is None else _T[freedom - 1] if freedom <= len(_T) else _T_OF_MORE
    rest = tuple(run for run in runs if run.score is None)
    ordered = tuple(sorted(entries, key=lambda entry: entry.score))
    return Ranking(scored_by, ordered, rest, deviation is not None, factor)


def effects(ranking: Ranking, key: str) -> list[ValueEffect]:
    """Return the mean score at each value of a key, over the runs that differ from another in that key alone.

    Where a combination of the other values is finished at some values only, it would shift their mean, and is left out;
    unless no combination is finished at all of them.
    """
    by_value: dict[str, dict[tuple[str, ...], RankedRun]] = {}
    for run in ranking.runs:
        if run.score is not None and key in run.run.values:
            others = tuple(value for name, value in run.run.values.items() if name != key)
            by_value.setdefault(run.run.values[key], {})[others] = run
    shared = set.intersection(*(set(found) for found in by_value.values())) if by_value else set()
    means = []
    for value, found in by_value.items():
        chosen = [run for others, run in found.items() if not shared or others in shared]
        scores = [run.score for run in chosen if run.score is not None]
        names = {run.run.name for run in chosen}
        within = [entry for entry in ranking.entries if names & {run.run.name for run in entry.runs}]
        means.append(ValueEffect(value, sum(scores) / len(scores), _stderr_of_mean(within, ranking), len(scores)))
    return means


def _stderr_of_mean(entries: Sequence[Entry], ranking: Ranking) -> float | None:
    """Return the error of the mean of entries: seeds are independent, the validation samples are the same for all."""
    errors = [entry.stderr for entry in entries if entry.stderr is not None]
    if not errors or len(errors) < len(entries):
        return None
    return math.sqrt(sum(error**2 for error in errors)) / len(errors) if ranking.by_seeds else max(errors)


def _score(record: RunRecord, scored_by: Score, measure: Measure) -> tuple[float | None, float | None]:
    if scored_by == "training loss":
        loss = record.history.column("loss")
        end = loss[math.floor(len(loss) * (1 - _TRAINING_SHARE)) :]
        mean = float(np.mean(end)) if len(end) else math.nan
        return (mean if math.isfinite(mean) else None), None
    last = record.history.evaluations[-1:]
    if not last or not record.validations or last[0].get("step") != record.validations[-1].get("step"):
        return None, None  # its last loss is not finite
    result = results(record)
    final = result.final_validation_loss
    if measure == "loss":
        return final, result.validation_stderr
    if result.bits_per_byte is None or not final:
        return None, None
    stderr = result.validation_stderr
    return result.bits_per_byte, None if stderr is None else stderr * result.bits_per_byte / final


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """Return the standard deviation over seeds of all groups together, and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None, 0
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return math.sqrt(squares / freedom), freedom


def _stderr_of_samples(group: Sequence[RankedRun]) -> float | None:
    """Return the error of the mean of runs on the same validation samples, which they share: the largest of theirs."""
    known = [run.stderr for run in group if run.stderr is not None]
    return max(known) if len(known) == len(group) else None
