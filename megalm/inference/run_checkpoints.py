"""Which checkpoints of a run to look at: all good ones, or those nearest to shares of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.discovery import Entry, list_checkpoints
from megalm.checkpoint.manifest import wrong_file
from megalm.errors import CheckpointError


@dataclass(frozen=True)
class RunCheckpoints:
    """Checkpoints of a run.

    Attributes:
        good: in the order of steps, the newest one last.
        left_out: the others, with the reason.
    """

    good: tuple[Path, ...]
    left_out: tuple[str, ...]


def checkpoints_of(run: Path) -> RunCheckpoints:
    """Sizes of files are looked at, not their content.

    Raises:
        CheckpointError: the run has no good checkpoint.
    """
    entries = list_checkpoints(run / "checkpoints")
    reasons = [(entry.path, _not_good(entry, entries)) for entry in sorted(entries, key=lambda entry: entry.step)]
    good = tuple(path for path, reason in reasons if not reason)
    left_out = tuple(f"{path.name}: {reason}" for path, reason in reasons if reason)
    if not good:
        told = f" ({'; '.join(left_out)})" if left_out else ""
        raise CheckpointError(f"{run} has no good checkpoint{told}; `megalm checkpoint list {run}` shows what is there")
    return RunCheckpoints(good, left_out)


def nearest(steps: Sequence[int], percentages: Sequence[float]) -> list[int]:
    """Of the ascending `steps` those nearest to these percentages of the last one, each once, in order.

    The earlier one, where two are equally near.
    """
    wanted = (percentage / 100 * steps[-1] for percentage in percentages)
    return sorted({min(steps, key=lambda step: (abs(step - place), step)) for place in wanted})


def _not_good(entry: Entry, entries: Sequence[Entry]) -> str:
    if entry.manifest is None:
        return entry.problem
    return entry.manifest.mark or _left(entry, entries) or wrong_file(entry.path, entry.manifest)


def _left(entry: Entry, entries: Sequence[Entry]) -> str:
    """A run that was set back leaves the later steps of the attempt before; they are no part of its course."""
    earlier = [other for other in entries if other.attempt > entry.attempt and other.step <= entry.step]
    if not earlier:
        return ""
    return (
        f"of attempt {entry.attempt}, which the run left: attempt {earlier[0].attempt} has saved {earlier[0].path.name}"
    )
