"""Names in a run's `checkpoints` folder, and which of them `--resume` means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.manifest import MANIFEST, Manifest, Status, read_manifest, without_advice, wrong_file
from megalm.errors import CheckpointError

LATEST = "latest"
BEST = "best"
PARTIAL_SUFFIX = ".tmp"  # being written
REPLACED_SUFFIX = ".replaced"  # of an earlier attempt, until its successor is in place
TRASH_SUFFIX = ".trash"  # being deleted

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint. `manifest` is None where it cannot be read; `problem` then says why."""

    path: Path
    manifest: Manifest | None
    problem: str = ""

    @property
    def step(self) -> int:
        return step_of(self.path)

    @property
    def status(self) -> Status | None:
        return None if self.manifest is None else self.manifest.status

    @property
    def attempt(self) -> int:
        """0 where that cannot be read."""
        return 0 if self.manifest is None else self.manifest.attempt


@dataclass(frozen=True)
class ResumedFrom:
    """A checkpoint that a later attempt went on from: until that attempt has saved, it stands for it."""

    path: Path
    attempt: int

    def is_at(self, path: Path) -> bool:
        return path.resolve() == self.path.resolve()


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    return _STEP_FOLDER.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def step_folders(checkpoints: Path) -> list[Path]:
    """Every folder with a checkpoint's final name, complete or not, in the order of steps."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if is_step_name(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders with a manifest, in the order of steps; the manifest is what makes a checkpoint complete."""
    return [path for path in step_folders(checkpoints) if (path / MANIFEST).is_file()]


def list_checkpoints(checkpoints: Path) -> list[Entry]:
    """All complete checkpoints, those without a readable manifest first, the others in the order of writing."""
    entries = [_entry(path) for path in complete_checkpoints(checkpoints)]
    return sorted(entries, key=_written)


def read_pointer(checkpoints: Path, pointer: str) -> str | None:
    """The checkpoint's name that the file `latest` or `best` holds; None where it holds no such name."""
    try:
        name = (checkpoints / pointer).read_bytes()[:100].decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if is_step_name(name) else None


def resume_candidates(checkpoints: Path, wanted: str, origin: ResumedFrom | None = None) -> list[Entry]:
    """What `--resume wanted` may go on from, in order of preference.

    Args:
        checkpoints: the run's checkpoints folder.
        wanted: `auto`, a step, `latest`, `best` or a folder's name in `checkpoints`, or the path of any checkpoint.
            `auto` is every good one, the one written last first, then the suspect ones, never a bad one; those whose
            manifest cannot be read come first of all, so that they are told of. Empty where nothing was ever saved.
        origin: what the last attempt went on from, in this folder or elsewhere; later steps of earlier attempts were
            left by it. As it was chosen then, it is as good as a good one.

    Raises:
        CheckpointError: what was named is not there, not complete or bad; or `auto` and there are only bad ones, or
            the origin is gone and nothing has been written since.
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
            f"every checkpoint in {checkpoints} is marked bad; undo one with megalm checkpoint mark-bad --good PATH"
        )
    return by_preference


def find_checkpoint(checkpoints: Path, wanted: str) -> Path | None:
    """The first of `candidates` whose files are there in full size; None: nothing was ever saved.

    Raises:
        CheckpointError: as `candidates`; or all of them are damaged.
    """
    return first_whole(checkpoints, wanted)[0]


def first_whole(checkpoints: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """What `find_checkpoint` finds, and what is wrong with those that it would rather have taken.

    Raises:
        CheckpointError: as `find_checkpoint`.
    """
    problems: list[str] = []
    passed: list[str] = []
    for entry in resume_candidates(checkpoints, wanted):
        problem = entry.problem if entry.manifest is None else wrong_file(entry.path, entry.manifest)
        if not problem:
            return entry.path, passed
        problems.append(problem)
        passed.append(without_advice(problem, entry.path))
    if problems:
        raise CheckpointError(f"no checkpoint in {checkpoints} can be used: {'; '.join(problems)}")
    return None, []


def resolve_pointer(path: Path) -> Path:
    """The checkpoint that a file `latest` or `best` names; any other path as it is."""
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
                    f"{path} is marked bad ({manifest.status_reason}); choose another, or undo it with "
                    f"megalm checkpoint mark-bad --good {path}"
                )
            return Entry(path, manifest)
        if (path / "checkpoints").is_dir():
            others = _choices(complete_checkpoints(path / "checkpoints"))
            raise CheckpointError(f"{path}: a run folder; name one of {path / 'checkpoints'}, {others}")
        if path.is_dir():
            raise CheckpointError(f"{path}: not a complete checkpoint (no {MANIFEST}); {_choices(complete)}")
    raise CheckpointError(f"no checkpoint {wanted!r} in {checkpoints} and no such folder; {_choices(complete)}")


def _entry(path: Path) -> Entry:
    try:
        return Entry(path, read_manifest(path))
    except CheckpointError as error:
        return Entry(path, None, str(error))


def _written(entry: Entry) -> tuple[int, int]:
    """A run that was set back to an earlier step has later steps too, of an attempt that it has left."""
    return entry.attempt, entry.step


def _with_origin(entries: list[Entry], origin: ResumedFrom) -> list[Entry]:
    """In the order of writing, the origin as the first of its attempt.

    Raises:
        CheckpointError: it is gone, and there is nothing that came after it.
    """
    if not any(origin.is_at(entry.path) for entry in entries) and (origin.path / MANIFEST).is_file():
        entries = [*entries, _entry(origin.path)]

    def written(entry: Entry) -> tuple[int, int]:
        # Before whatever the attempt wrote: another run's checkpoint may have a later step.
        return (origin.attempt, -1) if origin.is_at(entry.path) else _written(entry)

    found = sorted(entries, key=written)
    if not found or written(found[-1])[0] < origin.attempt:
        raise CheckpointError(
            f"the run went on from {origin.path}, which is gone, and has saved nothing since; say what to go on from "
            f"with --resume STEP or PATH: {_choices([entry.path for entry in entries])}"
        )
    return found


def _choices(complete: list[Path]) -> str:
    return f"complete ones: {', '.join(path.name for path in complete)}" if complete else "there is none yet"
