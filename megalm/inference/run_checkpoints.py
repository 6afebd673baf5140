"""Selects checkpoints of a run: all good ones, those nearest to given percentages of it, or new ones as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megalm.checkpoint.discovery import Entry, list_checkpoints
from megalm.errors import CheckpointError
from megalm.runs.run_lock import is_held

_POLL_SECONDS = 2.0


def good_checkpoints(run: Path) -> tuple[list[Path], list[str]]:
    """The good checkpoints of a run by step, and the others with the reason; file sizes are checked, not contents.

    Raises:
        CheckpointError: the run has no good checkpoint.
    """
    entries = list_checkpoints(run / "checkpoints")
    reasons = {entry.path: _defect(entry, entries) for entry in sorted(entries, key=lambda entry: entry.step)}
    good = [path for path, reason in reasons.items() if not reason]
    others = [f"{path.name}: {reason}" for path, reason in reasons.items() if reason]
    if not good:
        found = f" ({'; '.join(others)})" if others else ""
        raise CheckpointError(f"{run} has no good checkpoint{found}; `megalm checkpoint list {run}` lists all")
    return good, others


def follow(run: Path, tell: Callable[[str], None]) -> Iterator[Path]:
    """Yield each good checkpoint of a run once, by step, and each new one when it is complete.

    Ends when no job trains the run and all are yielded. One that is deleted before its turn is left out.

    Args:
        tell: called once with each other checkpoint and the reason.
    """
    done: set[tuple[str, int, object]] = set()  # a later attempt may save the same step again
    reported: set[str] = set()
    while True:
        is_last_look = not is_held(run)  # before looking: a job's last checkpoint is complete before it ends
        entries = list_checkpoints(run / "checkpoints")
        new: list[Path] = []
        for entry in sorted(entries, key=lambda entry: entry.step):
            identity = entry.path.name, entry.attempt, entry.manifest and entry.manifest.created
            if identity in done:
                continue
            if not (defect := _defect(entry, entries)):
                new.append(entry.path)
                done.add(identity)
                break  # those after it may be deleted while this one is in use
            if (line := f"{entry.path.name}: {defect}") not in reported and entry.path.exists():
                reported.add(line)
                tell(line)
        yield from new
        if not new:
            if is_last_look:
                return
            time.sleep(_POLL_SECONDS)


def nearest(steps: Sequence[int], percentages: Sequence[float]) -> list[int]:
    """The steps nearest to these percentages of the last of the ascending `steps`, each once, in order.

    Of two equally near steps, the earlier one counts.
    """
    targets = (percentage / 100 * steps[-1] for percentage in percentages)
    return sorted({min(steps, key=lambda step: (abs(step - target), step)) for target in targets})


def _defect(entry: Entry, entries: Sequence[Entry]) -> str:
    if entry.manifest is None:
        return entry.problem
    return entry.manifest.mark or _abandoned(entry, entries) or entry.damage()


def _abandoned(entry: Entry, entries: Sequence[Entry]) -> str:
    """The reason if a later attempt has resumed from before: then the run continues without this checkpoint."""
    later = next((other for other in entries if other.attempt > entry.attempt and other.step <= entry.step), None)
    if later is None:
        return ""
    return f"attempt {entry.attempt} is abandoned here: attempt {later.attempt} has saved {later.path.name}"
