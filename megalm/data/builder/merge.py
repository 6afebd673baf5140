"""Several datasets into one, copied without tokenizing again; of copies only the first, if that is wanted."""

from __future__ import annotations

import hashlib
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.builder.assembler import DatasetWriter
from megalm.data.builder.dedup import Dedup, Deduplicator, exact_signatures, make_deduplicator
from megalm.data.builder.minhash_dedup import KEPT_PAIRS, Pair, check_threshold
from megalm.data.builder.minhash_file import open_signatures
from megalm.data.builder.workspace import working_in
from megalm.data.indexed.dataset import IndexedDataset, bin_path
from megalm.data.indexed.document_sources import DocumentSources
from megalm.data.indexed.metadata import (
    AWAITS_MERGE,
    KEPT_NAMES,
    DatasetMetadata,
    finished_report,
    read_sidecar,
    versions,
)
from megalm.data.indexed.token_counts import Tell, no_tell
from megalm.data.readers.input_files import KEPT_MESSAGES, WORK_SUFFIX
from megalm.errors import DataError

SUMMED = ("empty_documents", "skipped", "inexact_documents", "text_bytes")
COPIED_TOKENS = 1 << 22  # at once, of at most so many documents
COPIED_DOCUMENTS = 1 << 14


class Input(NamedTuple):
    """A dataset to merge, and its PREFIX.json; {} where another tool built it."""

    dataset: IndexedDataset
    sidecar: dict[str, Any]

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.sidecar.get("tokenizer", {})


def merge_datasets(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
    dedup: Dedup = "none",
    minhash_threshold: float | None = None,
    tell: Tell = no_tell,
) -> DatasetMetadata:
    """Write all documents of `prefixes`, in that order, to one dataset.

    Where all inputs have their PREFIX.json, its counts are added up; where one has none, what cannot be known
    is left at nothing, and `options["complete"]` is false. Called again when it is done, it writes nothing;
    with `overwrite` it reads all that is there to be sure.

    Args:
        dedup: "exact" leaves out documents with the same tokens as an earlier one, of this dataset or another;
            "minhash" near copies, by the signatures that builds with it keep. How many is in `removed`, and bytes of
            text are not known then. Shards built with "minhash" have all theirs until they are merged with it.
        minhash_threshold: as in `BuildOptions`; default that of the builds.
        progress, tell: called with a line for people after each dataset, and with the tokens that were read.

    Raises:
        DataError: inputs of different dtypes or tokenizers, damaged inputs, an input that is also the output, an
            output that exists and is not the merge of just these; shards whose near copies would stay, and inputs
            without signatures, or with other thresholds, where signatures are needed.
    """
    if len(prefixes) < 2:
        raise DataError("merging takes two datasets or more; name their prefixes")
    if Path(output_prefix).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise DataError(f"{output_prefix}: is an input and the output; choose another output prefix")
    inputs = [Input(IndexedDataset(prefix), read_sidecar(prefix) or {}) for prefix in prefixes]
    report = _merged_report(inputs, output_prefix, _asked(inputs, dedup, minhash_threshold))
    if report.options["complete"]:
        finished = finished_report(output_prefix, report.options, report.tokenizer.get("fingerprint"), overwrite)
        if finished is not None:
            return finished
    work = Path(f"{output_prefix}{WORK_SUFFIX}")
    with working_in(work, report.options, [str(output_prefix)], overwrite, goes_on=False):
        try:
            _merge(inputs, report, output_prefix, work, progress or (lambda line: None), tell)
        finally:
            shutil.rmtree(work, ignore_errors=True)  # NFS keeps a file that is still mapped
    return report


