"""The head of a run's page: its outcome in one sentence, and its main numbers, each with a baseline or context."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Literal

from megalm.planning.batch_size import TrainingStages
from megalm.runs.metrics_log import ATTEMPT_EVENTS, Row, wall_limit
from megalm.tracking.compare_runs import comparable_validations
from megalm.tracking.report.run_data import Failure, ReportData
from megalm.utils.formatting import format_duration, perplexity_of


@dataclass(frozen=True)
class Number:
    name: str
    value: str
    note: str = ""


def numbers(run: ReportData) -> list[Number]:
    """Return the main numbers, as far as they are known."""
    found, evaluations = run.results, comparable_validations(run.history.evaluations)
    shown = []
    if evaluations:
        last = evaluations[-1]
        noise = f", standard error {found.validation_stderr:.4f}" if found.validation_stderr is not None else ""
        shown.append(Number("Validation loss", f"{last['loss']:.4f}", f"last, {_where(last)}{noise}"))
        if found.validation_ema_loss is not None:
            shown.append(Number("With averaged weights", f"{found.validation_ema_loss:.4f}", "last, the same tokens"))
        if found.best_validation_loss is not None:
            like = f"step {found.best_validation_step:,}" if found.best_validation_step is not None else ""
            if found.best_validation_targets != found.validation_targets and found.best_validation_targets:
                like += f" over {found.best_validation_targets:,} tokens, which are not those of the last"
            shown.append(Number("Best while training", f"{found.best_validation_loss:.4f}", like))
        perplexity = last.get("perplexity", perplexity_of(last["loss"]))
        shown.append(Number("Perplexity", f"{perplexity:,.2f}", _frequency_baseline(run, perplexity_of)))
        if last.get("bits_per_byte") is not None:
            bits = last["bits_per_byte"]
            # The same text and tokens: bits per byte are proportional to nats.
            baseline = _frequency_baseline(run, lambda nats: nats * bits / last["loss"]) if last["loss"] else ""
            shown.append(Number("Bits per byte", f"{bits:.3f}", baseline))
    if found.final_train_loss is not None:
        scatter = found.scatter.get("loss")
        note = f"last step; half of the last tenth of the steps are within ±{scatter:.3f}" if scatter else "last step"
        shown.append(Number("Training loss", f"{found.final_train_loss:.4f}", note))
    if found.tokens is not None:
        ratio = found.tokens_per_parameter
        shown.append(Number("Tokens", f"{found.tokens:,}", f"{ratio:.2f} per parameter" if ratio is not None else ""))
    if found.parameters is not None:
        shown.append(Number("Parameters", f"{found.parameters:,}"))
    if (epochs := _epochs(run)) is not None:
        shown.append(Number("Epochs", f"{epochs:.2f}", "of the training dataset"))
    if found.tokens_per_second is not None:
        seconds = f"{found.step_seconds:.3g} s per step, medians" if found.step_seconds is not None else "median"
        shown.append(Number("Tokens per second", f"{found.tokens_per_second:,.0f}", seconds))
    if found.mfu is not None:
        shown.append(Number("MFU", f"{found.mfu:.1%}", "median"))
    if found.wall_seconds is not None:
        times = "in 1 attempt" if found.attempts == 1 else f"in {found.attempts} attempts, without pauses"
        shown.append(Number("Wall time", format_duration(found.wall_seconds), times))
    return shown


def _where(row: dict[str, Any]) -> str:
    over = f" over {row['targets']:,} tokens" if isinstance(row.get("targets"), int) else ""
    return f"step {row.get('step', 0):,}{over}"


def _frequency_baseline(run: ReportData, turned: Any) -> str:
    """Return the baseline of a model that knows only the frequency of each token."""
    entropy = run.environment.get("unigram_entropy")
    if not isinstance(entropy, (int, float)):
        return ""
    return f"token frequencies alone: {turned(entropy):,.4g}"


def _epochs(run: ReportData) -> float | None:
    """Return the epochs trained on the dataset, if there is only one."""
    match run.environment, run.results.steps:
        case {"datasets": [{"epochs": int() | float() as epochs}], "planned_steps": int() as planned}, int() as steps:
            if (stages := TrainingStages.from_json(run.environment.get("training_stages"))) is not None and planned:
                return epochs * stages.tokens(steps) / stages.tokens(planned)
            return epochs * steps / planned if planned else None
    return None


Kind = Literal["finished", "stopped", "failed", "running", "unknown", "waiting"]


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    sentence: str


def outcome(run: ReportData, now: float) -> Outcome:
    """Return the run's outcome as of unix time `now`."""
    begun = max((int(row.get("attempt") or 1) for row in run.events(*ATTEMPT_EVENTS)), default=0)
    failure = run.failures[-1] if run.failures else None
    if failure is not None and failure.attempt > begun:
        again = f" Before that it was {progress(run)}." if begun else ""
        return Outcome("failed", f"Failed before it began to train: {failure.last_line}{again}")
    if not begun:
        starting = Outcome("running", "Starting: no step is done yet.")
        return starting if run.is_held else Outcome("waiting", "Training has not begun.")
    last = _since_last_begin(run.history.events)
    ends = [row for row in last if row.get("event") == "end"]
    return _ended(run, ends[-1], last, failure) if ends else _without_end(run, now)


def progress(run: ReportData) -> str:
    """Return the progress in words: `at step 30 of 60`."""
    step, planned = run.results.steps, run.planned_steps
    of = f" of {planned:,}" if planned is not None else ""
    return f"at step {step or 0:,}{of}"


def moment(seconds: float) -> str:
    """Format unix seconds in this machine's time zone."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _ended(run: ReportData, end: Row, last: list[Row], failure: Failure | None) -> Outcome:
    where = progress(run)
    if end.get("status") == "finished":
        early = any(row.get("event") == "early_stop" for row in last)
        why = ", because the validation loss stopped falling (evaluate.patience)" if early else ""
        return Outcome("finished", f"Finished {where}{why}.")
    if end.get("status") == "stopped":
        return Outcome("stopped", f"Stopped {where}{_why_stopped(last)}. It is saved and can resume.")
    why = f": {failure.last_line}" if failure is not None and failure.last_line else "; its error was not saved"
    return Outcome("failed", f"Failed {where}{why}")


def _without_end(run: ReportData, now: float) -> Outcome:
    seen = run.history.last_time
    last_row = "" if seen is None else f"; last row {format_duration(now - seen)} before this page, {moment(seen)}"
    if run.is_held:
        return Outcome("running", f"Running, {progress(run)}{last_row}.")
    return Outcome(
        "unknown", f"Killed, or its machine failed: it wrote no end event. It was {progress(run)}{last_row}."
    )


def _why_stopped(last: list[Row]) -> str:
    for row in reversed(last):
        if row.get("event") == "signal":
            return f" by signal {row.get('signal', '')}".rstrip()
        if row.get("event") == "wall_time":
            return f" because {wall_limit(row.get('limit'))} was reached"
    return ""


def _since_last_begin(events: list[Row]) -> list[Row]:
    begins = [index for index, row in enumerate(events) if row.get("event") in ("start", "resume")]
    return events[begins[-1] :] if begins else events
