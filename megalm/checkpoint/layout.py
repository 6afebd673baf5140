"""Names in a run's `checkpoints` folder, and which of them `--resume` means."""

from __future__ import annotations

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
        wanted: `auto` (the newest complete one; None where there is none yet), a step or a folder's name in
            `checkpoints`, or the path of any checkpoint.

    Raises:
        CheckpointError: what was named is not there, or not complete.
    """
    complete = complete_checkpoints(checkpoints)
    if wanted == "auto":
        return complete[-1] if complete else None
    named = checkpoints / (folder_name(int(wanted)) if wanted.isdigit() else wanted)
    for path in (named, Path(wanted)):
        if (path / MANIFEST).is_file():
            return path
        if path.is_dir():
            raise CheckpointError(f"{path}: not a complete checkpoint (no {MANIFEST}); {_choices(complete)}")
    raise CheckpointError(f"no checkpoint {wanted!r} in {checkpoints} and no such folder; {_choices(complete)}")


def _choices(complete: list[Path]) -> str:
    return f"complete ones: {', '.join(path.name for path in complete)}" if complete else "there is none yet"
