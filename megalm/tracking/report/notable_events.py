"""The unusual events of a run for its page, with the texts of spike reports, failures and stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.runs.metrics_history import History
from megalm.runs.metrics_log import Row, describe_straggler, describe_unbalanced_experts, wall_limit
from megalm.tracking.report.curves import event_step
from megalm.tracking.report.run_data import ReportData, text_of
from megalm.utils.formatting import format_duration

# Limits that keep the page readable: texts, lines of one kind, and the length of each text.
_SHOWN_TEXTS = 12
_SHOWN_OF_A_KIND = 30
_TEXT_BYTES = 12_000
_FAILURE_CHARACTERS = 8_000
_SLOW_FACTOR = 2.0
_SLOW_SHARE = 0.005  # of all training time; less is not worth reporting
_SLOW_SHOWN = 5
_USUAL = ("start", "checkpoint", "copied", "end", "profile", "traffic", "experts")


@dataclass(frozen=True)
class Finding:
    """A line of the list, with the title and content of a longer text, if any."""

    step: int | None
    kind: str
    sentence: str
    text_title: str = ""
    text: str = ""


def findings(run: ReportData) -> list[Finding]:
    """Return everything unusual; empty if there is nothing."""
    history = run.history
    return [
        *_failures(run),
        *_silent_ends(history),
        *_events(run),
        *_not_finite(history),
        *_checkpoints(run),
        *_slow(history),
        *_stacks(run.run_dir),
    ]


def _events(run: ReportData) -> Iterator[Finding]:
    counts: dict[str, int] = {}
    texts = 0
    for row in run.history.events:
        kind = str(row.get("event"))
        if kind in _USUAL or (kind == "skip" and row.get("at_step") is not None):
            continue
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] > _SHOWN_OF_A_KIND:
            continue
        title, text = "", ""
        if kind == "spike" and row.get("report") and texts < _SHOWN_TEXTS:
            texts += 1
            title, text = _report(run.run_dir, str(row["report"]))
        yield Finding(event_step(row), kind.replace("_", " "), _sentence(row), title, text)
    for kind, count in counts.items():
        if count > _SHOWN_OF_A_KIND:
            yield Finding(None, kind, f"{count - _SHOWN_OF_A_KIND:,} more are in metrics.jsonl")


def _silent_ends(history: History) -> Iterator[Finding]:
    """Yield attempts that were followed by another but wrote no end event, with the number of rows lost."""
    gone = ~history.live
    begun: Row | None = None
    for row in history.events:
        event = row.get("event")
        if event in ("start", "resume"):
            if begun is not None:
                attempt = begun.get("attempt", 1)
                lost = int((gone & (history.train["attempt"] == attempt)).sum())
                withdrawn = f"; {lost:,} of its rows were withdrawn" if lost else ""
                sentence = f"attempt {attempt} wrote no end event: it was killed, or its machine failed{withdrawn}"
                yield Finding(event_step(row), "killed", sentence)
            begun = row
        elif event == "end":
            begun = None


def _sentence(row: Row) -> str:
    """Describe an event in words."""
    describe = _WORDS.get(str(row.get("event")))
    if describe is not None:
        return describe(row)
    return str(row.get("text") or {key: value for key, value in row.items() if key not in ("kind", "time", "event")})


def _spike(row: Row) -> str:
    why = f" ({row['why']})" if row.get("why") else ""
    known = [f"{name} {_number(row[name])}" for name in ("median", "limit") if row.get(name) is not None]
    against = f" ({', '.join(known)})" if known else ""
    values = f"loss {_number(row.get('loss'))}, gradient norm {_number(row.get('grad_norm'))}"
    return f"{row.get('quantity')} out of bounds: {values}{against}; decision: {row.get('decided')}{why}"


def _skip(row: Row) -> str:
    scale = f", loss scale {_number(row['loss_scale'])}" if row.get("loss_scale") is not None else ""
    return f"{row.get('reason', 'update skipped')}{scale}"


# How each event is described; an event not listed here shows its fields.
_WORDS: dict[str, Callable[[Row], str]] = {
    "spike": _spike,
    "skip": _skip,
    "rollback": lambda row: (
        f"back to step {row.get('step')} ({row.get('path')}), skipping {row.get('samples_skipped')} samples"
    ),
    "resume": lambda row: f"attempt {row.get('attempt')}, from {Path(str(row.get('path', 'a checkpoint'))).name}",
    "signal": lambda row: f"signal {row.get('signal', row.get('name', ''))}: saved and stopped",
    "wall_time": lambda row: f"{wall_limit(row.get('limit'))} was almost reached: saved and stopped",
    "repair": lambda row: f"removed an incomplete last row of metrics.jsonl ({row.get('dropped_bytes')} bytes)",
    "straggler": describe_straggler,
    "unbalanced_experts": describe_unbalanced_experts,
    "early_stop": lambda row: f"the validation loss stopped falling; the best is {_number(row.get('best_loss'))}",
}


def _report(run_dir: Path, name: str) -> tuple[str, str]:
    """Return title and text of a spike report, read only from the run's own folder."""
    path = run_dir / "incidents" / Path(name).name
    return (f"incidents/{path.name}", _shown(path)) if path.is_file() else ("", "")


