"""Two or more runs side by side: what differs in configuration, what came out, and the curves over tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import ConfigError
from megalm.tracking.metrics import METRICS_FILE, Row, live_rows, read_metrics
from megalm.tracking.run_folder import CONFIG_FILE, DEEPSPEED_FILE, flatten, read_mapping

# The first steps carry compilation and cache misses; the median of the rest is the run's speed.
_WARM_UP_SHARE = 0.1
# Differ in every two runs and say nothing about them.
_OWN_TO_A_RUN = ("run.name", "run.root")


@dataclass(frozen=True)
class Results:
    """What came out of a run; None where it was never measured."""

    steps: int | None
    tokens: int | None
    final_train_loss: float | None
    final_validation_loss: float | None
    best_validation_loss: float | None
    best_validation_step: int | None
    tokens_per_second: float | None
    mfu: float | None
    wall_seconds: float | None
    attempts: int


@dataclass(frozen=True)
class RunRecord:
    """A run folder read: settings flattened to dotted names, rows as they count after resumes and rollbacks."""

    name: str
    settings: dict[str, str]
    rows: list[Row]
    wall_seconds: float | None

    def curve(self, kind: str) -> tuple[list[float], list[float]]:
        """(tokens, loss) of the `train` or `eval` rows that count."""
        rows = [row for row in self.rows if _counts(row, kind) and "tokens" in row]
        return [float(row["tokens"]) for row in rows], [float(row["loss"]) for row in rows]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: no metrics.jsonl, or one that is not readable.
        ConfigError: a configuration file that is not readable.
    """
    rows = list(read_metrics(run_dir / METRICS_FILE))
    settings = dict(flatten(read_mapping(run_dir / CONFIG_FILE)))
    settings |= {f"deepspeed.{name}": value for name, value in flatten(read_mapping(run_dir / DEEPSPEED_FILE))}
    for name in _OWN_TO_A_RUN:
        settings.pop(name, None)
    return RunRecord(run_dir.resolve().name, settings, live_rows(rows), _wall_seconds(rows))


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str | None]]:
    """Name -> one value a run, for every setting on which the runs differ; None: not stated there."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def results(run: RunRecord) -> Results:
    """The numbers by which runs are judged; speed is a median, so that one stall does not move it."""
    train = [row for row in run.rows if row["kind"] == "train"]
    validation = [row for row in run.rows if _counts(row, "eval")]
    # With evaluate.max_samples the last one is on more than those while training, and no better or worse than they.
    alike = [row for row in validation if not row.get("whole")] or validation
    best = min(alike, key=lambda row: float(row["loss"]), default=None)
    steady = train[math.floor(len(train) * _WARM_UP_SHARE) :]
    return Results(
        steps=train[-1].get("step") if train else None,
        tokens=train[-1].get("tokens") if train else None,
        final_train_loss=train[-1].get("loss") if train else None,
        final_validation_loss=validation[-1]["loss"] if validation else None,
        best_validation_loss=best["loss"] if best else None,
        best_validation_step=best.get("step") if best else None,
        tokens_per_second=_median(row.get("tokens_per_second") for row in steady),
        mfu=_median(row.get("mfu") for row in steady),
        wall_seconds=run.wall_seconds,
        attempts=len({row.get("attempt") for row in train}),
    )


def plot_losses(runs: Sequence[RunRecord], path: Path) -> None:
    """Training (thin) and validation (marked) loss of every run over tokens, as a picture.

    Raises:
        ConfigError: the file's suffix names no format that can be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, and only here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)")
    for index, run in enumerate(runs):
        colour = f"C{index % 10}"
        axes.plot(*run.curve("train"), color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(*run.curve("eval"), color=colour, marker="o", markersize=3, label=run.name)
    axes.grid(alpha=0.3)
    axes.legend(title="with marks: validation")
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in canvas.get_supported_filetypes():
        raise ConfigError(f"{path}: {suffix or 'no suffix'} is no picture format; name a .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _wall_seconds(rows: list[Row]) -> float | None:
    """Time spent in all attempts; the pauses between them, before a start or resume, do not count."""
    total, before = 0.0, None
    for row in rows:
        if before is not None and row.get("event") not in ("start", "resume", "repair"):
            total += row["time"] - before
        before = row["time"]
    return total if rows else None


def _median(values: Iterable[object]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return statistics.median(numbers) if numbers else None


def _counts(row: Row, kind: str) -> bool:
    """Whether the row is one by which runs are judged: of several validation sets the total."""
    return row["kind"] == kind and row.get("dataset") in (None, "validation") and _finite(row.get("loss"))


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