def _asked(inputs: Sequence[Input], dedup: Dedup, threshold: float | None) -> dict[str, Any]:
    """Which copies are left out, as PREFIX.json has it.

    Raises:
        DataError: shards whose near copies would stay, or datasets of several thresholds.
    """
    if dedup != "minhash":
        for dataset, sidecar in inputs:
            if sidecar.get("minhash", {}).get(AWAITS_MERGE):
                raise DataError(
                    f"{dataset.prefix}: is a shard built with --dedup minhash, and still has its near copies; merge "
                    "with --dedup minhash"
                )
        return {"dedup": dedup} if dedup != "none" else {}
    known = {sidecar["options"]["minhash_threshold"] for _, sidecar in inputs if sidecar.get("minhash")}
    if threshold is None and len(known) > 1:
        raise DataError(
            f"{inputs[0].dataset.prefix} and others were built with several thresholds, "
            f"{', '.join(map(str, sorted(known)))}; state one (--minhash-threshold 0.8)"
        )
    # Where none is known there are no signatures either, which is refused before anything is compared.
    stated = next(iter(known), 1.0) if threshold is None else threshold
    return {"dedup": dedup, "minhash_threshold": check_threshold(stated)}


def _merged_report(inputs: Sequence[Input], output_prefix: str | Path, asked: dict[str, Any]) -> DatasetMetadata:
    """What PREFIX.json will say, but for what copying finds out: sums, and what cannot be known of other tools' parts.

    Raises:
        DataError: inputs of different tokenizers.
    """
    stated = [given for given in inputs if given.tokenizer]
    for dataset, sidecar in stated:
        ours, first = sidecar["tokenizer"], stated[0].tokenizer
        for fact, what in (("fingerprint", "tokenizer"), ("eod_id", "end of documents")):
            if ours.get(fact) != first.get(fact):
                raise DataError(
                    f"{dataset.prefix}: was built with {what} {ours.get('name')}, {stated[0].dataset.prefix} with "
                    f"another, {first.get('name')}; build one of them again"
                )
    sidecars = [sidecar for _, sidecar in inputs if sidecar]
    complete = len(sidecars) == len(inputs) and all(sidecar["options"].get("complete", True) for sidecar in sidecars)
    report = DatasetMetadata(
        prefix=Path(output_prefix).name,
        tokenizer=stated[0].tokenizer if stated else {},
        options={"merged": [dataset.prefix for dataset, _ in inputs], "complete": complete, **asked},
        inputs=[entry for sidecar in sidecars for entry in sidecar["inputs"]],
        dtype=inputs[0].dataset.dtype.name,
        versions=versions(),
    )
    if not complete:
        return report
    report.options["hashes"] = [sidecar["bin_sha256"] for sidecar in sidecars]
    if reads := [sidecar["options"]["read"] for sidecar in sidecars if "read" in sidecar["options"]]:
        report.options["read"] = reads[0]
    for key in SUMMED:
        setattr(report, key, sum(sidecar.get(key, 0) for sidecar in sidecars))
    for sidecar in sidecars:
        for name, count in sidecar.get("removed", {}).items():
            report.removed[name] = report.removed.get(name, 0) + count
    for key, most in (("near_copies", KEPT_PAIRS), ("inexact_names", KEPT_NAMES), ("messages", KEPT_MESSAGES)):
        setattr(report, key, [entry for sidecar in sidecars for entry in sidecar.get(key, [])][:most])
    return report


def _merge(
    inputs: Sequence[Input],
    report: DatasetMetadata,
    output_prefix: str | Path,
    work: Path,
    say: Callable[[str], None],
    tell: Tell,
) -> None:
    """Write all files of the dataset, and fill the report."""
    dedup, first = report.options.get("dedup", "none"), inputs[0].dataset
    for dataset, _ in inputs:
        dataset.verify()
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{dataset.prefix}: holds {dataset.dtype}, {first.prefix} {first.dtype}; "
                "only datasets of one tokenizer can be merged, build it again with the other's"
            )
    sources = _sources(inputs) if report.options["complete"] else None
    seen = make_deduplicator(dedup, work / "seen", report.options.get("minhash_threshold", 1.0))
    vocab_size, signed = report.tokenizer.get("vocab_size"), dedup == "minhash"
    with closing(DatasetWriter(report, output_prefix, first.dtype, vocab_size, sources is not None, signed)) as writer:
        for number, given in enumerate(inputs):
            copies = _copy(given, seen, writer, sources[number] if sources else None, tell)
            if dedup != "none":
                report.removed[dedup] = report.removed.get(dedup, 0) + copies
            if copies:
                report.text_bytes = 0  # of those that stay: not known
            left_out = f", {copies:,} copies left out" if dedup != "none" else ""
            counts = f"{given.dataset.document_count:,} documents, {len(given.dataset.tokens):,} tokens"
            say(f"{given.dataset.prefix}: {counts}{left_out}")
        _note_pairs(report, seen.pairs, [dataset for dataset, _ in inputs])
        writer.finish()


