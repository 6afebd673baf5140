"""Merge several datasets into one without tokenizing again, optionally with deduplication."""

from __future__ import annotations

import hashlib
import logging
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.builder.assembler import DatasetWriter
from megalm.data.builder.decontamination import LISTED, merge_overlaps
from megalm.data.builder.dedup import (
    KEPT_PAIRS,
    Dedup,
    Deduplicator,
    Pair,
    check_threshold,
    exact_signatures,
    make_deduplicator,
    open_signatures,
)
from megalm.data.builder.workspace import refuse_overwriting, tokenizer_files, working_in
from megalm.data.indexed.dataset import IndexedDataset, bin_path
from megalm.data.indexed.metadata import (
    AWAITS_MERGE,
    KEPT_NAMES,
    DatasetMetadata,
    DocumentSources,
    check_trained,
    dataset_paths,
    finished_report,
    overlaps_path,
    read_sidecar,
    recorded_paths,
    versions,
)
from megalm.data.indexed.token_counts import Tell, no_tell
from megalm.data.readers.input_files import KEPT_MESSAGES, WORK_SUFFIX
from megalm.data.readers.losses import Losses
from megalm.errors import DataError

logger = logging.getLogger(__name__)
SUMMED = ("empty_documents", "skipped", "inexact_documents", "text_bytes")
COPIED_TOKENS = 1 << 22  # per batch, with at most COPIED_DOCUMENTS documents
COPIED_DOCUMENTS = 1 << 14


