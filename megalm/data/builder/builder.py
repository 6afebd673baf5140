"""Build an indexed dataset from text: PREFIX.bin, PREFIX.idx, PREFIX.sources, and PREFIX.json, which describes it.

`build_files` builds from files of any size with many processes, and resumes an interrupted build: finished parts stay
in PREFIX.building/ until the dataset is complete. `build_dataset` builds from documents in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.builder.assembler import Assembler, DatasetWriter, Placed
from megalm.data.builder.build_plan import BuildOptions, Group, Plan, make_plan
from megalm.data.builder.decontamination import OverlapIndex, read_evaluation_sets
from megalm.data.builder.shard_files import WorkUnitFiles, WorkUnitSummary, encode_documents, with_ends
from megalm.data.builder.workers import Unit, do_units
from megalm.data.builder.workspace import hash_inputs_in_background, refuse_overwriting, tokenizer_files, working_in
from megalm.data.indexed.dataset import best_dtype
from megalm.data.indexed.metadata import DatasetMetadata, check_output, finished_report, start_report
from megalm.data.readers.document_reader import Document, Span, read_blocks
from megalm.data.readers.formats import format_of
from megalm.data.readers.input_files import WORK_SUFFIX, InputFile, ReadReport, find_inputs, sha256_of
from megalm.data.readers.losses import Losses
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import json_hash

logger = logging.getLogger(__name__)
LARGEST_BLOCK = 16 << 20  # sent to a worker through a pipe


@dataclass(frozen=True)
class BuildProgress:
    """Progress so far: this run's documents, text bytes and tokens, and the finished share of the input, 0 to 1."""

    documents: int
    text_bytes: int
    tokens: int
    share: float | None = None
    stage: str = "tokenizing"


Progress = Callable[[BuildProgress], None]


@dataclass(frozen=True)
class Built:
    """The result of a build: one dataset, or one per weight of the split.

    Attributes:
        was_there: the dataset already existed, and nothing was written.
        resumed: estimated bytes of text that an earlier, interrupted build had finished.
        reading: `ignored_files` and `ignored`, what was left out of folders.
    """

    reports: list[DatasetMetadata]
    was_there: bool
    resumed: int
    reading: ReadReport


@dataclass(frozen=True)
class BuildInputs:
    """What a build reads and begins with, found and checked."""

    files: list[InputFile]
    reading: ReadReport
    reports: list[DatasetMetadata]
    options: BuildOptions
    overlap: OverlapIndex | None


