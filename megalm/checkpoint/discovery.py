"""Find the checkpoints in a run's `checkpoints` folder, and choose the one that `--resume` uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.manifest import (
    MANIFEST,
    STEP_FOLDER,
    Manifest,
    Status,
    read_manifest,
    without_advice,
    wrong_file,
)
from megalm.errors import CheckpointError
from megalm.utils.atomic_files import is_stranger

LATEST = "latest"
BEST = "best"
PARTIAL_SUFFIX = ".tmp"  # being written
REPLACED_SUFFIX = ".replaced"  # from an earlier attempt, until its replacement is in place
TRASH_SUFFIX = ".trash"  # being deleted


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint. `manifest` is None if it cannot be read; `problem` then says why."""

    path: Path
    manifest: Manifest | None
    problem: str = ""

    @classmethod
    def read(cls, path: Path) -> Entry:
        try:
            return cls(path, read_manifest(path))
        except CheckpointError as error:
            return cls(path, None, str(error))

    @property
    def step(self) -> int:
        return step_of(self.path)

    @property
    def status(self) -> Status | None:
        return None if self.manifest is None else self.manifest.status

    @property
    def attempt(self) -> int:
        """The attempt that wrote it; 0 if the manifest cannot be read."""
        return 0 if self.manifest is None else self.manifest.attempt

    def damage(self) -> str:
        """The problem of its manifest, or a file that is missing or of another size; "" if there is none."""
        return self.problem if self.manifest is None else wrong_file(self.path, self.manifest)


@dataclass(frozen=True)
class ResumedFrom:
    """The checkpoint that an attempt resumed from; it represents that attempt until the attempt's first save."""

    path: Path
    attempt: int

    def is_at(self, path: Path) -> bool:
        return path.resolve() == self.path.resolve()


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    return STEP_FOLDER.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    match = STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def step_folders(checkpoints: Path) -> list[Path]:
    """Return every folder with a checkpoint's final name, complete or not, in step order."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if is_step_name(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders with a manifest, in step order; a checkpoint is complete once it has a manifest."""
    return [path for path in step_folders(checkpoints) if (path / MANIFEST).is_file()]


def list_checkpoints(checkpoints: Path) -> list[Entry]:
    """Return all complete checkpoints: those without a readable manifest first, then the others in write order."""
    entries = [Entry.read(path) for path in complete_checkpoints(checkpoints)]
    return sorted(entries, key=write_order)


def read_pointer(checkpoints: Path, pointer: str) -> str | None:
    """Return the checkpoint name in the file `latest` or `best`; None if it holds no valid name."""
    try:
        if is_stranger(checkpoints / pointer):
            return None
        name = (checkpoints / pointer).read_bytes()[:100].decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if is_step_name(name) else None


def resume_candidates(checkpoints: Path, wanted: str, origin: ResumedFrom | None = None) -> list[Entry]:
    """Return the checkpoints that `--resume wanted` can resume from, in order of preference.

    Args:
        checkpoints: the run's checkpoints folder.
        wanted: `auto`, a step, `latest`, `best`, a folder name in `checkpoints`, or the path of any checkpoint.
            `auto` gives the good ones, newest write first, then the suspect ones, never a bad one; those with an
            unreadable manifest come first of all, so that they are reported. Empty if nothing was ever saved.
        origin: the checkpoint that the last attempt resumed from, in this folder or elsewhere. That attempt abandoned
            the later steps of earlier attempts. The origin counts as good, because it was chosen then.

    Raises:
        CheckpointError: the named checkpoint is missing, incomplete or bad; or, with `auto`, all are bad, or the
            origin is gone and nothing has been written since.
    """
    if wanted != "auto":
        return [_named(checkpoints, wanted)]
    newest_first = (
        list_checkpoints(checkpoints) if origin is None else _with_origin(list_checkpoints(checkpoints), origin)
    )[::-1]
    ranks: dict[Status | None, list[Entry]] = {None: [], "good": [], "suspect": [], "bad": []}
    for entry in newest_first:
        chosen = origin is not None and origin.is_at(entry.path) and entry.status == "suspect"
        ranks["good" if chosen else entry.status].append(entry)
    by_preference = [*ranks[None], *ranks["good"], *ranks["suspect"]]
    if newest_first and not by_preference:
        raise CheckpointError(
            f"every checkpoint in {checkpoints} is marked bad; clear a mark with megalm checkpoint mark-bad --good PATH"
        )
    return by_preference


def first_whole(checkpoints: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """Return the first of `resume_candidates` whose files all have full size, and the problems of those before it.

    Raises:
        CheckpointError: as `resume_candidates`; or all candidates are damaged.
    """
    problems: list[str] = []
    skipped: list[str] = []
    for entry in resume_candidates(checkpoints, wanted):
        problem = entry.damage()
        if not problem:
            return entry.path, skipped
        problems.append(problem)
        skipped.append(without_advice(problem, entry.path))
    if problems:
        raise CheckpointError(f"no checkpoint in {checkpoints} is usable: {'; '.join(problems)}")
    return None, []


def resolve_pointer(path: Path) -> Path:
    """Return the checkpoint that a file `latest` or `best` names; any other path unchanged."""
    name = read_pointer(path.parent, path.name) if path.name in (LATEST, BEST) else None
    return path.parent / name if name else path


def _named(checkpoints: Path, wanted: str) -> Entry:
    named = checkpoints / (folder_name(int(wanted)) if wanted.isdecimal() else wanted)
    complete = complete_checkpoints(checkpoints)
    for path in (resolve_pointer(named), resolve_pointer(Path(wanted))):
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            if manifest.status == "bad":
                raise CheckpointError(
                    f"{path} is marked bad ({manifest.status_reason}); choose another, or clear the mark with "
                    f"megalm checkpoint mark-bad --good {path}"
                )
            return Entry(path, manifest)
        if (path / "checkpoints").is_dir():
            others = _choices(complete_checkpoints(path / "checkpoints"))
            raise CheckpointError(f"{path} is a run folder; name a checkpoint in {path / 'checkpoints'} ({others})")
        if path.is_dir():
            raise CheckpointError(f"{path} is not a complete checkpoint, it has no {MANIFEST} ({_choices(complete)})")
    raise CheckpointError(
        f"there is no checkpoint {wanted!r} in {checkpoints} and no such folder ({_choices(complete)})"
    )


def write_order(entry: Entry) -> tuple[int, int]:
    """Sort key of write order: after a rollback, an abandoned attempt's checkpoints can have later steps."""
    return entry.attempt, entry.step


def _with_origin(entries: list[Entry], origin: ResumedFrom) -> list[Entry]:
    """Return the entries in write order, with the origin as the first of its attempt.

    Raises:
        CheckpointError: the origin is gone, and nothing was written after it.
    """
    if not any(origin.is_at(entry.path) for entry in entries) and (origin.path / MANIFEST).is_file():
        entries = [*entries, Entry.read(origin.path)]

    def written(entry: Entry) -> tuple[int, int]:
        # Before everything the attempt wrote: an origin from another run can have a later step.
        return (origin.attempt, -1) if origin.is_at(entry.path) else write_order(entry)

    found = sorted(entries, key=written)
    if not found or written(found[-1])[0] < origin.attempt:
        raise CheckpointError(
            f"the run resumed from {origin.path}, which is gone, and has not saved since; choose a checkpoint with "
            f"--resume STEP or PATH ({_choices([entry.path for entry in entries])})"
        )
    return found


def _choices(complete: list[Path]) -> str:
    return f"complete: {', '.join(path.name for path in complete)}" if complete else "none is complete"
