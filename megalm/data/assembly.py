"""Finished parts into datasets: duplicates out, split, written once, in the order of the input."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.dedup import seen_of
from megalm.data.files import sync_directory, temporary_name, write_json, writing_to
from megalm.data.indexed import IndexedDatasetWriter, best_dtype, bin_path, idx_path, sidecar_path
from megalm.data.inputs import InputFile, sha256_of
from megalm.data.parts import Part, PartSummary
from megalm.data.plan import BuildOptions
from megalm.data.reader import Span, lines_before, record_name
from megalm.data.report import KEPT_NAMES, BuildReport
from megalm.data.samples import split_documents
from megalm.data.sources import SOURCE, sources_path
from megalm.data.summary import TokenCounter
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError


@dataclass(frozen=True)
class Placed:
    """A finished part and the spans that it was made of."""

    part: Part
    summary: PartSummary
    spans: tuple[Span, ...]


class _Output:
    """One dataset while it is written."""

    def __init__(self, report: BuildReport, prefix: str, vocab_size: int) -> None:
        self.report, self.prefix = report, prefix
        self._writer = IndexedDatasetWriter(prefix, best_dtype(vocab_size))
        self._counter = TokenCounter(vocab_size, bin_path(prefix))
        self._sources_temporary = temporary_name(sources_path(prefix))
        self._sources = self._sources_temporary.open("wb")

    def add(self, tokens: npt.NDArray[np.generic], rows: npt.NDArray[Any], sources: npt.NDArray[Any]) -> None:
        self._counter.add(tokens)
        self._writer.append_documents(tokens, rows["tokens"])
        with writing_to(sources_path(self.prefix)):
            self._sources.write(sources.tobytes())
        self.report.documents += len(rows)
        self.report.tokens += len(tokens)
        self.report.text_bytes += int(rows["text_bytes"].sum())

    def note_inexact(self, names: Sequence[str], count: int) -> None:
        self.report.inexact_documents += count
        self.report.inexact_names += names[: KEPT_NAMES - len(self.report.inexact_names)]

    def finish(self) -> None:
        """Give the files their names; PREFIX.json, without which nothing counts as built, is the last."""
        with writing_to(sources_path(self.prefix)):
            self._sources.close()
            sidecar_path(self.prefix).unlink(missing_ok=True)
            self._writer.close()
            self._sources_temporary.replace(sources_path(self.prefix))
            sync_directory(Path(self.prefix).parent)
        summary = self._counter.summary()
        self.report.unigram_entropy, self.report.bin_sha256 = summary.unigram_entropy, summary.sha256
        self.report.idx_sha256 = sha256_of(idx_path(self.prefix))
        write_json(sidecar_path(self.prefix), asdict(self.report))

    def abort(self) -> None:
        self._writer.abort()
        self._sources.close()
        self._sources_temporary.unlink(missing_ok=True)


def assemble(
    parts: Sequence[Placed],
    files: Sequence[InputFile],
    reports: Sequence[BuildReport],
    prefixes: Sequence[str],
    options: BuildOptions,
    tokenizer: Tokenizer,
    work: Path,
    progress: Callable[[float], None],
) -> None:
    """Write the datasets of `reports` (one, or one for each weight of the split) and fill the reports.

    Raises:
        DataError: no document left, a damaged part, a full disk; no output has its name then.
    """
    kept = _keep(parts, options, work)
    documents = sum(int(mask.sum()) for _, mask in kept())
    _count_left_out(parts, files, reports[0], options, documents)
    if documents == 0:
        raise DataError(
            f"{prefixes[0]}: no text to build a dataset of ({reports[0].skipped:,} documents that cannot be read, "
            f"{sum(reports[0].removed.values()):,} removed); check the input and the filters"
        )
    bounds = split_documents(documents, options.split or [1.0])
    for report in reports[1:]:
        report.skipped, report.messages, report.removed = (
            reports[0].skipped,
            reports[0].messages,
            reports[0].removed,
        )
    numbers = {file.path: number for number, file in enumerate(files)}
    with ExitStack() as stack:
        outputs = [
            _Output(report, prefix, tokenizer.vocab_size) for report, prefix in zip(reports, prefixes, strict=True)
        ]
        for output in outputs:
            stack.callback(output.abort)
        done = 0
        for (placed, mask), first_lines in zip(kept(), _first_lines(parts), strict=True):
            done = _copy(placed, mask, first_lines, done, list(zip(outputs, bounds, strict=True)), options, numbers)
            progress(done / documents)
        for output, (start, end) in zip(outputs, bounds, strict=True):
            if start == end:
                raise DataError(f"{output.prefix}: the split leaves it without a document; give more text or weight")
        for output in outputs:
            output.finish()
        stack.pop_all()


def _keep(
    parts: Sequence[Placed], options: BuildOptions, work: Path
) -> Callable[[], Iterator[tuple[Placed, npt.NDArray[np.bool_]]]]:
    """Parts with [n] which of their documents stay; duplicates are found in one pass, then remembered on disk."""
    if options.dedup == "none":
        return lambda: ((placed, np.ones(placed.summary.documents, dtype=np.bool_)) for placed in parts)
    masks = work / "kept"
    with writing_to(masks):
        seen = seen_of(options.dedup, work / "seen", options.minhash_threshold)
        with masks.open("wb") as file:
            for placed in parts:
                signatures = placed.part.documents()[1]
                file.write(seen.add(signatures).tobytes() if len(signatures) else b"")
        del seen
        (work / "seen").unlink(missing_ok=True)

    def again() -> Iterator[tuple[Placed, npt.NDArray[np.bool_]]]:
        with masks.open("rb") as file:
            for placed in parts:
                yield placed, np.frombuffer(file.read(placed.summary.documents), dtype=np.bool_)

    return again


def _first_lines(parts: Sequence[Placed]) -> Iterator[list[int]]:
    """For each part, where each of its spans starts in its file, in lines."""
    lines: dict[str, int] = {}
    for placed in parts:
        first = []
        for span, count in zip(placed.spans, placed.summary.span_lines, strict=True):
            # A shard may start in the middle of a file.
            first.append(lines[span.file.path] if span.file.path in lines else lines_before(span))
            lines[span.file.path] = first[-1] + count
        yield first


def _count_left_out(
    parts: Sequence[Placed],
    files: Sequence[InputFile],
    report: BuildReport,
    options: BuildOptions,
    documents: int,
) -> None:
    for placed, first_lines in zip(parts, _first_lines(parts), strict=True):
        report.skipped += placed.summary.problems
        for number, line, problem in placed.summary.messages[: KEPT_NAMES - len(report.messages)]:
            name = record_name(placed.spans[number].file, options.read, first_lines[number] + line)
            report.messages.append(f"{name}: {problem}")
        for name, count in placed.summary.removed.items():
            report.removed[name] = report.removed.get(name, 0) + count
    for name in options.filters.names:
        report.removed.setdefault(name, 0)
    if options.dedup != "none":
        report.removed[options.dedup] = sum(placed.summary.documents for placed in parts) - documents


def _copy(
    placed: Placed,
    mask: npt.NDArray[np.bool_],
    first_lines: Sequence[int],
    done: int,
    outputs: Sequence[tuple[_Output, tuple[int, int]]],
    options: BuildOptions,
    numbers: dict[str, int],
) -> int:
    """Copy what stays of a part to the outputs that it belongs to; the number of documents done after it."""
    rows = placed.part.documents()[0]
    tokens = np.fromfile(placed.part.path("tokens"), dtype=np.dtype(outputs[0][0].report.dtype).newbyteorder("<"))
    intact = len(tokens) == placed.summary.tokens == int(rows["tokens"].sum()) and len(rows) == len(mask)
    if not intact or zlib.crc32(tokens.data) != placed.summary.crc:
        raise placed.part.damaged()
    sources = np.zeros(len(rows), SOURCE)
    spans = rows["span"]
    sources["file"] = np.array([numbers[span.file.path] for span in placed.spans], dtype=np.uint32)[spans]
    sources["line"] = rows["line"] + np.array(first_lines, dtype=np.int64)[spans]
    sources["size"], sources["start"] = rows["size"], rows["start"]
    ordinals = done + np.cumsum(mask) - 1
    for output, (start, end) in outputs:
        here = mask & (ordinals >= start) & (ordinals < end)
        if here.any():
            chosen = tokens if here.all() else tokens[np.repeat(here, rows["tokens"])]
            output.add(chosen, rows[here], sources[here])
        inexact = np.flatnonzero(here & ~rows["exact"])
        names = [
            record_name(placed.spans[spans[place]].file, options.read, int(sources["line"][place]))
            for place in inexact[:KEPT_NAMES]
        ]
        output.note_inexact(names, len(inexact))
    return done + int(mask.sum())
