"""Whether a checkpoint fits the disk, before it is begun."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megalm.checkpoint.fragment import HasFragment
from megalm.errors import TrainingError

# Beside the fp32 values: a line in the file's header and a dozen in the manifest; configuration and blocks half full.
_FRAGMENT_BYTES = 600
_RANK_BYTES = 64 << 10


def bytes_needed(fragments: Sequence[HasFragment]) -> int:
    """What this rank's part of a checkpoint will take, from shapes alone."""
    return _RANK_BYTES + sum(4 * (fragment.key.stop - fragment.key.start) + _FRAGMENT_BYTES for fragment in fragments)


def require_space(folder: Path, needed: int, make_room: Callable[[], None]) -> None:
    """Refuse to begin what cannot be finished.

    Args:
        folder: where it will be written; exists.
        needed: bytes of all ranks together: the run folder is on one file system for all of them.
        make_room: deletes what need not be kept; called only where the space is too small.

    Raises:
        TrainingError: it is too small even then.
    """
    if shutil.disk_usage(folder).free >= needed:
        return
    make_room()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder} has {free / 2**20:,.1f} MiB free, a checkpoint needs {needed / 2**20:,.1f} MiB; make room "
            "(megalm checkpoint prune), or keep fewer with checkpoint.keep_last"
        )
