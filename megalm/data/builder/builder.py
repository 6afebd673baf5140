"""Text into an indexed dataset: PREFIX.bin, PREFIX.idx, PREFIX.sources, and PREFIX.json, which says what it is made of.

`build_files` makes one of files of any size, by many processes, and goes on where it was broken off: what is finished
lies in PREFIX.building/ until the dataset has its name. `build_dataset` makes one of documents at hand.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megalm.data.builder.assembler import Assembler, DatasetWriter, Placed
from megalm.data.builder.build_plan import BuildOptions, Group, Plan, make_plan
from megalm.data.builder.shard_files import WorkUnitFiles, WorkUnitSummary, with_ends
from megalm.data.builder.workers import Unit, do_units
from megalm.data.builder.workspace import hash_inputs_in_background, working_in
from megalm.data.indexed.dataset import best_dtype
from megalm.data.indexed.metadata import DatasetMetadata, check_output, dataset_paths, finished_report, start_report
from megalm.data.readers.document_reader import Document, Span, read_blocks
from megalm.data.readers.formats import format_of
from megalm.data.readers.input_files import WORK_SUFFIX, InputFile, ReadReport, find_inputs, sha256_of
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import json_hash

__all__ = ["BuildOptions", "BuildProgress", "Built", "DatasetMetadata", "build_dataset", "build_files"]

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.2
LARGEST_BLOCK = 16 << 20  # travels to a worker through a pipe


@dataclass(frozen=True)
class BuildProgress:
    """So far: documents and text bytes of this run, tokens written, and the share of the input that is done, 0 to 1."""

    documents: int
    text_bytes: int
    tokens: int
    share: float | None = None
    stage: str = "tokenizing"


Progress = Callable[[BuildProgress], None]


@dataclass(frozen=True)
class Built:
    """The datasets, one or one for each weight of the split.

    Attributes:
        was_there: nothing was to be done, and nothing was written.
        resumed: bytes of text (about) that an earlier, broken-off build had done.
        ignored_files: in folders, not of a kind that is read, or links that lead out of the folder.
    """

    reports: list[DatasetMetadata]
    was_there: bool
    resumed: int
    ignored_files: int


def build_files(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    options: BuildOptions | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    overwrite: bool = False,
    stdin_kind: str = ".jsonl",
    again: bool = False,
) -> Built:
    """Tokenize files, folders, globs and standard input ("-") into a dataset; the same bytes for any number of workers.

    Killed anywhere and called again, it goes on from the finished parts. Called again when all is done, it writes
    nothing. Documents that do not decode back exactly are counted, named, and in the dataset all the same.

    Args:
        workers: processes that read and encode; 1: this one.
        overwrite: replace a dataset of this name that was made of something else, or is damaged, which is otherwise an
            error; one of just this is read to be sure.
        again: build also what is there already of just this.

    Raises:
        DataError: see `BuildOptions.on_error`; an output that is of something else; an input that changes; no
            document left; a full disk. What was finished stays in PREFIX.building for the next try.
    """
    options, reading = options or BuildOptions(), ReadReport()
    files = find_inputs(paths, reading, stdin_kind)
    prefixes = options.output_prefixes(output_prefix)
    _check_inputs(files, prefixes)
    facts = options.to_json() | ({"stdin_kind": stdin_kind} if any(file.is_stdin for file in files) else {})
    finished = None if again else _finished_reports(prefixes, files, facts, tokenizer, overwrite)
    if finished is not None:
        return Built(finished, was_there=True, resumed=0, ignored_files=reading.ignored_files)
    if options.append_eod:
        _ = tokenizer.eod_id  # says so now where there is none
    plan = make_plan(files, options, tokenizer.fingerprint)
    work = Path(f"{output_prefix}{WORK_SUFFIX}")
    with working_in(work, plan.identity, prefixes, overwrite):
        inputs: list[dict[str, Any]] = []
        reports = [start_report(prefix, tokenizer, options.append_eod, facts, inputs) for prefix in prefixes]
        if options.shard[1] > 1:
            reports[0].listing = _listing(files)
        units, counts = _Units(plan, options, work), _Counts(plan, progress)
        with closing(Assembler(reports, prefixes, plan.files, options, tokenizer, work)) as assembler:
            with hash_inputs_in_background(plan.files) as hashes:
                for unit, summary in do_units(units.todo(), work, options, tokenizer, min(workers, plan.most_units)):
                    units.done(unit)
                    counts.add(summary, unit.weight, units.reused)
                    for placed in units.ready():  # while the others encode
                        assembler.add(placed)
            for placed in units.ready():
                assembler.add(placed)
            for file in plan.files:
                file.check_unchanged()
            inputs += [_recorded_input(file, hashes.get(file.path, "")) for file in plan.files]
            assembler.finish(counts.assembling)
        shutil.rmtree(work, ignore_errors=True)  # NFS keeps a file that is still mapped
    return Built(reports, was_there=False, resumed=units.reused, ignored_files=reading.ignored_files)


class _Units:
    """Walks the plan: the units that are still `todo`, and parts that are `ready`, in the order of the input."""

    def __init__(self, plan: Plan, options: BuildOptions, directory: Path) -> None:
        self._plan, self._options, self._directory = plan, options, directory
        self._order: deque[tuple[str, tuple[Span, ...]]] = deque()  # not yet given by `ready`
        self._done: set[str] = set()
        self.reused = 0  # weight of the parts that were there

    def todo(self) -> Iterator[Unit]:
        """Raises DataError for a file that is not the one that was found."""
        for number, group in enumerate(self._plan.groups):
            for unit in self._units_of(f"{number:06}", group):
                self._order.append((unit.name, unit.spans))
                summary = WorkUnitFiles(self._directory, unit.name).finished()
                if summary is not None and summary.content == unit.content_hash:
                    self.reused += unit.weight
                    self._done.add(unit.name)
                else:
                    yield unit

    def done(self, unit: Unit) -> None:
        self._done.add(unit.name)

    def ready(self) -> Iterator[Placed]:
        """Finished parts that are next in the order of the input, each once.

        Raises:
            DataError: a part is gone again.
        """
        while self._order and self._order[0][0] in self._done:
            name, spans = self._order.popleft()
            self._done.discard(name)
            part = WorkUnitFiles(self._directory, name)
            summary = part.finished()
            if summary is None:
                raise part.damaged()
            yield Placed(part, summary, spans)

    def _units_of(self, name: str, group: Group) -> Iterator[Unit]:
        if not group.stream:
            yield Unit(name, group.spans, group.weight)
            return
        (span,) = group.spans
        layout = format_of(span.file.kind, self._options.read)
        line, block_bytes = 0, min(LARGEST_BLOCK, self._plan.unit_bytes)
        for place, block in enumerate(read_blocks(span, self._options.read, block_bytes)):
            digest = hashlib.sha256(block.problem.encode() + b"\0" + block.content).hexdigest()
            here = replace(span, start=block.start)
            yield Unit(f"{name}-{place:06}", (here,), len(block.content), block, digest, line)
            line += layout.count(block.content, block.start)


class _Counts:
    """Adds up, and tells at most a few times a second."""

    def __init__(self, plan: Plan, tell: Progress | None) -> None:
        self._weight, self._tell = plan.weight, tell
        self._last, self._done = 0.0, 0
        self._now = BuildProgress(0, 0, 0)

    def add(self, summary: WorkUnitSummary, weight: int, reused: int) -> None:
        self._done += weight
        self._now = replace(
            self._now,
            documents=self._now.documents + summary.documents,
            text_bytes=self._now.text_bytes + summary.text_bytes,
            tokens=self._now.tokens + summary.tokens,
            share=min(1.0, (self._done + reused) / self._weight) if self._weight else None,
        )
        self._maybe_tell()

    def assembling(self, share: float) -> None:
        self._now = replace(self._now, share=share, stage="writing")
        self._maybe_tell(always=share == 1.0)

    def _maybe_tell(self, always: bool = False) -> None:
        if self._tell is not None and (always or time.monotonic() - self._last >= PROGRESS_SECONDS):
            self._last = time.monotonic()
            self._tell(self._now)


def _finished_reports(
    prefixes: Sequence[str],
    files: Sequence[InputFile],
    facts: dict[str, Any],
    tokenizer: Tokenizer,
    thorough: bool,
) -> list[DatasetMetadata] | None:
    """The reports of a build of just this, if it is there (see `finished_report`)."""
    reports = []
    for prefix in prefixes:
        report = finished_report(prefix, facts, tokenizer.fingerprint, thorough)
        if report is None or not _same_inputs(report, files):
            return None
        reports.append(report)
    return reports


def _same_inputs(report: DatasetMetadata, files: Sequence[InputFile]) -> bool:
    """Whether the files are those that were read: by size and time, or, where the time differs, by their hash."""
    if any(file.is_stdin for file in files):
        return False  # what it brings this time cannot be known before it is read
    recorded = [entry for entry in report.inputs if isinstance(entry, dict)]
    if report.options["shard"] == [0, 1]:
        if [entry["path"] for entry in recorded] != [file.path for file in files]:
            return False
    elif report.listing != _listing(files):  # a shard names only the files that it took part of
        return False
    known = {entry["path"]: entry for entry in recorded}
    for file in files:
        entry = known.get(file.path)
        if entry is None:
            continue
        if entry["bytes"] != file.size:
            return False
        if entry["mtime_ns"] != file.mtime_ns and entry["sha256"] != sha256_of(file.path):
            return False
    return bool(known)


def _check_inputs(files: Sequence[InputFile], prefixes: Sequence[str]) -> None:
    """Tell of files that come twice; refuse one that the dataset would replace, as data/my.json that of data/my."""
    names = Counter(os.path.abspath(file.path) for file in files)
    if repeated := [name for name, times in names.items() if times > 1]:
        logger.warning("%s is named twice, and read twice (%d files are)", repeated[0], len(repeated))
    outputs = {path.name: path for prefix in prefixes for path in dataset_paths(prefix) if path.exists()}
    for file in files:
        output = outputs.get(Path(file.path).name)
        if output is not None and not file.is_stdin and output.samefile(file.path):
            raise DataError(f"{file.path}: is an input, and the dataset would replace it; choose another output prefix")


def _listing(files: Sequence[InputFile]) -> str:
    """Identity of all the input by names and sizes: they decide what of it each shard takes."""
    return json_hash([[file.path, file.size] for file in files])


def _recorded_input(file: InputFile, sha256: str) -> dict[str, Any]:
    entry = asdict(file)
    entry["bytes"] = entry.pop("size")
    return entry | {"sha256": sha256}


def build_dataset(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    append_eod: bool = True,
    inputs: Sequence[str] = (),
    overwrite: bool = False,
) -> DatasetMetadata:
    """Tokenize documents at hand, in their order, into a dataset without PREFIX.sources.

    Empty documents are left out and counted.

    Args:
        inputs: where the documents came from, for PREFIX.json.
        overwrite: replace a dataset of this name, which is otherwise an error.

    Raises:
        DataError: an output that exists, no document at all, no end-of-document token, a full disk, and what
            `documents` raises; nothing is left under the output's name then.
    """
    check_output(output_prefix, overwrite)
    report = start_report(output_prefix, tokenizer, append_eod, {"append_eod": append_eod}, list(map(str, inputs)))
    dtype, eod_id = best_dtype(tokenizer.vocab_size), report.tokenizer["eod_id"]
    with closing(DatasetWriter(report, output_prefix, dtype, tokenizer.vocab_size)) as writer:
        for document in documents:
            if not document.text:
                report.empty_documents += 1
                continue
            encoded = tokenizer.encode_arrays([document.text])
            writer.add(*with_ends(encoded, eod_id, dtype))
            report.text_bytes += len(document.text.encode())
            if not tokenizer.is_exact(document.text, encoded[0]):
                writer.note_inexact([document.source], 1)
        if report.documents == 0:
            raise DataError(
                f"{output_prefix}: no text to build a dataset of ({report.empty_documents} empty documents); "
                "check the input"
            )
        writer.finish()
    return report
