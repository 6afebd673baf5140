"""Several datasets into one, copied without tokenizing again; of copies only the first, if that is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.dedup import Dedup, Seen, exact_signatures, seen_of
from megalm.data.file_table import Bools
from megalm.data.files import read_json, write_json, writing_to
from megalm.data.indexed import IndexedDataset, bin_path, idx_path, sidecar_path
from megalm.data.indexed_writer import IndexedDatasetWriter
from megalm.data.inputs import WORK_SUFFIX, sha256_of
from megalm.data.merge_report import asked_of, count_removed, finished_report, merged_report, note_pairs
from megalm.data.report import BuildReport, check_output, dataset_paths, sidecar_of
from megalm.data.signatures import SignatureWriter, open_signatures, signatures_path
from megalm.data.sources import SOURCE, Sources, sources_path
from megalm.data.summary import Tell, TokenCounter, no_tell
from megalm.data.workspace import alone_at, clear_temporaries
from megalm.durable import temporary_name
from megalm.errors import DataError

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
) -> BuildReport:
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
    sidecars = [sidecar_of(prefix) for prefix in prefixes]
    asked = asked_of(prefixes, sidecars, dedup, minhash_threshold)
    report = merged_report(prefixes, sidecars, output_prefix, datasets, asked)
    with alone_at(Path(f"{output_prefix}{WORK_SUFFIX}")):
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
    report: BuildReport,
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
    report: BuildReport,
    counter: TokenCounter,
    output_prefix: str | Path,
    work: Path,
    say: Callable[[str], None],
    tell: Tell,
) -> list[npt.NDArray[np.uint8]]:
    """Write .bin and .idx; which documents of each dataset stay, as bits."""
    masks, dedup = [], report.options.get("dedup", "none")
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        seen = seen_of(dedup, work / "seen", report.options.get("minhash_threshold", 1.0))
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
def _working_in(output_prefix: str | Path, report: BuildReport, overwrite: bool) -> Iterator[Path]:
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
    seen: Seen,
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
    tables = [Sources(dataset.prefix, dataset.document_count) for dataset in datasets]
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