def _copy(
    given: Input, seen: Deduplicator, writer: DatasetWriter, sources: tuple[npt.NDArray[Any], int] | None, tell: Tell
) -> int:
    """Copy the documents that nobody has seen, piece by piece; how many there are of the others.

    Raises:
        DataError: tokens or signatures that are not what was recorded of them, or are missing.
    """
    dataset, sidecar = given
    starts = np.append(dataset.sequence_pointers // dataset.dtype.itemsize, len(dataset.tokens))
    bounds = starts[dataset.document_index]  # in tokens, [documents + 1]
    count, first, copies, digest = dataset.document_count, 0, 0, hashlib.sha256()
    dedup = writer.report.options.get("dedup", "none")
    signed = open_signatures(dataset.prefix, sidecar.get("minhash", {}), count) if dedup == "minhash" else None
    writer.counter.name = bin_path(dataset.prefix)
    while first < count:
        end = int(np.searchsorted(bounds, bounds[first] + COPIED_TOKENS, side="right")) - 1
        end = max(first + 1, min(end, first + COPIED_DOCUMENTS))
        tokens = dataset.tokens[bounds[first] : bounds[end]]
        digest.update(tokens.data)
        tell(len(tokens))
        if dedup == "exact":
            new = seen.add(exact_signatures(np.split(tokens, bounds[first + 1 : end] - bounds[first])))
        else:
            new = seen.add(np.empty((end - first, 0)) if signed is None else signed[first:end])
        sequences = np.diff(dataset.document_index[first : end + 1])  # of each document
        lengths = dataset.sequence_lengths[dataset.document_index[first] : dataset.document_index[end]]
        stay = np.repeat(new, sequences)
        rows = None
        if sources is not None:
            rows = np.array(sources[0][first:end][new])
            rows["file"] += sources[1]
        writer.add(
            tokens if new.all() else tokens[np.repeat(stay, lengths)],
            lengths[stay],
            np.cumsum(sequences[new]),
            rows,
            None if signed is None else signed[first:end][new],
        )
        copies += int((~new).sum())
        first = end
    if sidecar.get("bin_sha256", digest.hexdigest()) != digest.hexdigest():
        raise DataError(f"{bin_path(dataset.prefix)}: is not what its .json recorded; copy or build it again")
    return copies


def _note_pairs(report: DatasetMetadata, pairs: Sequence[Pair], datasets: Sequence[IndexedDataset]) -> None:
    """Name what was left out and why, after what the builds named."""
    ends = list(accumulate(dataset.document_count for dataset in datasets))

    def name(number: int) -> str:
        place = bisect_right(ends, number)
        dataset = datasets[place]
        document = number - ends[place] + dataset.document_count
        source = DocumentSources(dataset.prefix, dataset.document_count)[document]
        return source.name if source else f"{dataset.prefix} document {document}"

    for pair in pairs[: KEPT_PAIRS - len(report.near_copies)]:
        report.near_copies.append({"left_out": name(pair.left_out), "copy_of": name(pair.copy_of), "alike": pair.alike})


def _sources(inputs: Sequence[Input]) -> list[tuple[npt.NDArray[Any], int]] | None:
    """Rows of each dataset's PREFIX.sources, and how many files those before it have; None unless all say where their
    documents came from and count lines alike."""
    readings = {str(sidecar["options"].get("read", {}).get("documents")) for _, sidecar in inputs}
    tables = [DocumentSources(dataset.prefix, dataset.document_count) for dataset, _ in inputs]
    if len(readings) > 1 or not all(table.available for table in tables):
        return None
    files = accumulate((len(sidecar["inputs"]) for _, sidecar in inputs), initial=0)
    return [(table.rows, before) for table, before in zip(tables, files, strict=False)]
