"""Run units of work in worker processes, or in this process if one is enough; results come as they finish."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.shard_files import WorkUnitFiles, WorkUnitSummary, WorkUnitWriter
from megalm.data.readers.document_reader import Span
from megalm.data.readers.records import ByteBlock
from megalm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import DataError
from megalm.utils import child_process
from megalm.utils.parent_watch import ParentWatch

KEPT_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True)
class Unit:
    """A part to make. `block`: the bytes of its single span, if cut from a stream."""

    name: str
    spans: tuple[Span, ...]
    weight: int
    block: ByteBlock | None = None
    content_hash: str = ""
    first_line: int = 0


def do_units(
    units: Iterator[Unit], directory: Path, options: BuildOptions, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Unit, WorkUnitSummary]]:
    """Make the parts; `units` is consumed only as fast as parts are made.

    Raises:
        DataError: a unit failed (raised at once), or a worker process was killed.
    """
    if workers <= 1:
        for unit in units:
            yield unit, _do(unit, directory, options, tokenizer)
        return
    pool = _start_pool(directory, options, tokenizer, workers)
    running: dict[Future[WorkUnitSummary], Unit] = {}
    try:
        for unit in units:
            running[pool.submit(_do_in_worker, unit)] = Unit(unit.name, unit.spans, unit.weight)
            if len(running) >= 2 * workers:  # keeps reading from filling memory ahead of encoding
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended while tokenizing, most likely out of memory; start the same build again "
            "with fewer workers, it resumes from the finished parts"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_pool(directory: Path, options: BuildOptions, tokenizer: Tokenizer, workers: int) -> ProcessPoolExecutor:
    ends = tokenizer.eod_id if options.append_eod else None, tokenizer.bos_id
    with _lean_start():
        # spawn, because the libraries' own threads do not survive a fork. Each worker loads the tokenizer once.
        pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(directory, options, tokenizer.spec, ends, os.getpid()),
        )
        for _ in range(workers):
            pool.submit(os.getpid)
    return pool


@contextmanager
def _lean_start() -> Iterator[None]:
    """Start processes that do not import the main program, but megalm as it is here, and that keep freed memory."""
    names: dict[str, Any] = vars(sys.modules["__main__"])
    before, environment = dict(names), dict(os.environ)
    names["__spec__"], names["__file__"] = None, child_process.__file__
    # glibc returns every large block to the system and requests it again: a tenth of a worker's time.
    kept = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(KEPT_MEMORY_BYTES))
    for name, value in {**kept, **child_process.SAFE_PATH}.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        del names["__file__"]
        names.update({name: before[name] for name in ("__file__", "__spec__") if name in before})
        for name in set(os.environ) - set(environment):
            del os.environ[name]


def _finished(running: dict[Future[WorkUnitSummary], Unit]) -> Iterator[tuple[Unit, WorkUnitSummary]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _do(unit: Unit, directory: Path, options: BuildOptions, tokenizer: Tokenizer) -> WorkUnitSummary:
    writer = WorkUnitWriter(WorkUnitFiles(directory, unit.name), options, tokenizer)
    return writer.write(unit.spans, unit.block, unit.content_hash, unit.first_line)


_work: Callable[[Unit], WorkUnitSummary] | None = None  # set in worker processes only


def _start_worker(
    directory: Path, options: BuildOptions, tokenizer_spec: str, ends: tuple[int | None, int | None], parent: int
) -> None:
    global _work  # noqa: PLW0603  a process pool has no other place for per-worker state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    # Nothing reads the results of a parent that was killed, and a new build would write the same files.
    ParentWatch(parent, patience_seconds=0.0, when_late=lambda: None)
    tokenizer = load_tokenizer(tokenizer_spec, *ends)
    _work = lambda unit: _do(unit, directory, options, tokenizer)  # noqa: E731


def _do_in_worker(unit: Unit) -> WorkUnitSummary:
    assert _work is not None
    return _work(unit)
