"""Finished parts into datasets: duplicates out, split, written once, in the order of the input."""

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
from megalm.data.builder.dedup import make_deduplicator
from megalm.data.builder.disk_hash_table import Bools
from megalm.data.builder.minhash_file import SignatureWriter
from megalm.data.builder.shard_files import WorkUnitFiles, WorkUnitSummary
from megalm.data.indexed.dataset import best_dtype, bin_path, idx_path, sidecar_path
from megalm.data.indexed.document_sources import SOURCE, sources_path
from megalm.data.indexed.metadata import AWAITS_MERGE, KEPT_NAMES, DatasetMetadata, signatures_path
from megalm.data.indexed.token_counts import TokenCounter
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.readers.document_reader import Span, lines_before, record_name
from megalm.data.readers.input_files import InputFile, sha256_of
from megalm.data.sampling.samples import split_documents
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import discard, sync_directory, temporary_name, write_json, writing_to


@dataclass(frozen=True)
class Placed:
    """A finished part and the spans that it was made of."""

    part: WorkUnitFiles
    summary: WorkUnitSummary
    spans: tuple[Span, ...]


class _Output:
    """One dataset while it is written."""

    def __init__(self, report: DatasetMetadata, prefix: str, vocab_size: int, signed: bool) -> None:
        self.report, self.prefix = report, prefix
        self._writer = IndexedDatasetWriter(prefix, best_dtype(vocab_size))
        self._counter = TokenCounter(vocab_size, bin_path(prefix))
        self._sources_temporary = temporary_name(sources_path(prefix))
        self._sources = self._sources_temporary.open("wb")
        self._signatures = SignatureWriter(prefix) if signed else None

    def add(
        self,
        tokens: npt.NDArray[np.generic],
        rows: npt.NDArray[Any],
        sources: npt.NDArray[Any],
        signatures: npt.NDArray[Any] | None,
    ) -> None:
        """Documents [n] of a part; their signatures are taken where there is a use for them."""
        if self._signatures is not None and signatures is not None:
            self._signatures.add(signatures)
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
            if self._signatures is None:
                signatures_path(self.prefix).unlink(missing_ok=True)
            else:
                self.report.minhash |= self._signatures.close()
            sync_directory(Path(self.prefix).parent)
        summary = self._counter.summary()
        self.report.unigram_entropy, self.report.bin_sha256 = summary.unigram_entropy, summary.sha256
        self.report.idx_sha256 = sha256_of(idx_path(self.prefix))
        write_json(sidecar_path(self.prefix), asdict(self.report))

    def abort(self) -> None:
        self._writer.abort()
        discard(self._sources, self._sources_temporary)
        if self._signatures is not None:
            self._signatures.abort()


