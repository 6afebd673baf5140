"""Where a build works: a locked folder, and a thread that hashes the input meanwhile."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalm.data.builder.build_plan import Plan
from megalm.data.indexed.metadata import check_output, dataset_paths
from megalm.data.readers.input_files import InputFile, sha256_of
from megalm.errors import DataError
from megalm.utils.atomic_files import read_json, write_json, writing_to

logger = logging.getLogger(__name__)


@contextmanager
def build_lock(work: Path) -> Iterator[None]:
    """Hold the lock of PREFIX.building: one process at a time writes the files of PREFIX.

    Raises:
        DataError: another one does.
    """
    with writing_to(work):
        work.parent.mkdir(parents=True, exist_ok=True)
        lock_path = work.with_name(f".{work.name}.lock")
        lock = lock_path.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(lock.fileno()).st_nlink > 0  # else another process just ended and took the file away
        except BlockingIOError:
            ours = False
        except OSError as error:
            ours = True
            logger.warning("%s: its file system has no locks (%s): see that nobody else builds this", work, error)
        if not ours:
            raise DataError(f"{work}: another process builds this dataset now; wait for it")
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)


@contextmanager
def working_in(work: Path, plan: Plan, prefixes: Sequence[str], overwrite: bool) -> Iterator[None]:
    """PREFIX.building, locked; emptied where it belongs to another build."""
    stated = work / "plan.json"
    with build_lock(work):
        if not stated.exists() or read_json(stated)["identity"] != plan.identity:
            for prefix in prefixes:
                check_output(prefix, overwrite)
            if any(part for part in work.glob("*.json") if part != stated):
                logger.warning("%s is of another input or other options: it is thrown away", work)
            with writing_to(work):
                if work.exists():
                    shutil.rmtree(work)
                work.mkdir()
            write_json(stated, {"identity": plan.identity})
        clear_temporaries(prefixes)
        yield


def clear_temporaries(prefixes: Iterable[str]) -> None:
    """What a killed build left half-written; nobody else builds here, we hold the lock."""
    for prefix in prefixes:
        for path in dataset_paths(prefix):
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink(missing_ok=True)


@contextmanager
def hash_inputs_in_background(files: Sequence[InputFile]) -> Iterator[dict[str, str]]:
    """Hashes of the files by path, made meanwhile in a thread; complete where the block ends without an error."""
    hashes: dict[str, str] = {}
    failures: list[OSError] = []
    stopped = threading.Event()

    def work() -> None:
        try:
            for file in files:
                if not file.is_stdin and not stopped.is_set():
                    hashes[file.path] = sha256_of(file.path, stopped.is_set)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="hashing")
    thread.start()
    try:
        yield hashes
    except BaseException:
        stopped.set()
        raise
    finally:
        thread.join()
    if failures:
        raise DataError(f"{failures[0].filename}: cannot be read ({failures[0].strerror}); start again")
