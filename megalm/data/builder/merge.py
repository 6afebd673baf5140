"""Several datasets into one, copied without tokenizing again; of copies only the first, if that is wanted."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.builder.dedup import Dedup, Deduplicator, exact_signatures, make_deduplicator
from megalm.data.builder.disk_hash_table import Bools
from megalm.data.builder.minhash_dedup import KEPT_PAIRS, Pair, check_threshold
from megalm.data.builder.minhash_file import SignatureWriter, open_signatures
from megalm.data.builder.workspace import build_lock, clear_temporaries
from megalm.data.indexed.dataset import IndexedDataset, bin_path, idx_path, sidecar_path
from megalm.data.indexed.document_sources import SOURCE, DocumentSources, sources_path
from megalm.data.indexed.metadata import (
    AWAITS_MERGE,
    KEPT_NAMES,
    DatasetMetadata,
    check_output,
    dataset_paths,
    is_whole,
    read_metadata,
    read_sidecar,
    signatures_path,
    versions,
)
from megalm.data.indexed.token_counts import Tell, TokenCounter, no_tell
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.readers.input_files import KEPT_MESSAGES, WORK_SUFFIX, sha256_of
from megalm.errors import DataError
from megalm.utils.atomic_files import read_json, temporary_name, write_json, writing_to

# What PREFIX.json says of a merged dataset: sums of its parts, and what cannot be known of parts of other tools.

SUMMED = ("empty_documents", "skipped", "inexact_documents", "text_bytes")


def asked_of(
    prefixes: Sequence[str | Path], sidecars: Sequence[dict[str, Any] | None], dedup: Dedup, threshold: float | None
) -> dict[str, Any]:
    """Which copies are left out, as PREFIX.json has it.

    Raises:
        DataError: shards whose near copies would stay, or datasets of several thresholds.
    """
    if dedup != "minhash":
        for prefix, sidecar in zip(prefixes, sidecars, strict=True):
            if sidecar and sidecar.get("minhash", {}).get(AWAITS_MERGE):
                raise DataError(
                    f"{prefix}: is a shard built with --dedup minhash, and still has its near copies; merge with "
                    "--dedup minhash"
                )
        return {"dedup": dedup} if dedup != "none" else {}
    known = {sidecar["options"]["minhash_threshold"] for sidecar in sidecars if sidecar and sidecar.get("minhash")}
    if threshold is None and len(known) > 1:
        raise DataError(
            f"{prefixes[0]} and others were built with several thresholds, {', '.join(map(str, sorted(known)))}; "
            "state one (--minhash-threshold 0.8)"
        )
    # Where none is known there are no signatures either, which is refused before anything is compared.
    stated = next(iter(known), 1.0) if threshold is None else threshold
    return {"dedup": dedup, "minhash_threshold": check_threshold(stated)}


def merged_report(
    prefixes: Sequence[str | Path],
    sidecars: Sequence[dict[str, Any] | None],
    output_prefix: str | Path,
    datasets: Sequence[IndexedDataset],
    asked: dict[str, Any],
) -> DatasetMetadata:
    """What PREFIX.json will say, but for what copying finds out.

    Raises:
        DataError: inputs of different tokenizers.
    """
    known = [(prefix, sidecar) for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar is not None]
    stated = [(prefix, sidecar) for prefix, sidecar in known if sidecar["tokenizer"]]
    for prefix, sidecar in stated:
        first_prefix, first = stated[0]
        for fact, what in (("fingerprint", "tokenizer"), ("eod_id", "end of documents")):
            if sidecar["tokenizer"].get(fact) != first["tokenizer"].get(fact):
                raise DataError(
                    f"{prefix}: was built with {what} {sidecar['tokenizer'].get('name')}, {first_prefix} with another, "
                    f"{first['tokenizer'].get('name')}; build one of them again"
                )
    complete = len(known) == len(prefixes) and all(sidecar["options"].get("complete", True) for _, sidecar in known)
    report = DatasetMetadata(
        prefix=Path(output_prefix).name,
        tokenizer=stated[0][1]["tokenizer"] if stated else {},
        options={"merged": [str(prefix) for prefix in prefixes], "complete": complete, **asked},
        inputs=[entry for _, sidecar in known for entry in sidecar["inputs"]],
        documents=sum(dataset.document_count for dataset in datasets),
        dtype=datasets[0].dtype.name,
        versions=versions(),
    )
    if not complete:
        return report
    report.options["hashes"] = [sidecar["bin_sha256"] for _, sidecar in known]
    if reads := [sidecar["options"]["read"] for _, sidecar in known if "read" in sidecar["options"]]:
        report.options["read"] = reads[0]
    for key in SUMMED:
        setattr(report, key, sum(sidecar.get(key, 0) for _, sidecar in known))
    for _, sidecar in known:
        for name, count in sidecar.get("removed", {}).items():
            report.removed[name] = report.removed.get(name, 0) + count
    report.near_copies = [pair for _, sidecar in known for pair in sidecar.get("near_copies", [])][:KEPT_PAIRS]
    report.inexact_names = [name for _, sidecar in known for name in sidecar["inexact_names"]][:KEPT_NAMES]
    report.messages = [text for _, sidecar in known for text in sidecar.get("messages", [])][:KEPT_MESSAGES]
    return report


def finished_report(output_prefix: str | Path, report: DatasetMetadata, thorough: bool) -> DatasetMetadata | None:
    """The report of the same merge, if it is there (see `is_whole`)."""
    known = read_metadata(output_prefix) if report.options["complete"] else None
    if known is None:
        return None
    same = known.options == report.options and known.tokenizer == report.tokenizer
    if report.options.get("dedup") == "minhash" and not signatures_path(output_prefix).exists():
        return None
    return known if same and is_whole(output_prefix, known, thorough) else None


def note_pairs(report: DatasetMetadata, pairs: Sequence[Pair], datasets: Sequence[IndexedDataset]) -> None:
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


def count_removed(report: DatasetMetadata, copies: int, dedup: Dedup) -> None:
    """Documents that were left out of one more dataset."""
    if dedup == "none":
        return
    report.documents -= copies
    report.removed[dedup] = report.removed.get(dedup, 0) + copies
    if copies:
        report.text_bytes = 0  # of those that stay: not known


COPIED_ROWS = 1 << 18
COPIED_TOKENS = 1 << 22
COPIED_SIGNATURES = 1 << 14
# Tokens of several documents [sum n], the places where all but the first begin, and which documents of the dataset
# they are, from and to -> signatures [documents, ...].
Sign = Callable[[npt.NDArray[Any], npt.NDArray[Any], int, int], npt.NDArray[Any]]


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
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sidecars = [read_sidecar(prefix) for prefix in prefixes]
    asked = asked_of(prefixes, sidecars, dedup, minhash_threshold)
    report = merged_report(prefixes, sidecars, output_prefix, datasets, asked)
    with build_lock(Path(f"{output_prefix}{WORK_SUFFIX}")):
        finished = finished_report(output_prefix, report, thorough=overwrite)
        if finished is not None:
            return finished
        with _working_in(output_prefix, report, overwrite) as work:
            clear_temporaries([str(output_prefix)])
            _merge(datasets, sidecars, report, output_prefix, work, progress or (lambda line: None), tell)
    return report


def _merge(
    datasets: Sequence[IndexedDataset],
    sidecars: Sequence[dict[str, Any] | None],
    report: DatasetMetadata,
    output_prefix: str | Path,
    work: Path,
    say: Callable[[str], None],
    tell: Tell,
) -> None:
    """Write all files of the dataset, and fill the report."""
    for dataset in datasets:
        dataset.verify()
    counter = TokenCounter(report.tokenizer.get("vocab_size"), output_prefix)
    masks = _copy_all(datasets, sidecars, report, counter, output_prefix, work, say, tell)
    try:
        if report.options.get("dedup") == "minhash":
            report.minhash = _merge_signatures(datasets, masks, output_prefix)
        if report.options["complete"]:
            _merge_sources(datasets, sidecars, masks, output_prefix)
        summary = counter.summary()
        report.tokens, report.unigram_entropy = summary.tokens, summary.unigram_entropy
        report.bin_sha256, report.idx_sha256 = sha256_of(bin_path(output_prefix)), sha256_of(idx_path(output_prefix))
        write_json(sidecar_path(output_prefix), asdict(report))
    except BaseException:
        _unlink_all(output_prefix)  # tokens without PREFIX.json would be in the way of the next try
        raise


def _unlink_all(prefix: str | Path) -> None:
    for path in dataset_paths(prefix):
        path.unlink(missing_ok=True)


def _copy_all(
    datasets: Sequence[IndexedDataset],
    sidecars: Sequence[dict[str, Any] | None],
    report: DatasetMetadata,
    counter: TokenCounter,
    output_prefix: str | Path,
    work: Path,
    say: Callable[[str], None],
    tell: Tell,
) -> list[npt.NDArray[np.uint8]]:
    """Write .bin and .idx; which documents of each dataset stay, as bits."""
    masks, dedup = [], report.options.get("dedup", "none")
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        seen = make_deduplicator(dedup, work / "seen", report.options.get("minhash_threshold", 1.0))
        for dataset, sidecar in zip(datasets, sidecars, strict=True):
            writer.check_dtype(dataset)
            read = TokenCounter(report.tokenizer.get("vocab_size"), bin_path(dataset.prefix), tell)
            if dedup == "none":
                writer.append_dataset(dataset, watch=read.add)
                counter.absorb(read)
                kept: Bools = np.ones(dataset.document_count, dtype=np.bool_)
            else:
                kept = _copy_new(dataset, _sign(dataset, sidecar, dedup), writer, seen, read, counter)
            recorded = sidecar["bin_sha256"] if sidecar else None
            if recorded is not None and read.summary().sha256 != recorded:
                raise DataError(f"{bin_path(dataset.prefix)}: is not what its .json recorded; copy or build it again")
            masks.append(np.packbits(kept))
            copies = len(kept) - int(kept.sum())
            count_removed(report, copies, dedup)
            left_out = f", {copies:,} copies left out" if dedup != "none" else ""
            say(f"{dataset.prefix}: {dataset.document_count:,} documents, {len(dataset.tokens):,} tokens{left_out}")
        note_pairs(report, seen.pairs, datasets)
        for path_of in (sidecar_path, sources_path, signatures_path):  # old ones would describe the new files
            path_of(output_prefix).unlink(missing_ok=True)
    return masks


@contextmanager
def _working_in(output_prefix: str | Path, report: DatasetMetadata, overwrite: bool) -> Iterator[Path]:
    """A folder for tables beside the dataset. One that a killed merge of just this left says whose the files are that
    have their names already; it is emptied, we hold the lock."""
    work = Path(output_prefix).with_name(f".{Path(output_prefix).name}.merging")
    stated = work / "options.json"
    check_output(output_prefix, overwrite or (stated.exists() and read_json(stated) == report.options))
    with writing_to(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
    try:
        write_json(stated, report.options)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # NFS keeps a file that is still mapped


def _sign(dataset: IndexedDataset, sidecar: dict[str, Any] | None, dedup: Dedup) -> Sign:
    """What documents are compared by."""
    if dedup == "exact":
        return lambda tokens, starts, first, end: exact_signatures(np.split(tokens, starts))
    rows = open_signatures(dataset.prefix, (sidecar or {}).get("minhash", {}), dataset.document_count)
    return lambda tokens, starts, first, end: rows[first:end]


def _copy_new(
    dataset: IndexedDataset,
    sign: Sign,
    writer: IndexedDatasetWriter,
    seen: Deduplicator,
    read: TokenCounter,
    written: TokenCounter,
) -> Bools:
    """Copy the documents that nobody has seen, piece by piece; [documents] which they are."""
    starts = np.append(dataset.sequence_pointers // dataset.dtype.itemsize, len(dataset.tokens))
    bounds = starts[dataset.document_index]  # in tokens, [documents + 1]
    kept = np.zeros(dataset.document_count, dtype=np.bool_)
    first = 0
    while first < len(kept):
        end = max(first + 1, int(np.searchsorted(bounds, bounds[first] + COPIED_TOKENS, side="right")) - 1)
        tokens = dataset.tokens[bounds[first] : bounds[end]]
        read.add(tokens)
        new = seen.add(sign(tokens, bounds[first + 1 : end] - bounds[first], first, end))
        sequences = np.diff(dataset.document_index[first : end + 1])  # of each document
        lengths = dataset.sequence_lengths[dataset.document_index[first] : dataset.document_index[end]]
        stay = np.repeat(new, sequences)
        chosen = tokens if new.all() else tokens[np.repeat(stay, lengths)]
        written.add(chosen)
        writer.append_sequences(chosen, lengths[stay], np.cumsum(sequences[new]))
        kept[first:end], first = new, end
    return kept


def _merge_signatures(
    datasets: Sequence[IndexedDataset],
    masks: Sequence[npt.NDArray[np.uint8]],
    output_prefix: str | Path,
) -> dict[str, Any]:
    """Write those of the documents that stayed; what PREFIX.json says of them."""
    writer = SignatureWriter(output_prefix)
    try:
        for dataset, mask in zip(datasets, masks, strict=True):
            kept = np.unpackbits(mask, count=dataset.document_count).astype(np.bool_)
            rows = np.memmap(signatures_path(dataset.prefix), dtype="<u4", mode="r").reshape(len(kept), -1)
            for start in range(0, len(rows), COPIED_SIGNATURES):
                writer.add(rows[start : start + COPIED_SIGNATURES][kept[start : start + COPIED_SIGNATURES]])
        return writer.close()
    except BaseException:
        writer.abort()
        raise


def _merge_sources(
    datasets: Sequence[IndexedDataset],
    sidecars: Sequence[dict[str, Any] | None],
    masks: Sequence[npt.NDArray[np.uint8]],
    output_prefix: str | Path,
) -> None:
    """Where each document came from, if every input says so and all count lines alike."""
    readings = {str(sidecar and sidecar["options"].get("read", {}).get("documents")) for sidecar in sidecars}
    tables = [DocumentSources(dataset.prefix, dataset.document_count) for dataset in datasets]
    if len(readings) > 1 or not all(table.available for table in tables):
        return
    path = sources_path(output_prefix)
    temporary, files = temporary_name(path), 0
    with writing_to(path):
        try:
            with temporary.open("wb") as merged:
                for dataset, sidecar, mask in zip(datasets, sidecars, masks, strict=True):
                    rows = np.memmap(sources_path(dataset.prefix), dtype=SOURCE, mode="r")
                    kept = np.unpackbits(mask, count=len(rows)).astype(np.bool_)
                    for start in range(0, len(rows), COPIED_ROWS):
                        piece = np.array(rows[start : start + COPIED_ROWS])[kept[start : start + COPIED_ROWS]]
                        piece["file"] += files
                        merged.write(piece.tobytes())
                    files += len(sidecar["inputs"]) if sidecar else 0
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
