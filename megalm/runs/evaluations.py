"""What `megalm evaluate` has recorded in a run folder: rows of evaluations.jsonl, and their main number."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megalm.data.readers.questions import task_name
from megalm.errors import DataError
from megalm.runs.metrics_log import Row, read_metrics

EVALUATIONS_FILE = "evaluations.jsonl"


@dataclass(frozen=True)
class RecordedEvaluation:
    """The newest evaluation of one checkpoint on one set.

    Attributes:
        task: the set's name, without folder and ending; `total` over several sets.
        measure: of `value`: accuracy, bits per byte, or loss in nats per token where bytes are not known.
        count: of the questions or tokens, whose word is `unit`.
        error: standard error of an accuracy.
        ema: of the moving average of the weights.
    """

    step: int
    task: str
    measure: str
    value: float
    count: int
    unit: str
    error: float | None = None
    ema: bool = False

    @property
    def name(self) -> str:
        """Two evaluations with the same name compare, of the same or of other runs."""
        return f"{self.task}{' (EMA)' if self.ema else ''}, {self.measure} of {self.count:,} {self.unit}"


def read_evaluations(run_dir: Path) -> list[RecordedEvaluation]:
    """Return the newest evaluation of each checkpoint and set, by step; [] if there is none.

    A damaged line, which no training depends on, ends the list.
    """
    rows: list[Row] = []
    path = run_dir / EVALUATIONS_FILE
    with contextlib.suppress(DataError):
        rows.extend(read_metrics(path) if path.exists() else ())
    return newest(rows)


def newest(rows: Iterable[Row]) -> list[RecordedEvaluation]:
    """Return the newest evaluation of each step and set in rows of evaluations.jsonl, or of kind `task`, by step."""
    found = {(one.step, one.name): one for row in rows for one in main_numbers(row)}
    return sorted(found.values(), key=lambda one: (one.step, one.name))


def main_numbers(row: Row) -> list[RecordedEvaluation]:
    """Return the main number of a row, or every metric of a task of lm-eval; [] of a row without any."""
    questions = row.get("questions")
    count, step = questions or row.get("targets"), row.get("step")
    if not isinstance(count, int) or not isinstance(step, int):
        return []
    metrics, errors = row.get("metrics"), row.get("errors")
    if isinstance(metrics, dict) and isinstance(errors, dict):
        measures = [(name, value, errors.get(name)) for name, value in metrics.items()]
    elif questions:
        measures = [("accuracy", row.get("accuracy"), row.get("accuracy_error"))]
    else:
        measures = [("bits per byte", row.get("bits_per_byte"), None), ("loss", row.get("loss"), None)]
    examples = f" ({row['fewshot']}-shot)" if row.get("fewshot") else ""
    known = [each for each in measures if isinstance(each[1], float) and math.isfinite(each[1])]
    task, is_ema = task_name(str(row.get("dataset") or "validation")), row.get("ema") is True
    unit = "questions" if questions else "tokens"
    return [
        RecordedEvaluation(step, f"{task}{examples}", measure, value, count, unit, error, is_ema)
        for measure, value, error in (known if metrics else known[:1])
    ]
