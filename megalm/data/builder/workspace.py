"""A build's workspace: its locked folder, and a thread that hashes the input during the build."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalm.data.indexed.metadata import check_output, dataset_paths
from megalm.data.readers.input_files import InputFile, sha256_of
from megalm.errors import DataError
from megalm.utils.atomic_files import is_temporary, read_json, refuse_overwriting_inputs, write_json, writing_to
from megalm.utils.file_lock import take_lock

# The plan, the files of the parts, the tables of duplicates, and the words of evaluation sets.
_OF_A_BUILD = re.compile(r"plan\.json|\d{6}(-\d{6})?\.(tokens|npz|json)|seen(\.\w+)?|overlap-\w+\.npy")
logger = logging.getLogger(__name__)


def refuse_overwriting(prefixes: Iterable[str | Path], work: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to build datasets whose files, or whose folder PREFIX.building, would replace one of the `inputs`.

    Raises:
        ConfigError: see `refuse_overwriting_inputs`.
    """
    outputs = [path for prefix in prefixes for path in dataset_paths(prefix)]
    refuse_overwriting_inputs([*outputs, *work.rglob("*")], inputs)


def tokenizer_files(spec: str | Path) -> list[Path]:
    """Return the files that `load_tokenizer` reads for this `Tokenizer.spec`; some can be missing."""
    return [Path(spec), Path(spec).with_name("tokenizer_config.json")]


@contextmanager
def working_in(
    work: Path, identity: Any, prefixes: Sequence[str], overwrite: bool, resume: bool = True
) -> Iterator[None]:
    """Lock and prepare PREFIX.building; with `resume`, keep the parts of an interrupted build of the same identity.

    Raises:
        DataError: another process works there; a dataset of this name exists that is not from such a build; or the
            folder holds other files than a build's.
    """
    plan, locked = work / "plan.json", work.with_name(f".{work.name}.lock")
    with writing_to(work):
        locked.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = take_lock(locked, wait_seconds=0.0)
        except BlockingIOError:
            raise DataError(f"{work}: another process builds this dataset now; wait for it") from None
    with lock, contextlib.ExitStack() as leave:
        leave.callback(locked.unlink, missing_ok=True)
        same = False
        with contextlib.suppress(DataError):  # a missing or damaged plan is another one
            same = read_json(plan) == {"identity": identity}
        if not same:
            for prefix in prefixes:
                check_output(prefix, overwrite)
            if any(part for part in work.glob("*.json") if part != plan):
                logger.warning("%s is from another input or other options, and is deleted", work)
        if not (same and resume):
            with writing_to(work):
                for path in sorted(work.iterdir()) if work.exists() else ():
                    if not (_OF_A_BUILD.fullmatch(path.name) or is_temporary(path)) or path.is_dir():
                        raise DataError(f"{path}: is not of a build, whose folder is replaced now; move it away")
                if work.exists():
                    shutil.rmtree(work)
                work.mkdir()
            write_json(plan, {"identity": identity})
        for path in (path for prefix in prefixes for path in dataset_paths(prefix)):
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # from a killed build: no other process builds here
                left.unlink(missing_ok=True)
        yield


@contextmanager
def hash_inputs_in_background(files: Sequence[InputFile]) -> Iterator[dict[str, str]]:
    """Compute file hashes by path in a background thread; complete once the block ends without an error."""
    hashes: dict[str, str] = {}
    stopped = threading.Event()

    def work() -> None:
        for file in files:
            if not file.is_stdin and not stopped.is_set():
                hashes[file.path] = sha256_of(file.path, stopped.is_set)

    with ThreadPoolExecutor(1, thread_name_prefix="hashing") as pool:
        done = pool.submit(work)
        try:
            yield hashes
        except BaseException:
            stopped.set()
            raise
        try:
            done.result()
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); start again") from error
