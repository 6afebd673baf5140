"""Compare two or more runs: differing settings, results, and loss curves over tokens."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.runs.metrics_history import History, Numbers, read_history
from megalm.runs.metrics_log import ATTEMPT_EVENTS, METRICS_FILE, ReadBatches, Row, read_batches
from megalm.runs.run_folder import parameter_count
from megalm.tracking.mlflow_mirror.run_facts import settings
from megalm.utils.formatting import perplexity_of
from megalm.utils.plotting import new_plot, save_plot

# The first steps carry compilation and cache misses; the median of the rest is the run's speed.
_WARM_UP_SHARE = 0.1
# These differ between any two runs and are not worth comparing.
_OWN_TO_A_RUN = ("run.name", "run.root")
_LEGEND_CHARACTERS = 50  # per line: half of the picture's width
TOTAL = "validation"  # the only validation set, or all sets together


@dataclass(frozen=True)
class Results:
    """The results of a run; None for a number that was never measured.

    Attributes:
        attempts: number of attempts begun, including those of rollbacks.
        scatter: name -> median absolute deviation of a per-step number; for the training loss, over the last tenth of
            the steps.
    """

    parameters: int | None
    steps: int | None
    tokens: int | None
    final_train_loss: float | None
    final_validation_loss: float | None
    best_validation_loss: float | None
    best_validation_step: int | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    wall_seconds: float | None
    attempts: int
    scatter: dict[str, float]

    @property
    def tokens_per_parameter(self) -> float | None:
        return None if not self.tokens or not self.parameters else self.tokens / self.parameters

    @property
    def final_perplexity(self) -> float | None:
        loss = self.final_validation_loss
        return None if loss is None else perplexity_of(loss)


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder: settings flattened to dotted names, and its history."""

    name: str
    settings: dict[str, str]
    history: History
    parameters: int | None = None

    def curve(self, kind: str) -> tuple[list[float], list[float]]:
        """Return (tokens, loss) of the `train` or `eval` rows that count."""
        if kind == "train":
            tokens, loss = self.history.column("tokens"), self.history.column("loss")
            known = np.isfinite(tokens) & np.isfinite(loss)
            return tokens[known].tolist(), loss[known].tolist()
        rows = [row for row in comparable_validations(self.history.evaluations) if "tokens" in row]
        return [float(row["tokens"]) for row in rows], [float(row["loss"]) for row in rows]


def read_run(run_dir: Path, read: ReadBatches = read_batches) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: no metrics.jsonl, or one that is not readable.
        ConfigError: a configuration file is not readable.
    """
    history = read_history(read(run_dir / METRICS_FILE))
    found = settings(run_dir)
    for name in _OWN_TO_A_RUN:
        found.pop(name, None)
    return RunRecord(run_dir.resolve().name, found, history, parameter_count(run_dir))


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str | None]]:
    """Return name -> one value per run, for every setting on which the runs differ; None: not set in that run."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def results(run: RunRecord) -> Results:
    """Return the numbers by which runs are compared; speed is a median, so that one stall does not shift it."""
    history = run.history
    validation = comparable_validations(history.evaluations)
    # With evaluate.max_samples the last validation covers more samples, so its loss does not compare with the others.
    alike = [row for row in validation if not row.get("whole")] or validation
    best = min(alike, key=lambda row: float(row["loss"]), default=None)
    last = {name: _last(history.column(name)) for name in ("step", "tokens", "loss")}
    count = int(history.live.sum())
    steady, end = math.floor(count * _WARM_UP_SHARE), math.floor(count * (1 - _WARM_UP_SHARE))
    speeds = {name: history.column(name)[steady:] for name in ("tokens_per_second", "step_seconds", "mfu")}
    scatter = {name: _scatter(values) for name, values in {**speeds, "loss": history.column("loss")[end:]}.items()}
    return Results(
        parameters=run.parameters,
        steps=_whole(last["step"]),
        tokens=_whole(last["tokens"]),
        final_train_loss=last["loss"],
        final_validation_loss=validation[-1]["loss"] if validation else None,
        best_validation_loss=best["loss"] if best else None,
        best_validation_step=best.get("step") if best else None,
        bits_per_byte=validation[-1].get("bits_per_byte") if validation else None,
        tokens_per_second=_median(speeds["tokens_per_second"]),
        step_seconds=_median(speeds["step_seconds"]),
        mfu=_median(speeds["mfu"]),
        wall_seconds=history.wall_seconds,
        attempts=sum(row.get("event") in ATTEMPT_EVENTS for row in history.events),
        scatter={name: value for name, value in scatter.items() if value is not None},
    )


def plot_losses(runs: Sequence[RunRecord], path: Path, names: Sequence[str] | None = None) -> None:
    """Draw training (thin) and validation (marked) loss of every run over tokens into a picture file.

    Args:
        names: the runs' names in the legend; None: their folders' names.

    Raises:
        ConfigError: the file's suffix is not a supported format, or the file cannot be written.
    """
    figure, axes = new_plot("tokens", "loss (nats per token)")
    for index, run in enumerate(runs):
        colour = f"C{index % 10}"
        axes.plot(*run.curve("train"), color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(*run.curve("eval"), color=colour, marker="o", markersize=3, label=str(index))
    legend = axes.legend(title="marked: validation")
    for text, name in zip(legend.get_texts(), names or [run.name for run in runs], strict=True):
        # Not as a label: one that begins with "_" would be left out, and "$" would be read as mathematics.
        text.set_parse_math(False)
        text.set_text(textwrap.fill(name, _LEGEND_CHARACTERS, break_on_hyphens=False))
    save_plot(figure, path)


def comparable_validations(rows: Sequence[Row]) -> list[Row]:
    """Return the validation rows by which runs are compared: with several validation sets, those of the total."""
    return [row for row in rows if row.get("dataset") in (None, TOTAL) and _finite(row.get("loss"))]


def _last(values: Numbers) -> float | None:
    return None if not len(values) else float(values[-1])


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) else None


def _median(values: Numbers) -> float | None:
    numbers = values[np.isfinite(values)]
    return float(np.median(numbers)) if len(numbers) else None


def _scatter(values: Numbers) -> float | None:
    """Return the median absolute deviation; None for fewer than five values."""
    numbers = values[np.isfinite(values)]
    return float(np.median(np.abs(numbers - np.median(numbers)))) if len(numbers) >= 5 else None


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