class Input(NamedTuple):
    """A dataset to merge, and its PREFIX.json; {} if another tool built it."""

    dataset: IndexedDataset
    sidecar: dict[str, Any]

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.sidecar.get("tokenizer", {})

    def files(self) -> Iterator[Path]:
        """Yield the dataset's files, and the recorded files that it was built from."""
        yield from dataset_paths(self.dataset.prefix)
        yield from map(Path, recorded_paths(self.sidecar))
        if spec := self.tokenizer.get("spec"):  # relative to the dataset's folder
            yield from tokenizer_files(Path(self.dataset.prefix).parent / spec)


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

    The tokens are of the widest type of the inputs. If all inputs have a PREFIX.json, their counts are summed;
    otherwise unknown counts stay empty, and `options["complete"]` is false. If the merge already exists, nothing is
    written; with `overwrite` it is read completely to verify it.

    Args:
        dedup: "exact" removes documents with the same tokens as an earlier one, of this dataset or another; "minhash"
            removes near copies, by the signatures that builds with "minhash" keep. Their number is in `removed`, and
            the text bytes are unknown then. Shards built with "minhash" keep their near copies until such a merge.
        minhash_threshold: as in `BuildOptions`; by default the threshold of the builds.
        progress: called with a progress line after each dataset.
        tell: called with the number of tokens just read.

    Raises:
        ConfigError: the output would replace a file of an input, or the text or the tokenizer that it was built from.
        DataError: inputs of different tokenizers, or of different dtypes without a known tokenizer; damaged inputs; an
            existing output that is not this merge; shards whose near copies would stay; inputs without signatures, or
            with different thresholds, when signatures are needed.
    """
    if len(prefixes) < 2:
        raise DataError("merging needs two or more datasets; give their prefixes")
    inputs = [Input(IndexedDataset(prefix), read_sidecar(prefix) or {}) for prefix in prefixes]
    _check_marked(inputs)
    work = Path(f"{output_prefix}{WORK_SUFFIX}")
    refuse_overwriting([output_prefix], work, (path for given in inputs for path in given.files()))
    report = _merged_report(inputs, output_prefix, _dedup_options(inputs, dedup, minhash_threshold))
    if report.options["complete"]:
        finished = finished_report(output_prefix, report.options, report.tokenizer, overwrite)
        if finished is not None:
            return finished
    with working_in(work, report.options, [str(output_prefix)], overwrite, resume=False):
        try:
            _merge(inputs, report, output_prefix, work, progress or (lambda line: None), tell)
        finally:
            shutil.rmtree(work, ignore_errors=True)  # NFS keeps files that are still mapped
    return report


def _check_marked(inputs: Sequence[Input]) -> None:
    """Raises DataError if only some of the datasets tell which of their tokens are trained."""
    for dataset, _ in inputs:
        check_trained(dataset)
    marked = [dataset.prefix for dataset, _ in inputs if dataset.trained is not None]
    others = [dataset.prefix for dataset, _ in inputs if dataset.trained is None]
    if marked and others:
        raise DataError(
            f"{marked[0]}: is of conversations and tells which tokens are trained, {others[0]} does not; train on both "
            "with a list in data.train, which needs no merge"
        )


def _dedup_options(inputs: Sequence[Input], dedup: Dedup, threshold: float | None) -> dict[str, Any]:
    """Return the deduplication options as recorded in PREFIX.json.

    Raises:
        DataError: shards whose near copies would stay, or datasets with different thresholds.
    """
    if dedup != "minhash":
        for dataset, sidecar in inputs:
            if sidecar.get("minhash", {}).get(AWAITS_MERGE):
                raise DataError(
                    f"{dataset.prefix}: is a shard built with --dedup minhash, and still has its near copies; merge "
                    "it with --dedup minhash"
                )
        return {"dedup": dedup} if dedup != "none" else {}
    known = {sidecar["options"]["minhash_threshold"] for _, sidecar in inputs if sidecar.get("minhash")}
    if threshold is None and len(known) > 1:
        raise DataError(
            f"{inputs[0].dataset.prefix} and others were built with different thresholds, "
            f"{', '.join(map(str, sorted(known)))}; choose one (--minhash-threshold 0.8)"
        )
    # Without a known threshold there are no signatures either, which is refused before anything is compared.
    chosen = next(iter(known), 1.0) if threshold is None else threshold
    return {"dedup": dedup, "minhash_threshold": check_threshold(chosen)}


def _merged_report(
    inputs: Sequence[Input], output_prefix: str | Path, dedup_options: dict[str, Any]
) -> DatasetMetadata:
    """Return the report for PREFIX.json before copying: sums over the inputs; facts unknown for other tools stay empty.

    Raises:
        DataError: inputs with different tokenizers.
    """
    recorded = [given for given in inputs if given.tokenizer]
    for dataset, sidecar in recorded:
        ours, first = sidecar["tokenizer"], recorded[0].tokenizer
        for fact, label in (("fingerprint", "tokenizer"), ("eod_id", "end-of-document token of")):
            if ours.get(fact) != first.get(fact):
                raise DataError(
                    f"{dataset.prefix}: was built with {label} {ours.get('name')}, {recorded[0].dataset.prefix} with "
                    f"another, {first.get('name')}; build one of them again"
                )
        if ours.get("bos_id") != first.get("bos_id"):
            raise DataError(
                f"{dataset.prefix}: has documents that begin with {ours.get('bos_token') or 'no token of their own'}, "
                f"{recorded[0].dataset.prefix} with {first.get('bos_token') or 'none'}; build one of them again "
                "(--bos-token)"
            )
    sidecars = [sidecar for _, sidecar in inputs if sidecar]
    complete = len(sidecars) == len(inputs) and all(sidecar["options"].get("complete", True) for sidecar in sidecars)
    report = DatasetMetadata(
        prefix=Path(output_prefix).name,
        tokenizer=recorded[0].tokenizer if recorded else {},
        options={"merged": [dataset.prefix for dataset, _ in inputs], "complete": complete, **dedup_options},
        inputs=[entry for sidecar in sidecars for entry in sidecar["inputs"]],
        dtype=_common_dtype(inputs),
        versions=versions(),
    )
    if not complete:
        return report
    report.options["hashes"] = [sidecar["bin_sha256"] for sidecar in sidecars]
    if recorded_bits := [sidecar["trained"]["sha256"] for sidecar in sidecars if sidecar.get("trained")]:
        report.options["trained_hashes"] = recorded_bits
    if reads := [sidecar["options"]["read"] for sidecar in sidecars if "read" in sidecar["options"]]:
        report.options["read"] = reads[0]
    losses = Losses()
    for sidecar in sidecars:
        losses.add(Losses.from_report(sidecar.get("losses", {})))
    report.losses = asdict(losses)
    for key in SUMMED:
        setattr(report, key, sum(sidecar.get(key, 0) for sidecar in sidecars))
    for sidecar in sidecars:
        for name, count in sidecar.get("removed", {}).items():
            report.removed[name] = report.removed.get(name, 0) + count
    for key, most in (("near_copies", KEPT_PAIRS), ("inexact_names", KEPT_NAMES), ("messages", KEPT_MESSAGES)):
        setattr(report, key, [entry for sidecar in sidecars for entry in sidecar.get(key, [])][:most])
    report.overlap = _merged_overlap(inputs)
    return report


def _merged_overlap(inputs: Sequence[Input]) -> dict[str, Any]:
    """Return `overlap` of all inputs together; warns if evaluation sets are kept out of some of them only."""
    overlaps = [sidecar.get("overlap", {}) for _, sidecar in inputs]
    merged = merge_overlaps(overlaps)
    if any(overlaps) and not merged:
        without = next((given for given, overlap in zip(inputs, overlaps, strict=True) if not overlap), None)
        how = f"{without.dataset.prefix} was built without" if without else "they were built with different"
        logger.warning("%s --exclude-overlap: the merged dataset may overlap with the evaluation sets", how)
    if merged:
        merged["listed"] = len(_listed_overlaps(inputs))
    return merged


def _listed_overlaps(inputs: Sequence[Input]) -> list[bytes]:
    """Return the first lines of all PREFIX.overlaps, in order."""
    lines: list[bytes] = []
    for dataset, _ in inputs:
        path = overlaps_path(dataset.prefix)
        if path.exists():
            lines += path.read_bytes().splitlines(keepends=True)[: LISTED - len(lines)]
        else:
            logger.warning("%s: does not exist, and is not listed in the merged dataset", path)
    return lines


def _common_dtype(inputs: Sequence[Input]) -> str:
    """Return the type that holds the tokens of all inputs.

    Raises:
        DataError: the types differ, and no input says which tokenizer it is of: most likely there are two.
    """
    first = inputs[0].dataset
    for dataset, _ in inputs:
        if dataset.dtype != first.dtype and not any(given.tokenizer for given in inputs):
            raise DataError(
                f"{dataset.prefix}: holds {dataset.dtype}, {first.prefix} {first.dtype}; only datasets of one "
                "tokenizer can be merged, and neither has a PREFIX.json that names its own; build one of them again"
            )
    return str(np.result_type(*(dataset.dtype for dataset, _ in inputs)).name)


def _merge(
    inputs: Sequence[Input],
    report: DatasetMetadata,
    output_prefix: str | Path,
    work: Path,
    say: Callable[[str], None],
    tell: Tell,
) -> None:
    """Write all files of the merged dataset, and fill the report."""
    dedup, dtype = report.options.get("dedup", "none"), np.dtype(report.dtype)
    sources = _sources(inputs) if report.options["complete"] else None
    seen = make_deduplicator(dedup, work / "seen", report.options.get("minhash_threshold", 1.0))
    vocab_size, signed = report.tokenizer.get("vocab_size"), dedup == "minhash"
    marked = inputs[0].dataset.trained is not None
    with closing(
        DatasetWriter(report, output_prefix, dtype, vocab_size, sources is not None, signed, marked)
    ) as writer:
        for number, given in enumerate(inputs):
            copies = _copy(given, seen, writer, sources[number] if sources else None, tell)
            if dedup != "none":
                report.removed[dedup] = report.removed.get(dedup, 0) + copies
            if copies:
                report.text_bytes = 0  # of the kept documents: unknown
            left_out = f", {copies:,} copies removed" if dedup != "none" else ""
            counts = f"{given.dataset.document_count:,} documents, {len(given.dataset.tokens):,} tokens"
            say(f"{given.dataset.prefix}: {counts}{left_out}")
        _note_pairs(report, seen.pairs, [dataset for dataset, _ in inputs])
        writer.listing = _listed_overlaps(inputs) if report.overlap else []
        writer.finish()


def _copy(
    given: Input, seen: Deduplicator, writer: DatasetWriter, sources: tuple[npt.NDArray[Any], int] | None, tell: Tell
) -> int:
    """Copy the new documents piece by piece; return the number of removed copies.

    Raises:
        DataError: tokens or signatures are missing, or do not match their recorded hashes.
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
        tokens = tokens.astype(writer.report.dtype, copy=False)
        tell(len(tokens))
        if dedup == "exact":
            new = seen.add(exact_signatures(np.split(tokens, bounds[first + 1 : end] - bounds[first])))
        else:
            new = seen.add(np.empty((end - first, 0)) if signed is None else signed[first:end])
        sequences = np.diff(dataset.document_index[first : end + 1])  # of each document
        lengths = dataset.sequence_lengths[dataset.document_index[first] : dataset.document_index[end]]
        rows = None
        if sources is not None:
            rows = np.array(sources[0][first:end])
            rows["file"] += sources[1]
        signatures = None if signed is None else signed[first:end]
        trained = None if dataset.trained is None else dataset.trained.at(range(bounds[first], bounds[end]))
        writer.add(tokens, lengths, new, sequences, rows, signatures, trained)
        copies += int((~new).sum())
        first = end
    if sidecar.get("bin_sha256", digest.hexdigest()) != digest.hexdigest():
        raise DataError(f"{bin_path(dataset.prefix)}: does not match the hash in its .json; copy or build it again")
    check_trained(dataset, thorough=True)
    return copies


