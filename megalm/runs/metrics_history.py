"""metrics.jsonl as columns: arrays of a few MB for half a million steps, where one dictionary per row takes half a GB.

Shapes: N rows of kind `train`, in file order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.runs.metrics_log import ATTEMPT_EVENTS, Row, live_rows

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
    "attempt",
)

# Events written before a process trains: the time since the previous row is a pause and not counted.
_OPENING = ("start", "resume", "repair", "warning")

TRAINING, VALIDATION, CHECKPOINTS, REST = "training steps", "validation", "checkpoints", "samples, waiting and the rest"


@dataclass(frozen=True)
class History:
    """The metrics of a run.

    Attributes:
        train: name -> [N]; NaN if a row lacks the number or has NaN.
        live: [N] whether the row counts; false if a resume, a rollback or another start has withdrawn it.
        evaluations: validation rows that count.
        events: all events.
        seconds: time of all attempts by activity, without pauses between attempts.
        last_time: unix seconds of the last row; None without rows.
    """

    train: dict[str, Numbers]
    live: npt.NDArray[np.bool_]
    evaluations: list[Row]
    events: list[Row]
    seconds: dict[str, float]
    last_time: float | None

    @property
    def wall_seconds(self) -> float | None:
        return None if self.last_time is None else sum(self.seconds.values())

    def column(self, name: str) -> Numbers:
        """Return a column of the rows that count."""
        return self.train[name][self.live]


def read_history(rows: Iterable[Row]) -> History:
    """Build a history from rows as `read_metrics` yields them, one at a time."""
    columns = {name: array("d") for name in COLUMNS}
    train = columns["step"]
    others: list[Row] = []
    kept_steps: list[tuple[int, int]] = []  # number of earlier rows, and the step after which they are withdrawn
    clock = _Clock()
    for row in rows:
        kind = row["kind"]
        if kind == "train":
            for name, values in columns.items():
                value = row.get(name)
                values.append(value if isinstance(value, (int, float)) else math.nan)
        elif kind in ("eval", "event"):
            others.append(row)
            if row.get("event") in ATTEMPT_EVENTS and isinstance(row.get("step"), int):
                kept_steps.append((len(train), row["step"]))
        clock.see(row)
    found = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    found["step"] = np.nan_to_num(found["step"])
    live = np.ones(len(train), dtype=np.bool_)
    for before, step in kept_steps:
        live[:before] &= found["step"][:before] <= step
    return History(
        found,
        live,
        [row for row in live_rows(others) if row["kind"] == "eval"],
        [row for row in others if row["kind"] == "event"],
        clock.seconds,
        clock.before,
    )


class _Clock:
    """Attributes the time between two rows to the activity that the later row reports."""

    def __init__(self) -> None:
        self.before: float | None = None
        self.seconds = dict.fromkeys((TRAINING, VALIDATION, CHECKPOINTS, REST), 0.0)
        self._step = 0

    def see(self, row: Row) -> None:
        now = row.get("time")
        if not isinstance(now, (int, float)):
            return
        event = row.get("event")
        if self.before is not None and event not in _OPENING:
            gap = max(0.0, now - self.before)
            work, named = self._named(row, gap)
            self.seconds[work] += named
            self.seconds[REST] += gap - named
        self.before = now
        step = row.get("step")
        if isinstance(step, int) and (row["kind"] == "train" or event in ATTEMPT_EVENTS):
            self._step = step

    def _named(self, row: Row, gap: float) -> tuple[str, float]:
        """Return the row's activity, and the seconds of the gap that it took."""
        if row["kind"] == "eval":
            return VALIDATION, gap
        if row["kind"] == "train":
            steps = max(1, row.get("step", 0) - self._step)  # a row may stand for several
            return TRAINING, min(gap, _number(row.get("step_seconds"), gap) * steps)
        return CHECKPOINTS, min(gap, _number(row.get("stall_seconds"), 0.0))


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else otherwise
