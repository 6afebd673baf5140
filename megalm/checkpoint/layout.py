"""Names in a run's `checkpoints` folder, and which of them `--resume` means."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megalm.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
PARTIAL_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".replaced"

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders with a manifest, the oldest first; the manifest is what makes a checkpoint complete."""
    if not checkpoints.is_dir():
        return []
    found = [
        path for path in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found)


def find_checkpoint(checkpoints: Path, wanted: str) -> Path | None:
    """The checkpoint that `--resume wanted` means.

    Args:
        checkpoints: the run's checkpoints folder.
        wanted: `auto` (the complete one that was written last; None where there is none yet), a step or a folder's
            name in `checkpoints`, or the path of any checkpoint.

    Raises:
        CheckpointError: what was named is not there, or not complete.
    """
    complete = complete_checkpoints(checkpoints)
    if wanted == "auto":
        return max(complete, key=_order_of_writing, default=None)
    named = checkpoints / (folder_name(int(wanted)) if wanted.isdigit() else wanted)
    for path in (named, Path(wanted)):
        if (path / MANIFEST).is_file():
            return path
        if path.is_dir():
            raise CheckpointError(f"{path}: not a complete checkpoint (no {MANIFEST}); {_choices(complete)}")
    raise CheckpointError(f"no checkpoint {wanted!r} in {checkpoints} and no such folder; {_choices(complete)}")


def _order_of_writing(checkpoint: Path) -> tuple[int, str]:
    """A run that was set back to an earlier step has later steps too, of an attempt that it has left."""
    path = checkpoint / MANIFEST
    try:
        attempt = json.loads(path.read_text())["attempt"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable ({error!r}); name another checkpoint after --resume") from None
    return int(attempt), checkpoint.name


def _choices(complete: list[Path]) -> str:
    return f"complete ones: {', '.join(path.name for path in complete)}" if complete else "there is none yet"
