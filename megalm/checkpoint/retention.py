"""Choose which checkpoints to keep, and delete the others; a kill at any moment leaves the configured number.

A checkpoint is renamed before it is deleted, so a partly deleted one never has a checkpoint's name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.discovery import (
    BEST,
    LATEST,
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
from megalm.utils.atomic_files import clear_away, is_temporary, sync_directory, write_durably


@dataclass(frozen=True)
class Retention:
    """What to keep: the newest good checkpoints, the best, and one every N steps.

    Args:
        keep_last: number of good checkpoints to keep, newest write first; None keeps everything.
        keep_every_steps: also keep every good checkpoint whose step is a multiple of this.
        keep_best: keep the best one even if the file `best` is gone. One that the file names stays in any case.
    """

    keep_last: int | None = None
    keep_every_steps: int | None = None
    keep_best: bool = False


def superfluous(entries: Sequence[Entry], retention: Retention, best: str | None) -> list[Entry]:
    """Return the `entries`, given in write order, that `retention` does not keep.

    Suspect and bad checkpoints do not count as kept; they go once `keep_last` good ones were written after them. One
    with an unreadable manifest stays for inspection, and one behind a link where somebody put it. So does one created
    later than a kept one of another attempt: attempt numbers and times disagree then, so which is newer is not known.
    """
    if retention.keep_last is None:
        return []
    good = [entry for entry in entries if entry.status == "good"]
    if len(good) < retention.keep_last:
        return []
    newest = good[-retention.keep_last :]
    since = entries.index(newest[0])
    every = retention.keep_every_steps

    def may_be_newer(entry: Entry, created: float) -> bool:
        """Within an attempt the steps say which is newer, whatever the clock does."""
        times = [kept.manifest.created_at for kept in newest if kept.manifest and kept.attempt != entry.attempt]
        return created > min((time for time in times if time is not None), default=math.inf)

    return [
        entry
        for entry in entries[:since]
        if entry.manifest is not None
        and not entry.path.is_symlink()
        and not may_be_newer(entry, entry.manifest.created_at or 0)
        and entry.path.name != best
        and not (entry.status == "good" and every is not None and entry.step % every == 0)
    ]


def prune(checkpoints: Path, retention: Retention, keep: Collection[Path] = (), dry_run: bool = False) -> list[Path]:
    """Delete the checkpoints that `retention` does not keep; return their former paths.

    Args:
        keep: checkpoints to keep whatever their age.
        dry_run: delete nothing.

    Raises:
        OSError: a checkpoint cannot be deleted.
    """
    found = list_checkpoints(checkpoints)
    best = read_pointer(checkpoints, BEST) or (_best(found) if retention.keep_best else None)
    entries = superfluous(found, retention, best)
    kept = {path.resolve() for path in keep}
    gone = [entry.path for entry in entries if entry.path.resolve() not in kept]
    for path in () if dry_run else gone:
        _discard(path)
    return gone


def tidy(checkpoints: Path, keep_best: bool = False) -> list[Path]:
    """Clean up after a killed job; return what was removed or restored. The caller must hold the run's lock.

    A checkpoint that was being replaced gets its name back, unless its replacement is in place. `latest` names the
    newest write again, and `best` the newest checkpoint that was the best when written, in case the job was killed
    before that update or the files were deleted.

    Args:
        keep_best: write `best` also if it is missing.
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
            clear_away(path)
        found.append(path)
    for folder in (checkpoints, *step_folders(checkpoints)):
        for path in filter(is_temporary, folder.iterdir()):
            path.unlink()
            found.append(path)
    if found:
        sync_directory(checkpoints)
    entries = list_checkpoints(checkpoints)
    named = {pointer: read_pointer(checkpoints, pointer) for pointer in (LATEST, BEST)}
    right = {BEST: _best(entries)} if keep_best or named[BEST] else {}
    if named[LATEST] not in [entry.path.name for entry in entries if entry.manifest is None]:  # those are for people
        right[LATEST] = entries[-1].path.name if entries and entries[-1].manifest else None
    for pointer, name in right.items():
        if name not in (None, named[pointer]):
            write_durably(checkpoints / pointer, f"{name}\n".encode())
            found.append(checkpoints / pointer)
    return found


def _best(entries: Sequence[Entry]) -> str | None:
    """Return the name of the newest good checkpoint whose validation loss was the lowest so far."""
    for entry in reversed(entries):
        if entry.manifest is not None and entry.status == "good":
            loss = entry.manifest.validation_loss
            if loss is not None and loss == entry.manifest.best_validation_loss:
                return entry.path.name
    return None


def put_in_place(partial: Path, final: Path) -> None:
    """Rename; delete an earlier attempt's checkpoint of the same step only once its replacement is in place."""
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    if os.path.lexists(final):
        if os.path.lexists(replaced):  # left by a kill
            clear_away(replaced)
        final.rename(replaced)
    partial.rename(final)
    sync_directory(final.parent)
    if os.path.lexists(replaced):
        clear_away(replaced)


def _discard(path: Path) -> None:
    trash = path.with_name(path.name + TRASH_SUFFIX)
    if os.path.lexists(trash):  # left by a kill
        clear_away(trash)
    try:
        path.rename(trash)
    except FileNotFoundError:  # another process prunes too
        return
    sync_directory(path.parent)
    clear_away(trash)
