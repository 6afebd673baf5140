"""What `megalm evaluate` has recorded in a run folder: rows of evaluations.jsonl, and their main number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import DataError
from megalm.runs.metrics_log import Row, read_metrics

EVALUATIONS_FILE = "evaluations.jsonl"
_ENDINGS = (".jsonl", ".json", ".txt", ".parquet")


@dataclass(frozen=True)
class RecordedEvaluation:
    """The newest evaluation of one checkpoint on one set.

    Attributes:
        task: the set's name, without folder and ending; `total` over several sets.
        measure: of `value`: accuracy, bits per byte, or loss in nats per token where bytes are not known.
        count: of the questions or tokens, whose word is `unit`.
        error: standard error of an accuracy.
    """

    step: int
    task: str
    measure: str
    value: float
    count: int
    unit: str
    error: float | None = None

    @property
    def name(self) -> str:
        """Two evaluations with the same name compare, of the same or of other runs."""
        return f"{self.task}, {self.measure} of {self.count:,} {self.unit}"


def task_name(dataset: str) -> str:
    """The name of a set, a prefix, or a file of text or questions, packed or not."""
    name = Path(dataset).name.removesuffix(".zst").removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def read_evaluations(run_dir: Path) -> list[RecordedEvaluation]:
    """Return the newest evaluation of each checkpoint and set, by step; [] if there is none.

    A damaged line, which no training depends on, ends the list.
    """
    found: dict[tuple[int, str], RecordedEvaluation] = {}
    path = run_dir / EVALUATIONS_FILE
    try:
        for row in read_metrics(path) if path.exists() else ():
            if one := _evaluation(row):
                found[one.step, one.name] = one
    except DataError:
        pass
    return sorted(found.values(), key=lambda one: (one.step, one.name))


def _evaluation(row: Row) -> RecordedEvaluation | None:
    questions = row.get("questions")
    measures = (("accuracy", "accuracy"),) if questions else (("bits per byte", "bits_per_byte"), ("loss", "loss"))
    count, step = questions or row.get("targets"), row.get("step")
    if not isinstance(count, int) or not isinstance(step, int):
        return None
    for measure, key in measures:
        value = row.get(key)
        if isinstance(value, float) and math.isfinite(value):
            unit, error = "questions" if questions else "tokens", row.get("accuracy_error")
            task = task_name(str(row.get("dataset") or "validation"))
            return RecordedEvaluation(step, task, measure, value, count, unit, error if questions else None)
    return None