def check_build(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    options: BuildOptions,
    stdin_kind: str = ".jsonl",
) -> BuildInputs:
    """Return what a build would read; writes nothing, and reads only evaluation sets.

    Raises: as `build_files`, before it reads.
    """
    if options.chat is not None and not tokenizer.reads_special_tokens:
        raise DataError(
            f"{tokenizer.spec}: reads no special tokens from a text, as chat templates write them; give the same "
            "tokenizer as a tokenizer.json, which an export to Hugging Face has"
        )
    reading = ReadReport()
    files = find_inputs(paths, reading, stdin_kind, options.read.kind)
    prefixes = options.output_prefixes(output_prefix)
    names = Counter(os.path.abspath(file.path) for file in files)
    if repeated := [name for name, times in names.items() if times > 1]:
        logger.warning("%s is named more than once, and is read each time (%d such files)", repeated[0], len(repeated))
    sources: list[str | Path] = [*(file.on_disk for file in files), *tokenizer_files(tokenizer.spec)]
    overlap = None
    if options.overlap is not None:
        overlap = read_evaluation_sets(options.overlap, tokenizer)
        options = replace(options, overlap=replace(options.overlap, content=overlap.content))
        read = {os.path.realpath(file.on_disk) for file in files}
        if both := [file.path for file in overlap.files if os.path.realpath(file.path) in read]:
            raise DataError(f"{both[0]}: is an input and an evaluation set (--exclude-overlap); choose one of them")
        sources += [path for file in overlap.files for path in file.on_disk]
    refuse_overwriting(prefixes, Path(f"{output_prefix}{WORK_SUFFIX}"), sources)
    facts = options.to_json() | ({"stdin_kind": stdin_kind} if any(file.is_stdin for file in files) else {})
    inputs: list[dict[str, Any]] = []  # one list for all reports
    # Also refuses a tokenizer without an end-of-document token, before anything is read.
    reports = [start_report(prefix, tokenizer, options.append_eod, facts, inputs) for prefix in prefixes]
    return BuildInputs(files, reading, reports, options, overlap)


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

    A build that was killed at any point resumes from the finished parts. If the dataset is already built, nothing is
    written. Documents that do not decode back exactly are counted and named, and stay in the dataset.

    Args:
        workers: number of processes that read and encode; 1: this process only.
        overwrite: replace a dataset of this name that was built differently or is damaged, which is otherwise an
            error; an existing dataset of the same build is read completely to verify it.
        again: build even if the dataset of the same build already exists.

    Raises:
        ConfigError: the dataset's files or PREFIX.building would replace an input or the tokenizer.
        DataError: see `BuildOptions.on_error`; an existing output that was built differently; an input that changes;
            no document left; a full disk. Finished parts stay in PREFIX.building for the next attempt.
    """
    found = check_build(paths, tokenizer, output_prefix, options or BuildOptions(), stdin_kind)
    options = found.options
    files, reading, reports = found.files, found.reading, found.reports
    prefixes, work = options.output_prefixes(output_prefix), Path(f"{output_prefix}{WORK_SUFFIX}")
    finished = None if again else _finished_reports(prefixes, files, reports[0], overwrite)
    if finished is not None:
        recorded = finished[0]
        Losses.from_report(recorded.losses).check(options.max_loss, prefixes[0], recorded.messages)
        return Built(finished, was_there=True, resumed=0, reading=reading)
    plan = make_plan(files, options, reports[0].tokenizer)
    with working_in(work, plan.identity, prefixes, overwrite):
        if options.shard[1] > 1:
            reports[0].listing = _listing(files)
        if found.overlap is not None:
            found.overlap.save(work)
        units, counts = _Units(plan, options, work), _Counts(plan, progress)
        with closing(Assembler(reports, prefixes, plan.files, options, tokenizer, work)) as assembler:
            with hash_inputs_in_background(plan.files) as hashes:
                for unit, summary in do_units(units.todo(), work, options, tokenizer, min(workers, plan.most_units)):
                    units.done(unit)
                    counts.add(summary, unit.weight, units.reused)
                    for placed in units.ready():  # while the workers encode
                        assembler.add(placed)
            for placed in units.ready():
                assembler.add(placed)
            for file in plan.files:
                file.check_unchanged()
            for file in plan.files:
                entry = file.facts() | {"bytes": file.size, "sha256": hashes.get(file.path, "")}
                del entry["size"]
                reports[0].inputs.append(entry)
            assembler.losses.input_bytes += plan.streamed_bytes
            assembler.finish(counts.assembling, found.overlap)
        shutil.rmtree(work, ignore_errors=True)  # NFS keeps files that are still mapped
    return Built(reports, was_there=False, resumed=units.reused, reading=reading)


class _Units:
    """Tracks the plan: the units still `todo`, and the parts that are `ready`, in input order."""

    def __init__(self, plan: Plan, options: BuildOptions, directory: Path) -> None:
        self._plan, self._options, self._directory = plan, options, directory
        self._order: deque[tuple[str, tuple[Span, ...]]] = deque()  # not yet yielded by `ready`
        self._done: set[str] = set()
        self.reused = 0  # weight of the parts of an earlier build

    def todo(self) -> Iterator[Unit]:
        """Yield the units to do. Raises DataError if a file has changed since it was found."""
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
        """Yield the finished parts that are next in input order, each once.

        Raises:
            DataError: a finished part has disappeared.
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
    """Sums the counts, and reports them."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self._weight, self._progress = plan.weight, progress or (lambda done: None)
        self._done, self._now = 0, BuildProgress(0, 0, 0)

    def add(self, summary: WorkUnitSummary, weight: int, reused: int) -> None:
        self._done += weight
        self._now = replace(
            self._now,
            documents=self._now.documents + summary.documents,
            text_bytes=self._now.text_bytes + summary.text_bytes,
            tokens=self._now.tokens + summary.tokens,
            share=min(1.0, (self._done + reused) / self._weight) if self._weight else None,
        )
        self._progress(self._now)

    def assembling(self, share: float) -> None:
        self._now = replace(self._now, share=share, stage="writing")
        self._progress(self._now)


def _finished_reports(
    prefixes: Sequence[str],
    files: Sequence[InputFile],
    wanted: DatasetMetadata,
    thorough: bool,
) -> list[DatasetMetadata] | None:
    """Return the reports of an existing dataset of the same build as `wanted`, if any (see `finished_report`)."""
    reports = []
    for prefix in prefixes:
        report = finished_report(prefix, wanted.options, wanted.tokenizer, thorough)
        if report is None or not _same_inputs(report, files):
            return None
        reports.append(report)
    return reports


def _same_inputs(report: DatasetMetadata, files: Sequence[InputFile]) -> bool:
    """Whether the files are the ones that were read: compares size and time, or the hash if the time differs."""
    if any(file.is_stdin for file in files):
        return False  # its content is unknown before it is read
    recorded = [entry for entry in report.inputs if isinstance(entry, dict)]
    if report.options["shard"] == [0, 1]:
        if [entry["path"] for entry in recorded] != [file.path for file in files]:
            return False
    elif report.listing != _listing(files):  # a shard lists only the files that it read from
        return False
    known = {entry["path"]: entry for entry in recorded}
    for file in files:
        entry = known.get(file.path)
        if entry is None:
            continue
        if entry["bytes"] != file.size:
            return False
        is_other = entry["mtime_ns"] != file.mtime_ns or entry.get("tag", "") != file.tag
        if is_other and entry["sha256"] != sha256_of(file.path):
            return False
    return bool(known)


def _listing(files: Sequence[InputFile]) -> str:
    """Return a hash of all input names and sizes, which determine the content of each shard."""
    return json_hash([[file.path, file.size] for file in files])


def build_dataset(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    append_eod: bool = True,
    inputs: Sequence[str] = (),
    overwrite: bool = False,
) -> DatasetMetadata:
    """Tokenize documents in memory, in their order, into a dataset without PREFIX.sources.

    Empty documents are skipped and counted.

    Args:
        inputs: the documents' sources, for PREFIX.json.
        overwrite: replace an existing dataset of this name, which is otherwise an error.

    Raises:
        DataError: the output exists, there are no documents or no end-of-document token, the disk is full, or
            `documents` raises it; nothing has the output's name then.
    """
    check_output(output_prefix, overwrite)
    report = start_report(output_prefix, tokenizer, append_eod, {"append_eod": append_eod}, list(map(str, inputs)))
    dtype, eod_id = best_dtype(tokenizer.vocab_size), report.tokenizer["eod_id"]
    with closing(DatasetWriter(report, output_prefix, dtype, tokenizer.vocab_size)) as writer:
        for document in documents:
            if not document.text:
                report.empty_documents += 1
                continue
            (found,) = encode_documents(tokenizer, [document.text])
            if isinstance(found, DataError):
                raise DataError(f"{document.source}: {found}")
            writer.add(*with_ends([tokenizer.begun(found.tokens)], eod_id, dtype), np.ones(1, dtype=np.bool_))
            report.text_bytes += found.text_bytes
            if not found.is_exact:
                writer.note_inexact([document.source], 1)
        if report.documents == 0:
            raise DataError(f"{output_prefix}: all {report.empty_documents} documents are empty; check the input")
        writer.finish()
    return report