def _note_pairs(report: DatasetMetadata, pairs: Sequence[Pair], datasets: Sequence[IndexedDataset]) -> None:
    """Append the removed near copies to those that the builds recorded."""
    ends = list(accumulate(dataset.document_count for dataset in datasets))

    def name(number: int) -> str:
        place = bisect_right(ends, number)
        dataset = datasets[place]
        document = number - ends[place] + dataset.document_count
        source = DocumentSources(dataset.prefix, dataset.document_count)[document]
        return source.name if source else f"{dataset.prefix} document {document}"

    report.near_copies += [pair.named(name) for pair in pairs[: KEPT_PAIRS - len(report.near_copies)]]


def _sources(inputs: Sequence[Input]) -> list[tuple[npt.NDArray[Any], int]] | None:
    """Return each dataset's PREFIX.sources rows and the number of files of the datasets before it.

    None unless all datasets have PREFIX.sources and count lines the same way.
    """
    readings = {str(sidecar["options"].get("read", {}).get("documents")) for _, sidecar in inputs}
    tables = [DocumentSources(dataset.prefix, dataset.document_count) for dataset, _ in inputs]
    if len(readings) > 1 or not all(table.available for table in tables):
        return None
    files = accumulate((len(sidecar["inputs"]) for _, sidecar in inputs), initial=0)
    return [(table.rows, before) for table, before in zip(tables, files, strict=False)]
