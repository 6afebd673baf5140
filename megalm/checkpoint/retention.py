"""Choose which checkpoints to keep, and delete the others; a kill at any moment leaves the configured number.

A checkpoint is renamed before it is deleted, so a partly deleted one never has a checkpoint's name.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.discovery import (
    BEST,
    PARTIAL_SUFFIX,
    REPLACED_SUFFIX,
    TRASH_SUFFIX,
    Entry,
    complete_checkpoints,
    is_step_name,
    list_checkpoints,
    read_pointer,
    step_folders,
)
from megalm.utils.atomic_files import is_temporary, sync_directory, write_durably


@dataclass(frozen=True)
class Retention:
    """What to keep: the newest good checkpoints, the best, and one every N steps.

    Args:
        keep_last: number of good checkpoints to keep, newest write first; None keeps everything.
        keep_every_steps: also keep every good checkpoint whose step is a multiple of this.
    """

    keep_last: int | None = None
    keep_every_steps: int | None = None


def superfluous(entries: Sequence[Entry], retention: Retention, best: str | None) -> list[Entry]:
    """Return the `entries`, given in write order, that `retention` does not keep.

    Suspect and bad checkpoints do not count as kept; they go once `keep_last` good ones were written after them. One
    with an unreadable manifest stays for inspection, and so does one created later than a kept one: attempt numbers
    and times disagree then, so which is newer is not known.
    """
    if retention.keep_last is None:
        return []
    good = [entry for entry in entries if entry.status == "good"]
    if len(good) < retention.keep_last:
        return []
    newest = good[-retention.keep_last :]
    since = entries.index(newest[0])
    times = [entry.manifest.created_at for entry in newest if entry.manifest is not None]
    oldest_kept = min((time for time in times if time is not None), default=math.inf)
    every = retention.keep_every_steps
    return [
        entry
        for entry in entries[:since]
        if entry.manifest is not None
        and (entry.manifest.created_at or 0) <= oldest_kept
        and entry.path.name != best
        and not (entry.status == "good" and every is not None and entry.step % every == 0)
    ]


def prune(checkpoints: Path, retention: Retention, origin: Path | None = None, dry_run: bool = False) -> list[Path]:
    """Delete the checkpoints that `retention` does not keep; return their former paths.

    Args:
        origin: a checkpoint to keep whatever its age, because no save after it is complete yet.
        dry_run: delete nothing.

    Raises:
        OSError: a checkpoint cannot be deleted.
    """
    entries = superfluous(list_checkpoints(checkpoints), retention, read_pointer(checkpoints, BEST))
    gone = [entry.path for entry in entries if origin is None or entry.path.resolve() != origin.resolve()]
    for path in () if dry_run else gone:
        _discard(path)
    return gone


def tidy(checkpoints: Path) -> list[Path]:
    """Clean up after a killed job; return what was removed or restored. The caller must hold the run's lock.

    A checkpoint that was being replaced gets its name back, unless its replacement is in place. `best` is updated to
    the newest checkpoint that was the best when written, in case the job was killed before that update.
    """
    if not checkpoints.is_dir():
        return []
    found: list[Path] = []
    complete = {path.name for path in complete_checkpoints(checkpoints)}
    for path in sorted(checkpoints.iterdir()):
        if path.suffix not in (PARTIAL_SUFFIX, REPLACED_SUFFIX, TRASH_SUFFIX) or not is_step_name(path.stem):
            continue
        if path.suffix == REPLACED_SUFFIX and path.stem not in complete:
            path.rename(path.with_name(path.stem))
        else:
            shutil.rmtree(path)
        found.append(path)
    for folder in (checkpoints, *step_folders(checkpoints)):
        for path in filter(is_temporary, folder.iterdir()):
            path.unlink()
            found.append(path)
    if found:
        sync_directory(checkpoints)
    named, best = read_pointer(checkpoints, BEST), _best(list_checkpoints(checkpoints))
    if named is not None and best not in (None, named):
        write_durably(checkpoints / BEST, f"{best}\n".encode())
        found.append(checkpoints / BEST)
    return found


def _best(entries: Sequence[Entry]) -> str | None:
    """Return the name of the newest good checkpoint whose validation loss was the lowest so far."""
    for entry in reversed(entries):
        if entry.manifest is not None and entry.status == "good":
            loss = entry.manifest.validation_loss
            if loss is not None and loss == entry.manifest.best_validation_loss:
                return entry.path.name
    return None


def _discard(path: Path) -> None:
    trash = path.with_name(path.name + TRASH_SUFFIX)
    if trash.exists():  # left by a kill
        shutil.rmtree(trash)
    try:
        path.rename(trash)
    except FileNotFoundError:  # another process prunes too
        return
    sync_directory(path.parent)
    shutil.rmtree(trash)
