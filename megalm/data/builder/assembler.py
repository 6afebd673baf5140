"""Assemble finished parts into datasets: remove duplicates, split, and write once in input order."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.decontamination import (
    LISTED,
    ListedOverlap,
    OverlapCounts,
    OverlapIndex,
    overlap_listing,
    overlap_report,
)
from megalm.data.builder.dedup import MADE, make_deduplicator
from megalm.data.builder.disk_hash_table import Bools
from megalm.data.builder.shard_files import WorkUnitFiles, WorkUnitSummary
from megalm.data.indexed.dataset import best_dtype, bin_path, idx_path, sidecar_path
from megalm.data.indexed.metadata import (
    AWAITS_MERGE,
    KEPT_NAMES,
    SOURCE,
    DatasetMetadata,
    dataset_paths,
    overlaps_path,
    signatures_path,
    sources_path,
)
from megalm.data.indexed.token_counts import TokenCounter
from megalm.data.indexed.trained_tokens import BitPacker, trained_path
from megalm.data.indexed.writer import IndexedDatasetWriter, RowWriter
from megalm.data.readers.document_reader import Span, lines_before, record_name
from megalm.data.readers.input_files import InputFile, sha256_of
from megalm.data.readers.losses import Losses
from megalm.data.sampling.samples import split_documents
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import sync_directory, write_bytes_atomically, write_json


@dataclass(frozen=True)
class Placed:
    """A finished part and the spans that it was made from."""

    part: WorkUnitFiles
    summary: WorkUnitSummary
    spans: tuple[Span, ...]


class DatasetWriter:
    """Writes all files of a dataset under temporary names; `finish()` renames them and fills the report.

    Attributes:
        counter: counts the tokens; its `name` is the source file's name in errors.
        listing: lines of PREFIX.overlaps, which is written if the report has an `overlap`.
    """

    def __init__(
        self,
        report: DatasetMetadata,
        prefix: str | Path,
        dtype: np.dtype[np.generic],
        vocab_size: int | None,
        sourced: bool = False,
        signed: bool = False,
        marked: bool = False,
    ) -> None:
        self.report, self._prefix = report, prefix
        self._tokens = IndexedDatasetWriter(prefix, dtype)
        self.counter = TokenCounter(vocab_size, bin_path(prefix))
        self._sources = RowWriter(sources_path(prefix)) if sourced else None
        self._signatures = RowWriter(signatures_path(prefix)) if signed else None
        self._trained = RowWriter(trained_path(prefix)) if marked else None
        self._bits, self.trained_tokens = BitPacker(), 0
        self.listing: list[bytes] = []

    def add(
        self,
        tokens: npt.NDArray[np.generic],
        lengths: npt.NDArray[Any],
        keep: Bools,
        sequences: npt.NDArray[np.int64] | None = None,
        sources: npt.NDArray[Any] | None = None,
        signatures: npt.NDArray[Any] | None = None,
        trained: Bools | None = None,
    ) -> None:
        """Append some of n documents.

        Args:
            tokens: of all their sequences, concatenated; lengths: [all sequences] in tokens.
            keep: [n] whether a document is appended.
            sequences: [n] number of sequences of each; None: one.
            sources, signatures: [n] SOURCE rows and MinHash values; trained: of each token. They are written if this
                dataset has files for them.
        """
        stay = keep if sequences is None else np.repeat(keep, sequences)
        of_tokens = np.repeat(stay, lengths)
        chosen = tokens if keep.all() else tokens[of_tokens]
        self.counter.add(chosen)
        self._tokens.append_documents(chosen, lengths[stay], None if sequences is None else np.cumsum(sequences[keep]))
        for writer, rows in ((self._sources, sources), (self._signatures, signatures)):
            if writer is not None and rows is not None:
                writer.add(rows[keep])
        if self._trained is not None and trained is not None:
            self._trained.add(self._bits.add(trained[of_tokens]))
            self.trained_tokens += int(trained[of_tokens].sum())
        self.report.documents += int(keep.sum())

    def note_inexact(self, names: Sequence[str], count: int) -> None:
        self.report.inexact_documents += count
        self.report.inexact_names += names[: KEPT_NAMES - len(self.report.inexact_names)]

    def finish(self) -> None:
        """Rename the files to their final names; PREFIX.json comes last and marks the dataset as built.

        Raises:
            DataError: no token of conversations is trained.
        """
        self.check_trained()
        # Old ones do not describe the new tokens.
        for path_of in (sidecar_path, sources_path, signatures_path, trained_path, overlaps_path):
            path_of(self._prefix).unlink(missing_ok=True)
        self._tokens.close()
        summary, report = self.counter.summary(), self.report
        report.tokens, report.unigram_entropy, report.bin_sha256 = (
            summary.tokens,
            summary.unigram_entropy,
            summary.sha256,
        )
        try:
            if self._sources is not None:
                self._sources.close()
            if self._signatures is not None:
                report.minhash |= {**MADE, "sha256": self._signatures.close()}
            if self._trained is not None:
                self._trained.add(self._bits.end())
                report.trained = {"tokens": self.trained_tokens, "sha256": self._trained.close()}
            if report.overlap:
                write_bytes_atomically(overlaps_path(self._prefix), b"".join(self.listing))
            sync_directory(Path(self._prefix).parent)
            report.idx_sha256 = sha256_of(idx_path(self._prefix))
            write_json(sidecar_path(self._prefix), asdict(report))
        except BaseException:
            _unlink_all(self._prefix)  # tokens without PREFIX.json would block the next attempt
            raise

    def check_trained(self) -> None:
        """Raises DataError if no token of conversations is trained."""
        if self._trained is not None and not self.trained_tokens:
            raise DataError(
                f"{self._prefix}: no token is trained: the conversations have no text of the assistant, or the chat "
                "template marks none; check the roles of the messages, and the template (--chat-template)"
            )

    def close(self) -> None:
        """Discard unfinished files."""
        for writer in (self._tokens, self._sources, self._signatures, self._trained):
            if writer is not None:
                writer.abort()


def _unlink_all(prefix: str | Path) -> None:
    for path in dataset_paths(prefix):
        path.unlink(missing_ok=True)


class Assembler:
    """Takes finished parts in input order; `finish()` gives the datasets of `reports` their final names.

    A single dataset is written as its parts arrive, in parallel with encoding. A split waits for all parts, because its
    boundaries depend on the number of kept documents.
    """

    def __init__(
        self,
        reports: Sequence[DatasetMetadata],
        prefixes: Sequence[str],
        files: Sequence[InputFile],
        options: BuildOptions,
        tokenizer: Tokenizer,
        work: Path,
    ) -> None:
        self._reports, self._prefixes, self._options = reports, prefixes, options
        self._numbers = {file.path: number for number, file in enumerate(files)}
        # A document of another shard can have a near copy here and be removed itself: only the merge can decide.
        self._signed, self._marked = options.dedup == "minhash", options.chat is not None
        self._deferred = self._signed and options.shard[1] > 1
        self._seen = make_deduplicator(
            "none" if self._deferred else options.dedup, work / "seen", options.minhash_threshold
        )
        self._vocab_size, self._dtype = tokenizer.vocab_size, best_dtype(tokenizer.vocab_size)
        self.losses = Losses()
        self._overlap_counts, self._overlaps = OverlapCounts(), list[ListedOverlap]()
        self._lost_files: set[str] = set()
        self._lines: dict[str, int] = {}  # lines seen so far, per file
        self._added: list[tuple[Placed, list[int], npt.NDArray[np.uint8]]] = []  # first lines; masks as bits
        self._starts: list[int] = []  # number of the first document of each part that was added
        self._documents = self._left_out = 0
        self._outputs = [] if options.split else self._open_outputs()

    def add(self, placed: Placed) -> None:
        """Add the next part. Raises DataError for a damaged part, or a full disk."""
        first_lines = self._first_lines(placed)
        self._count_left_out(placed, first_lines)
        self._starts.append(self._documents + self._left_out)
        mask = self._keep(placed)
        kept = int(mask.sum())
        self._added.append((placed, first_lines, np.packbits(mask)))
        if self._outputs:
            self._copy(placed, mask, first_lines, self._documents, [(0, self._documents + kept)])
        self._documents += kept
        self._left_out += len(mask) - kept

    def finish(self, progress: Callable[[float], None], overlap: OverlapIndex | None = None) -> None:
        """Fill the reports and give the outputs their final names.

        Args:
            overlap: the evaluation sets of `BuildOptions.overlap`.

        Raises:
            DataError: no document is left, or more is lost than `max_loss`; no output gets its final name then.
        """
        main, losses = self._reports[0], self.losses
        losses.lost_files = len(self._lost_files)
        main.skipped, main.empty_documents, main.losses = losses.skipped, losses.empty, asdict(losses)
        if self._options.max_loss is not None:
            main.losses["max_loss"] = self._options.max_loss
        for name in self._options.filters.names:
            main.removed.setdefault(name, 0)
        if overlap is not None and self._options.overlap is not None:
            counts = self._overlap_counts
            main.removed["overlap"] = counts.dropped
            main.overlap = overlap_report(self._options.overlap, overlap, counts, len(self._overlaps))
        if self._options.dedup != "none" and not self._deferred:
            main.removed[self._options.dedup] = self._left_out
        main.near_copies = [pair.named(self._name) for pair in self._seen.pairs]
        if self._deferred:
            main.minhash[AWAITS_MERGE] = True
        if self._documents == 0:
            first = f", the first: {main.messages[0]}" if main.messages else ""
            raise DataError(
                f"{self._prefixes[0]}: no documents are left ({main.skipped:,} unreadable, {losses.empty:,} empty, "
                f"{sum(main.removed.values()):,} removed{first}); check the input and the filters"
            )
        losses.check(self._options.max_loss, self._prefixes[0], main.messages)
        if self._options.split:
            self._split(progress)
        for report in self._reports[1:]:
            for name in ("skipped", "empty_documents", "losses", "messages", "removed", "near_copies", "overlap"):
                setattr(report, name, getattr(main, name))
        for output in self._outputs:  # all of a split, or none
            output.check_trained()
        for output in self._outputs:
            output.listing = overlap_listing(overlap, self._overlaps) if overlap is not None else []
            output.finish()
        progress(1.0)

    def close(self) -> None:
        """Discard unfinished outputs; the parts stay."""
        for output in self._outputs:
            output.close()

    def _open_outputs(self) -> list[DatasetWriter]:
        return [
            DatasetWriter(report, prefix, self._dtype, self._vocab_size, True, self._signed, self._marked)
            for report, prefix in zip(self._reports, self._prefixes, strict=True)
        ]

    def _split(self, progress: Callable[[float], None]) -> None:
        bounds = split_documents(self._documents, self._options.split)
        for prefix, (start, end) in zip(self._prefixes, bounds, strict=True):
            if start == end:
                raise DataError(f"{prefix}: the split leaves it without documents; give more text or a larger weight")
        self._outputs, done = self._open_outputs(), 0
        for placed, first_lines, bits in self._added:
            mask = np.unpackbits(bits, count=placed.summary.documents).astype(np.bool_)
            self._copy(placed, mask, first_lines, done, bounds)
            done += int(mask.sum())
            progress(done / self._documents)

    def _keep(self, placed: Placed) -> Bools:
        """Return [n] whether each document of the part is kept."""
        if self._options.dedup == "none" or not placed.summary.documents:
            return np.ones(placed.summary.documents, dtype=np.bool_)
        return self._seen.add(placed.part.signatures())

    def _name(self, number: int) -> str:
        """Return a document's file and line, given its number in input order (counting removed documents)."""
        place = bisect_right(self._starts, number) - 1
        placed, first_lines, _ = self._added[place]
        row = placed.part.documents()[number - self._starts[place]]
        file = placed.spans[row["span"]].file
        return record_name(file, self._options.read, first_lines[row["span"]] + int(row["line"]))

    def _first_lines(self, placed: Placed) -> list[int]:
        """Return the line number in its file at which each span of the part starts."""
        first = []
        for span, count in zip(placed.spans, placed.summary.span_lines, strict=True):
            # A shard can start in the middle of a file.
            known = 0 if span.start == 0 else self._lines.get(span.file.path)  # a file can occur twice
            first.append(lines_before(span) if known is None else known)
            self._lines[span.file.path] = first[-1] + count
        return first

    def _count_left_out(self, placed: Placed, first_lines: Sequence[int]) -> None:
        report = self._reports[0]
        self.losses.add(placed.summary.losses)
        self._lost_files |= {placed.spans[number].file.path for number in placed.summary.lost_spans}
        for number, line, problem in placed.summary.messages[: KEPT_NAMES - len(report.messages)]:
            name = record_name(placed.spans[number].file, self._options.read, first_lines[number] + line)
            report.messages.append(f"{name}: {problem}")
        self._overlap_counts.add(placed.summary.overlap)
        for number, line, *found in placed.summary.overlaps[: LISTED - len(self._overlaps)]:
            name = record_name(placed.spans[number].file, self._options.read, first_lines[number] + line)
            self._overlaps.append(ListedOverlap._make((name, *found)))
        placed.summary.overlaps.clear()  # the summaries of all parts are kept
        for name, count in placed.summary.removed.items():
            report.removed[name] = report.removed.get(name, 0) + count

    def _copy(
        self,
        placed: Placed,
        mask: Bools,
        first_lines: Sequence[int],
        done: int,
        bounds: Sequence[tuple[int, int]],
    ) -> None:
        """Copy a part's kept documents to their outputs; `done` documents were copied before."""
        rows = placed.part.documents()
        signatures = placed.part.signatures() if self._signed and len(rows) else None
        tokens = np.fromfile(placed.part.path("tokens"), dtype=self._dtype)
        intact = len(tokens) == placed.summary.tokens == int(rows["tokens"].sum()) and len(rows) == len(mask)
        if not intact or zlib.crc32(tokens.data) != placed.summary.crc:
            raise placed.part.damaged()
        trained = placed.part.trained(len(tokens)) if self._marked else None
        spans, sources = rows["span"], np.zeros(len(rows), SOURCE)
        sources["file"] = np.array([self._numbers[span.file.path] for span in placed.spans], dtype=np.uint32)[spans]
        sources["line"] = rows["line"] + np.array(first_lines, dtype=np.int64)[spans]
        sources["size"], sources["start"] = rows["size"], rows["start"]
        ordinals = done + np.cumsum(mask) - 1
        for output, (start, end) in zip(self._outputs, bounds, strict=True):
            here = mask & (ordinals >= start) & (ordinals < end)
            if not here.any():
                continue
            output.add(tokens, rows["tokens"], here, sources=sources, signatures=signatures, trained=trained)
            output.report.text_bytes += int(rows["text_bytes"][here].sum())
            inexact = np.flatnonzero(here & ~rows["exact"])
            names = [
                record_name(placed.spans[spans[place]].file, self._options.read, int(sources["line"][place]))
                for place in inexact[:KEPT_NAMES]
            ]
            output.note_inexact(names, len(inexact))
