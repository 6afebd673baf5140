"""metrics.jsonl as columns: arrays of a few MB for half a million steps, where one dictionary per row takes half a GB.

Shapes: N rows of kind `train`, in file order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt

from megalm.runs.metrics_log import ATTEMPT_EVENTS, LOSS_OF, Columns, Row, RowBatch, live_rows

Numbers = npt.NDArray[np.float64]

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "loss_scale",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "memory_bytes",
    "expert_load_max",
    "dropped_tokens",
    "router_entropy",
    "attempt",
)

# A number beyond this is no measurement: sums and charts of it would overflow.
_LARGEST = 1e100

TRAINING, VALIDATION, CHECKPOINTS, REST = "training steps", "validation", "checkpoints", "samples, waiting and the rest"


@dataclass(frozen=True)
class History:
    """The metrics of a run.

    Attributes:
        train: name -> [N], also of each loss by dataset (LOSS_OF); NaN if a row lacks the number or has NaN.
        live: [N] whether the row counts; false if a resume, a rollback or another start has withdrawn it.
        evaluations: validation rows that count.
        tasks: answers to multiple-choice questions that count.
        events: all events.
        seconds: time of all attempts by activity, without pauses between attempts.
        last_time: unix seconds of the last row; None without rows.
    """

    train: dict[str, Numbers]
    live: npt.NDArray[np.bool_]
    evaluations: list[Row]
    tasks: list[Row]
    events: list[Row]
    seconds: dict[str, float]
    last_time: float | None

    @property
    def wall_seconds(self) -> float | None:
        return None if self.last_time is None else sum(self.seconds.values())

    @property
    def datasets(self) -> list[str]:
        """The datasets whose training losses are known."""
        return sorted(name.removeprefix(LOSS_OF) for name in self.train if name.startswith(LOSS_OF))

    def column(self, name: str) -> Numbers:
        """Return a column of the rows that count."""
        return self.train[name][self.live]


def read_history(batches: Iterable[RowBatch]) -> History:
    """Build a history from batches as `read_batches` yields them."""
    columns: dict[str, list[Numbers]] = {name: [] for name in COLUMNS}
    clock = _Clock()
    others: list[Row] = []
    kept_steps: list[tuple[int, int]] = []  # number of earlier training rows, and the step after which they go
    count = 0
    for batch in batches:
        trains = np.array([row["kind"] == "train" for row in batch.rows], dtype=np.bool_)
        places = np.flatnonzero(~trains).tolist()
        rows = batch.train if batch.train is not None else list(compress(batch.rows, trains))
        for name in _dataset_columns(rows) - columns.keys():
            columns[name] = [np.full(count, math.nan)]
        found = _numbers(rows, int(trains.sum()), (*columns, "time"))
        rest = [batch.rows[place] for place in places]
        for name, parts in columns.items():
            parts.append(found[name])
        clock.see(trains, found, rest)
        for number, (place, row) in enumerate(zip(places, rest, strict=True)):
            if row["kind"] in ("eval", "task", "event"):
                others.append(row)
                if row.get("event") in ATTEMPT_EVENTS and row.get("step") is not None:
                    kept_steps.append((count + place - number, row["step"]))
        count += len(trains) - len(rest)
    training = {name: np.concatenate([np.empty(0), *parts]) for name, parts in columns.items()}
    live = np.ones(count, dtype=np.bool_)
    for before, step in kept_steps:
        live[:before] &= training["step"][:before] <= step
    counting = list(live_rows(others))
    return History(
        training,
        live,
        [row for row in counting if row["kind"] == "eval"],
        [row for row in counting if row["kind"] == "task"],
        [row for row in others if row["kind"] == "event"],
        *clock.result(),
    )


def _dataset_columns(rows: Sequence[Row] | Columns) -> set[str]:
    keys = rows if isinstance(rows, dict) else dict.fromkeys(key for row in rows for key in row)
    return {key for key in keys if key.startswith(LOSS_OF)}


def _numbers(rows: Sequence[Row] | Columns, count: int, names: Iterable[str]) -> dict[str, Numbers]:
    """Name -> [count]; NaN for what a row lacks, and infinity for what is too large to be drawn or added up.

    Args:
        rows: the rows, or their columns.
    """
    found = {}
    for name in names:
        if isinstance(rows, dict):
            values = rows.get(name, np.full(count, math.nan))
        else:
            values = np.array([row.get(name) for row in rows], dtype=np.float64)
        too_large = np.abs(values) > _LARGEST
        found[name] = np.where(too_large, np.copysign(math.inf, values), values) if too_large.any() else values
    return found


# Kinds of rows for the clock. The time before a row that opens a process is a pause and not counted.
_TRAIN, _EVAL, _OTHER, _OPENS, _BEGINS, _ROLLS_BACK = range(6)
_CODES = {"train": _TRAIN, "eval": _EVAL, "task": _EVAL, "repair": _OPENS, "warning": _OPENS}
_CODES |= {"start": _BEGINS, "resume": _BEGINS, "rollback": _ROLLS_BACK}


class _Clock:
    """Attributes the time between two rows to the activity that the later row reports."""

    def __init__(self) -> None:
        self._parts: list[Numbers] = []  # [4, rows]: code, step, time, seconds that the row reports

    def see(self, trains: npt.NDArray[np.bool_], train: Mapping[str, Numbers], rest: Sequence[Row]) -> None:
        """Add rows in file order.

        Args:
            trains: [rows] which of them are training rows.
            train: the columns of those.
            rest: the others.
        """
        others = _numbers(rest, len(rest), ("step", "time", "stall_seconds"))
        codes = [float(_CODES.get(row.get("event") or row["kind"], _OTHER)) for row in rest]
        part = np.full((4, len(trains)), float(_TRAIN))
        part[1:, trains] = train["step"], train["time"], train["step_seconds"]
        part[:, ~trains] = codes, others["step"], others["time"], others["stall_seconds"]
        self._parts.append(part)

    def result(self) -> tuple[dict[str, float], float | None]:
        """Return the seconds of each activity, without pauses between attempts, and the time of the last row."""
        rows = np.concatenate([np.empty((4, 0)), *self._parts], axis=1)
        codes, steps, times, reported = rows[:, np.isfinite(rows[2])]
        train, evaluation = codes == _TRAIN, codes == _EVAL
        gaps = np.maximum(0.0, np.diff(times, prepend=times[:1]))
        gaps[(codes == _OPENS) | (codes == _BEGINS)] = 0.0
        # A training row stands for the steps since the last row that says where the run is.
        says_step = np.isfinite(steps) & (train | (codes >= _BEGINS))
        at = np.maximum.accumulate(np.where(says_step, np.arange(len(steps)), -1))[:-1]
        before = np.concatenate([np.zeros(min(1, len(steps))), np.where(at >= 0, steps[at], 0.0)])
        unknown = np.where(train, gaps, 0.0)
        named = np.where(np.isfinite(reported), reported * np.where(train, np.maximum(1, steps - before), 1), unknown)
        named = np.where(evaluation, gaps, np.clip(named, 0.0, gaps))
        seconds = {
            TRAINING: float(named[train].sum()),
            VALIDATION: float(named[evaluation].sum()),
            CHECKPOINTS: float(named[~train & ~evaluation].sum()),
            REST: float((gaps - named).sum()),
        }
        return seconds, float(times[-1]) if len(times) else None
