"""Before training: check the place of a run's copies, and take from it what the run folder lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from megalm.checkpoint.copies.copy_store import CopyStore, check_writable
from megalm.checkpoint.discovery import Entry, ResumedFrom, complete_checkpoints, list_checkpoints, write_order
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.utils.atomic_files import write_bytes_atomically
from megalm.utils.file_lock import take_lock
from megalm.utils.formatting import format_bytes
from megalm.utils.progress import ProgressBar, sizes
from megalm.utils.remote_files import is_remote, lasting_problem, tried_again

_KEY = "checkpoint.copy_to"
_PATIENCE_SECONDS = 15.0  # for a server to answer at all, at the start
_SETTINGS = "config.yaml"  # written last: with it the folder is a run's
_METRICS = "metrics.jsonl"

Info = Callable[[str], None]
T = TypeVar("T")


def check_copy_place(address: str, root: Path, name: str | None, resume: bool) -> None:
    """Check before a device is taken that copies can be written, and that a new run does not mix with an old one's.

    A server that does not answer is no reason to refuse a run that can resume without it: copying is tried again.

    Args:
        address: checkpoint.copy_to.
        root, name: of the run; None: the next free name.

    Raises:
        ConfigError: the address or folder does not exist, refuses, or has copies of another run of this name.
    """
    if not is_remote(address) and not Path(address).is_dir():
        raise ConfigError(f"{_KEY}={address} does not exist; create or mount the folder")
    try:
        _answered(lambda: check_writable(address), address)
        if name is not None and not resume:
            refuse_copies_of_another_run(CopyStore(address, name))
    except DataError as error:
        can_wait = resume and name is not None and complete_checkpoints(root / name / "checkpoints")
        if not can_wait or (error.__cause__ is not None and lasting_problem(error.__cause__)):
            raise ConfigError(f"{_KEY}={error}") from error


def refuse_copies_of_another_run(store: CopyStore) -> None:
    """Raises: ConfigError: there are copies already, which those of a new run would replace."""
    if entries := _answered(store.entries, store.address):
        name = store.address.rpartition("/")[2]
        raise ConfigError(
            f"{store.address} has copies of an earlier run, up to {entries[-1].path.name}; resume it with "
            f"run.name={name} --resume auto, or choose another run.name or {_KEY}"
        )


def restore_run_files(run_dir: Path, address: str, info: Info = lambda _: None) -> bool:
    """Copy the small files of a lost run folder back; return whether there were any.

    Any number of processes may call it at once: one copies, the others wait.

    Raises:
        ConfigError: the place of the copies does not answer or refuses.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = run_dir.with_name(f".{run_dir.name}.restore.lock")
    with take_lock(lock):
        try:
            if (run_dir / _SETTINGS).exists():
                return True
            store = CopyStore(address, run_dir.name)
            names = _answered(store.run_files, store.address)
            if _SETTINGS not in names:
                return False
            _restore(run_dir, store, [*(name for name in names if name != _SETTINGS), _SETTINGS])
            info(f"restored {', '.join(names)} of {run_dir} from {store.address}")
            return True
        except DataError as error:
            raise ConfigError(f"{_KEY}={error}") from error
        finally:
            lock.unlink(missing_ok=True)


def fetch_newest(run_dir: Path, address: str, origin: ResumedFrom | None, info: Info) -> Path | None:
    """Download the newest good copy if it was written after every checkpoint of the run folder; return its path.

    Args:
        origin: the checkpoint that the last attempt resumed from.
        info: called with warnings and progress lines.

    Raises:
        CheckpointError: the folder has no checkpoint, and the copies cannot be read or all are damaged.
    """
    checkpoints = run_dir / "checkpoints"
    local = [entry for entry in list_checkpoints(checkpoints) if entry.status != "bad" and not entry.damage()]
    orders = [write_order(entry) for entry in local]
    newest = max([*orders, *([] if origin is None else [(origin.attempt, -1)])], default=(0, -1))
    store = CopyStore(address, run_dir.name)
    try:
        found = _answered(store.entries, store.address, 4 * _PATIENCE_SECONDS, info)
    except DataError as error:
        if not local:
            raise CheckpointError(f"{_KEY}={error}") from error
        info(f"WARNING: {error}; the run resumes from its own folder, whether or not there are newer copies")
        return None
    problems = [entry.problem for entry in found if entry.problem]
    for entry in reversed(found):
        if entry.status != "good" or write_order(entry) <= newest:
            continue
        try:
            return fetch_copy(run_dir, store, entry, info)
        except (CheckpointError, DataError) as error:
            problems.append(str(error))
    if problems and not local:
        raise CheckpointError(f"no copy in {store.address} can be used: {'; '.join(problems)}")
    for problem in problems:
        info(f"WARNING: skipped a copy: {problem}")
    return None


def fetch_copy(run_dir: Path, store: CopyStore, entry: Entry, info: Info) -> Path:
    """Download a copy into the run folder, with the small files that it lacks; return the checkpoint's path.

    Raises:
        CheckpointError, DataError: it cannot be read or is damaged.
    """
    assert entry.manifest is not None
    size = entry.manifest.bytes
    info(f"fetching {entry.path.name} from {store.address} ({format_bytes(size)})")
    progress = ProgressBar(f"fetching {entry.path.name}", size, say=info, shown=sizes)
    path = store.download(entry, run_dir / "checkpoints", progress.advance)
    _restore(run_dir, store, _answered(store.run_files, store.address))
    return path


def _restore(run_dir: Path, store: CopyStore, names: list[str]) -> None:
    """Write small files of the run that the folder lacks, and metrics that only continue those here."""
    for name in names:
        path = run_dir / name
        if path.exists() and name != _METRICS:
            continue
        content = _answered(partial(store.read_run_file, name), f"{store.address}/{name}")
        if not path.exists() or content.startswith(path.read_bytes()):
            write_bytes_atomically(path, content)


def _answered(
    work: Callable[[], T], address: str, patience_seconds: float | None = None, warn: Info = lambda _: None
) -> T:
    """Raises: DataError: the server refuses, or does not answer."""
    return tried_again(work, address, patience_seconds or _PATIENCE_SECONDS, warn)
