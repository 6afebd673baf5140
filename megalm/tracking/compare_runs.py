"""Compare two or more runs: differing settings, results, loss curves, and what of them does not compare."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megalm.runs.evaluations import RecordedEvaluation, newest, read_evaluations
from megalm.runs.metrics_history import History, Numbers, read_history
from megalm.runs.metrics_log import ATTEMPT_EVENTS, LOSS_OF, METRICS_FILE, TOTAL, ReadBatches, Row, read_batches
from megalm.runs.run_folder import ENVIRONMENT_FILE, parameter_count, read_mapping
from megalm.tracking.mlflow_mirror.run_facts import settings
from megalm.utils.formatting import perplexity_of
from megalm.utils.plotting import new_plot, save_plot

# The first steps carry compilation and cache misses; the median of the rest is the run's speed.
_WARM_UP_SHARE = 0.1
# These differ between any two runs and are not worth comparing.
_OWN_TO_A_RUN = ("run.name", "run.root")
_LEGEND_CHARACTERS = 50  # per line: half of the picture's width

Across = Literal["tokens", "time", "flops"]
AXES: dict[Across, str] = {"tokens": "tokens", "time": "seconds of training", "flops": "training FLOPs"}
Measure = Literal["loss", "bits_per_byte"]  # nats per token, or bits per byte, which other tokenizers do not change
UNITS: dict[Measure, str] = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Results:
    """The results of a run; None for a number that was never measured.

    Attributes:
        validation_targets, best_validation_targets: tokens that the last and the best validation loss are means of; the
            two do not compare where these differ.
        validation_stderr: standard error of the last validation loss by the choice of the samples.
        validation_ema_loss: the last validation loss with the moving average of the weights.
        attempts: number of attempts begun, including those of rollbacks.
        scatter: name -> median absolute deviation of a per-step number; for the training loss, over the last tenth of
            the steps.
        dataset_losses: training loss by dataset of a mixture, the mean over the last tenth of the steps.
        evaluations: name -> main number of the newest checkpoint that training or `megalm evaluate` has evaluated on
            it; the name has the set, the measure and the number of tokens or questions, so equal names compare.
    """

    parameters: int | None
    steps: int | None
    tokens: int | None
    final_train_loss: float | None
    final_validation_loss: float | None
    validation_targets: int | None
    validation_stderr: float | None
    validation_ema_loss: float | None
    best_validation_loss: float | None
    best_validation_step: int | None
    best_validation_targets: int | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    wall_seconds: float | None
    attempts: int
    scatter: dict[str, float]
    dataset_losses: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_parameter(self) -> float | None:
        return None if not self.tokens or not self.parameters else self.tokens / self.parameters

    @property
    def final_perplexity(self) -> float | None:
        loss = self.final_validation_loss
        return None if loss is None else perplexity_of(loss)


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder: settings flattened to dotted names, its history, and environment.json."""

    name: str
    settings: dict[str, str]
    history: History
    parameters: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[RecordedEvaluation] = ()

    @property
    def validations(self) -> list[Row]:
        return comparable_validations(self.history.evaluations)

    def training_curve(self, across: Across = "tokens") -> Curve:
        """Return (x, loss) of the training rows that count."""
        x, loss = self._x(across), self.history.column("loss")
        known = np.isfinite(x) & np.isfinite(loss)
        return list(zip(x[known].tolist(), loss[known].tolist(), strict=True))

    def validation_curves(self, across: Across = "tokens", measure: Measure = "loss") -> list[Curve]:
        """Return (x, loss) of the validations that count; a curve for each stretch over the same number of tokens."""
        rows = [row for row in self.validations if "tokens" in row and _finite(row.get(measure))]
        tokens, x = self.history.column("tokens"), self._x(across)
        known = np.isfinite(tokens) & np.isfinite(x)

        def place(row: Row) -> float:
            at = float(row["tokens"])
            return at if across == "tokens" else float(np.interp(at, [0.0, *tokens[known]], [0.0, *x[known]]))

        if across != "tokens" and not known.any():
            return []
        groups = groupby(rows, key=lambda row: row.get("targets"))
        return [[(place(row), float(row[measure])) for row in group] for _, group in groups]

    def _x(self, across: Across) -> Numbers:
        """Return x of the training rows that count: tokens, seconds of their steps, or FLOPs; NaN if not known."""
        tokens = self.history.column("tokens")
        if across == "tokens":
            return tokens
        if across == "time":
            steps = np.diff(self.history.column("step"), prepend=0.0)
            return np.cumsum(steps * self.history.column("step_seconds"))
        flops = self.environment.get("flops_per_token")
        return tokens * (float(flops) if isinstance(flops, (int, float)) else math.nan)


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
    environment = read_mapping(run_dir / ENVIRONMENT_FILE)
    evaluations = sorted([*newest(history.tasks), *read_evaluations(run_dir)], key=lambda one: one.step)
    return RunRecord(run_dir.resolve().name, found, history, parameter_count(run_dir), environment, evaluations)


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str | None]]:
    """Return name -> one value per run, for every setting on which the runs differ; None: not set in that run."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def results(run: RunRecord) -> Results:
    """Return the numbers by which runs are compared; speed is a median, so that one stall does not shift it."""
    history = run.history
    validation = run.validations
    end_row: Row = validation[-1] if validation else {}
    # With evaluate.max_samples the last validation covers more samples, so its loss does not compare with the others.
    in_training = [row for row in validation if not row.get("whole")] or validation
    alike = [row for row in validation if row.get("targets") == in_training[-1].get("targets")]
    if in_training[-1:] and in_training[-1].get("targets") is None:  # of a version that did not count them
        alike = in_training
    best = min(alike, key=lambda row: float(row["loss"]), default=None)
    last = {name: _last(history.column(name)) for name in ("step", "tokens", "loss")}
    count = int(history.live.sum())
    steady, end = math.floor(count * _WARM_UP_SHARE), math.floor(count * (1 - _WARM_UP_SHARE))
    speeds = {name: history.column(name)[steady:] for name in ("tokens_per_second", "step_seconds", "mfu")}
    last_losses = history.column("loss")[end:]
    scatter = {name: _of_finite(it, _median_deviation, 5) for name, it in {**speeds, "loss": last_losses}.items()}
    by_dataset = {name: _of_finite(history.column(LOSS_OF + name)[end:], np.mean) for name in history.datasets}
    return Results(
        parameters=run.parameters,
        steps=_whole(last["step"]),
        tokens=_whole(last["tokens"]),
        final_train_loss=last["loss"],
        final_validation_loss=end_row.get("loss"),
        validation_targets=end_row.get("targets"),
        validation_stderr=end_row.get("loss_stderr"),
        validation_ema_loss=end_row.get("ema_loss"),
        best_validation_loss=best["loss"] if best else None,
        best_validation_step=best.get("step") if best else None,
        best_validation_targets=best.get("targets") if best else None,
        bits_per_byte=end_row.get("bits_per_byte"),
        tokens_per_second=_of_finite(speeds["tokens_per_second"], np.median),
        step_seconds=_of_finite(speeds["step_seconds"], np.median),
        mfu=_of_finite(speeds["mfu"], np.median),
        wall_seconds=history.wall_seconds,
        attempts=sum(row.get("event") in ATTEMPT_EVENTS for row in history.events),
        scatter={name: value for name, value in scatter.items() if value is not None},
        dataset_losses={name: loss for name, loss in by_dataset.items() if loss is not None},
        evaluations={one.name: one.value for one in run.evaluations},  # by step: the newest counts
    )


def measure_of(runs: Sequence[RunRecord]) -> Measure:
    """Return in what the validation losses of these runs compare: bits per byte if their tokenizers differ."""
    return "bits_per_byte" if len(_stated(runs, "tokenizer_fingerprint")) > 1 else "loss"


def validations_compare(runs: Sequence[RunRecord]) -> bool:
    """Return whether the last validations are over the same samples, as far as the runs say; with other tokenizers
    nobody can tell whether the text is the same."""
    return measure_of(runs) == "bits_per_byte" or not incomparable(runs)


def incomparable(runs: Sequence[RunRecord], names: Sequence[str] | None = None) -> list[str]:
    """Return what of these runs does not compare, one sentence each: other tokenizers, validation data, or counts."""
    names = names or [run.name for run in runs]
    last_targets = [run.validations[-1].get("targets") if run.validations else None for run in runs]
    found = []
    if tokenizers := _different(_stated(runs, "tokenizer_fingerprint"), names):
        found.append(
            f"the tokenizers differ ({tokenizers}), so losses and perplexities per token do not compare; bits per byte "
            "do"
        )
    if data := _different(_stated(runs, "validation_fingerprint"), names):
        # Other tokenizers cut the same text to other samples.
        same_text = "; bits per byte compare if it is the same text" if tokenizers else ""
        found.append(f"the validation data differ ({data}), so validation losses do not compare{same_text}")
    elif counts := _different(_grouped(last_targets), names, "{:,} tokens"):
        found.append(
            f"the last validation losses are means over other numbers of tokens ({counts}); compare runs whose last "
            "validation is over all samples"
        )
    return found


def _stated(runs: Sequence[RunRecord], fact: str) -> dict[object, list[int]]:
    """Value of a fact of environment.json -> the runs that have it."""
    return _grouped([run.environment.get(fact) for run in runs])


def _grouped(values: Sequence[object]) -> dict[object, list[int]]:
    """Value -> the places that have it; those of None are left out."""
    found: dict[object, list[int]] = {}
    for index, value in enumerate(values):
        if value is not None:
            found.setdefault(value, []).append(index)
    return found


def _different(groups: Mapping[object, Sequence[int]], names: Sequence[str], form: str = "") -> str:
    """Return the groups of runs by name: `a, b: 64 tokens; c: 128 tokens`; "" if there is no more than one."""
    if len(groups) < 2:
        return ""
    members = [(", ".join(names[index] for index in group), value) for value, group in groups.items()]
    return "; ".join(f"{who}: {form.format(value)}" if form else who for who, value in members)


def plot_losses(
    runs: Sequence[RunRecord], path: Path, names: Sequence[str] | None = None, across: Across = "tokens"
) -> None:
    """Draw training (thin) and validation (marked) loss of every run into a picture file.

    Validation losses over other numbers of tokens are not joined. Training losses of other tokenizers are left out.

    Args:
        names: the runs' names in the legend; None: their folders' names.

    Raises:
        ConfigError: the file's suffix is not a supported format, or the file cannot be written.
    """
    measure = measure_of(runs)
    figure, axes = new_plot(AXES[across], f"loss ({UNITS[measure]})")
    for index, run in enumerate(runs):
        colour = f"C{index % 10}"
        if measure == "loss":
            axes.plot(*_columns(run.training_curve(across)), color=colour, linewidth=0.8, alpha=0.6)
        label = str(index)
        for curve in run.validation_curves(across, measure) or [[]]:
            axes.plot(*_columns(curve), color=colour, marker="o", markersize=3, label=label)
            label = "_nolegend_"
    legend = axes.legend(title="marked: validation")
    for text, name in zip(legend.get_texts(), names or [run.name for run in runs], strict=True):
        # Not as a label: one that begins with "_" would be left out, and "$" would be read as mathematics.
        text.set_parse_math(False)
        text.set_text(textwrap.fill(name, _LEGEND_CHARACTERS, break_on_hyphens=False))
    save_plot(figure, path)


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def comparable_validations(rows: Sequence[Row]) -> list[Row]:
    """Return the validation rows by which runs are compared: with several validation sets, those of the total."""
    return [row for row in rows if row.get("dataset") in (None, TOTAL) and _finite(row.get("loss"))]


def _last(values: Numbers) -> float | None:
    return None if not len(values) else float(values[-1])


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) else None


def _of_finite(values: Numbers, of: Callable[[Numbers], Any], fewest: int = 1) -> float | None:
    """Return `of` the finite values; None for fewer than `fewest` of them."""
    numbers = values[np.isfinite(values)]
    return float(of(numbers)) if len(numbers) >= fewest else None


def _median_deviation(numbers: Numbers) -> Any:
    return np.median(np.abs(numbers - np.median(numbers)))


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
