"""Selects checkpoints of a run: all good ones, or those nearest to given percentages of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.checkpoint.discovery import Entry, list_checkpoints
from megalm.errors import CheckpointError


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