class Assembler:
    """Takes finished parts in the order of the input; `finish()` gives the datasets of `reports` their names.

    One dataset is written as its parts come, beside the encoding. A split waits for all of them: where it lies
    depends on the number of documents that stay.
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
        # A near copy may be of a document of another shard that is itself left out: only the merge can tell.
        self._signed = options.dedup == "minhash"
        self._deferred = self._signed and options.shard[1] > 1
        self._seen = make_deduplicator(
            "none" if self._deferred else options.dedup, work / "seen", options.minhash_threshold
        )
        self._vocab_size = tokenizer.vocab_size
        self._lines: dict[str, int] = {}  # so many of each file have come
        self._waiting: list[tuple[Placed, npt.NDArray[np.uint8], list[int]]] = []  # masks as bits
        self._added: list[tuple[Placed, list[int]]] = []
        self._starts: list[int] = []  # number of the first document of each part that was added
        self._documents = self._left_out = 0
        self._outputs = [] if options.split else self._open_outputs()

    def add(self, placed: Placed) -> None:
        """Raises DataError for a damaged part, or a full disk."""
        first_lines = self._first_lines(placed)
        self._count_left_out(placed, first_lines)
        self._starts.append(self._documents + self._left_out)
        self._added.append((placed, first_lines))
        mask = self._keep(placed)
        kept = int(mask.sum())
        if self._outputs:
            self._copy(placed, mask, first_lines, self._documents, [(0, self._documents + kept)])
        else:
            self._waiting.append((placed, np.packbits(mask), first_lines))
        self._documents += kept
        self._left_out += len(mask) - kept

    def finish(self, progress: Callable[[float], None]) -> None:
        """Fill the reports and publish.

        Raises:
            DataError: no document left; no output has its name then.
        """
        main = self._reports[0]
        for name in self._options.filters.names:
            main.removed.setdefault(name, 0)
        if self._options.dedup != "none" and not self._deferred:
            main.removed[self._options.dedup] = self._left_out
        main.near_copies = [
            {"left_out": self._name(pair.left_out), "copy_of": self._name(pair.copy_of), "alike": pair.alike}
            for pair in self._seen.pairs
        ]
        if self._deferred:
            main.minhash[AWAITS_MERGE] = True
        if self._documents == 0:
            first = f", the first: {main.messages[0]}" if main.messages else ""
            raise DataError(
                f"{self._prefixes[0]}: no text to build a dataset of ({main.skipped:,} documents that cannot be read, "
                f"{sum(main.removed.values()):,} removed{first}); check the input and the filters"
            )
        if self._options.split:
            self._split(progress)
        for report in self._reports[1:]:
            report.skipped, report.messages, report.removed = main.skipped, main.messages, main.removed
            report.near_copies = main.near_copies
        while self._outputs:
            self._outputs[0].finish()
            self._outputs.pop(0)
        progress(1.0)

    def abort(self) -> None:
        """Throw away what has no name yet; the parts stay."""
        for output in self._outputs:
            output.abort()

    def _open_outputs(self) -> list[_Output]:
        return [
            _Output(report, prefix, self._vocab_size, self._signed)
            for report, prefix in zip(self._reports, self._prefixes, strict=True)
        ]

    def _split(self, progress: Callable[[float], None]) -> None:
        bounds = split_documents(self._documents, self._options.split)
        for prefix, (start, end) in zip(self._prefixes, bounds, strict=True):
            if start == end:
                raise DataError(f"{prefix}: the split leaves it without a document; give more text or weight")
        self._outputs, done = self._open_outputs(), 0
        for placed, bits, first_lines in self._waiting:
            mask = np.unpackbits(bits, count=placed.summary.documents).astype(np.bool_)
            self._copy(placed, mask, first_lines, done, bounds)
            done += int(mask.sum())
            progress(done / self._documents)

    def _keep(self, placed: Placed) -> Bools:
        """[n] which documents of the part stay."""
        if self._options.dedup == "none" or not placed.summary.documents:
            return np.ones(placed.summary.documents, dtype=np.bool_)
        return self._seen.add(placed.part.signatures())

    def _name(self, number: int) -> str:
        """File and line of a document, by its number in the order of the input, with those that were left out."""
        place = bisect_right(self._starts, number) - 1
        placed, first_lines = self._added[place]
        row = placed.part.documents()[number - self._starts[place]]
        file = placed.spans[row["span"]].file
        return record_name(file, self._options.read, first_lines[row["span"]] + int(row["line"]))

    def _first_lines(self, placed: Placed) -> list[int]:
        """Where each span of the part starts in its file, in lines."""
        first = []
        for span, count in zip(placed.spans, placed.summary.span_lines, strict=True):
            # A shard may start in the middle of a file.
            known = 0 if span.start == 0 else self._lines.get(span.file.path)  # a file may come twice
            first.append(lines_before(span) if known is None else known)
            self._lines[span.file.path] = first[-1] + count
        return first

    def _count_left_out(self, placed: Placed, first_lines: Sequence[int]) -> None:
        report = self._reports[0]
        report.skipped += placed.summary.problems
        for number, line, problem in placed.summary.messages[: KEPT_NAMES - len(report.messages)]:
            name = record_name(placed.spans[number].file, self._options.read, first_lines[number] + line)
            report.messages.append(f"{name}: {problem}")
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
        """Copy what stays of a part to the outputs that it belongs to; `done` documents came before."""
        rows = placed.part.documents()
        signatures = placed.part.signatures() if self._signed and len(rows) else None
        tokens = np.fromfile(placed.part.path("tokens"), dtype=best_dtype(self._vocab_size))
        intact = len(tokens) == placed.summary.tokens == int(rows["tokens"].sum()) and len(rows) == len(mask)
        if not intact or zlib.crc32(tokens.data) != placed.summary.crc:
            raise placed.part.damaged()
        spans, sources = rows["span"], np.zeros(len(rows), SOURCE)
        sources["file"] = np.array([self._numbers[span.file.path] for span in placed.spans], dtype=np.uint32)[spans]
        sources["line"] = rows["line"] + np.array(first_lines, dtype=np.int64)[spans]
        sources["size"], sources["start"] = rows["size"], rows["start"]
        ordinals = done + np.cumsum(mask) - 1
        for output, (start, end) in zip(self._outputs, bounds, strict=True):
            here = mask & (ordinals >= start) & (ordinals < end)
            if not here.any():
                continue
            chosen = tokens if here.all() else tokens[np.repeat(here, rows["tokens"])]
            output.add(chosen, rows[here], sources[here], None if signatures is None else signatures[here])
            inexact = np.flatnonzero(here & ~rows["exact"])
            names = [
                record_name(placed.spans[spans[place]].file, self._options.read, int(sources["line"][place]))
                for place in inexact[:KEPT_NAMES]
            ]
            output.note_inexact(names, len(inexact))