def _failures(run: ReportData) -> Iterator[Finding]:
    for failure in run.failures[-_SHOWN_TEXTS:]:
        title = f"failures/attempt-{failure.attempt}.txt"
        yield Finding(None, "failure", f"attempt {failure.attempt}: {failure.last_line}", title, _end_of(failure.text))


def _not_finite(history: History) -> Iterator[Finding]:
    for column, name in (("loss", "training loss"), ("grad_norm", "gradient norm")):
        steps = history.column("step")[~np.isfinite(history.column(column))]
        if len(steps) and np.isfinite(history.train[column]).any():
            first = ", ".join(f"{step:,.0f}" for step in steps[:10])
            more = f" and {len(steps) - 10:,} more" if len(steps) > 10 else ""
            yield Finding(int(steps[0]), "not finite", f"{name} at step {first}{more}")
        elif len(steps) and column == "loss":
            yield Finding(int(steps[0]), "not finite", f"none of {len(steps):,} steps has a finite {name}")


def _checkpoints(run: ReportData) -> Iterator[Finding]:
    for saved in run.checkpoints:
        if saved.status != "good":
            yield Finding(
                saved.step, "checkpoint", f"{saved.name} is {saved.status}{saved.problem and ': '}{saved.problem}"
            )


def _slow(history: History) -> Iterator[Finding]:
    """Yield stretches of steps that took over twice as long as usual, the most costly first."""
    step, seconds = history.column("step"), history.column("step_seconds")
    known = np.isfinite(seconds)
    step, seconds = step[known], seconds[known]
    if len(seconds) < 10:
        return
    usual = float(np.median(seconds))
    slow = np.flatnonzero(seconds > _SLOW_FACTOR * usual)
    stretches = np.split(slow, np.flatnonzero(np.diff(slow) > 2) + 1) if len(slow) else []
    costs = [(float((seconds[stretch] - usual).sum()), stretch) for stretch in stretches]
    worth = sorted((cost for cost in costs if cost[0] > _SLOW_SHARE * seconds.sum()), key=lambda cost: -cost[0])
    for cost, stretch in worth[:_SLOW_SHOWN]:
        first, last = step[stretch[0]], step[stretch[-1]]
        until = "" if first == last else f"until step {last:,.0f}, "
        sentence = (
            f"{until}{seconds[stretch].mean():.3g} s per step, usually {usual:.3g} s: {format_duration(cost)} lost"
        )
        yield Finding(int(first), "slow", sentence)


def _stacks(run_dir: Path) -> Iterator[Finding]:
    for path in sorted((run_dir / "stacks").glob("rank-*.txt"))[:_SHOWN_TEXTS]:
        sentence = f"{path.stem} made no progress; its stack follows"
        yield Finding(None, "standstill", sentence, f"stacks/{path.name}", _shown(path))


def _shown(path: Path) -> str:
    text, left_out = text_of(path, _TEXT_BYTES)
    return f"{text}\n... {left_out:,} more bytes in {path}" if left_out else text


def _end_of(text: str) -> str:
    left_out = len(text) - _FAILURE_CHARACTERS
    return f"... {left_out:,} characters before this\n{text[left_out:]}" if left_out > 0 else text


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
