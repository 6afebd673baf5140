"""Several datasets into one, copied without tokenizing again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.files import read_json, write_json, writing_to
from megalm.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, sidecar_path
from megalm.data.inputs import KEPT_MESSAGES, sha256_of
from megalm.data.report import KEPT_NAMES, BuildReport, check_output, versions
from megalm.data.sources import SOURCE, Sources, sources_path
from megalm.data.summary import TokenCounter
from megalm.durable import temporary_name
from megalm.errors import DataError

SUMMED = ("empty_documents", "skipped", "inexact_documents", "text_bytes")
COPIED_ROWS = 1 << 18


def merge_datasets(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BuildReport:
    """Write all documents of `prefixes`, in that order, to one dataset.

    Where all inputs have their PREFIX.json, its counts are added up; where one has none, what cannot be known
    is left at nothing, and `options["complete"]` is false. Called again when it is done, it writes nothing.

    Raises:
        DataError: inputs of different dtypes or tokenizers, damaged inputs, an input that is also the output, or an
            output that exists and is not the merge of just these.
    """
    if len(prefixes) < 2:
        raise DataError("merging takes two datasets or more; name their prefixes")
    if Path(output_prefix).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise DataError(f"{output_prefix}: is an input and the output; choose another output prefix")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sidecars = [_sidecar(prefix) for prefix in prefixes]
    report = _report(prefixes, sidecars, output_prefix, datasets)
    finished = _finished(output_prefix, report)
    if finished is not None:
        return finished
    check_output(output_prefix, overwrite)
    counter = TokenCounter(report.tokenizer.get("vocab_size"), output_prefix)
    for dataset in datasets:
        dataset.verify()
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset, sidecar in zip(datasets, sidecars, strict=True):
            copied = TokenCounter(report.tokenizer.get("vocab_size"), bin_path(dataset.prefix))
            writer.append_dataset(dataset, watch=copied.add)
            counter.absorb(copied)
            recorded = sidecar["bin_sha256"] if sidecar else None
            if recorded is not None and copied.summary().sha256 != recorded:
                raise DataError(f"{bin_path(dataset.prefix)}: is not what its .json recorded; copy or build it again")
            if progress is not None:
                progress(f"{dataset.prefix}: {dataset.document_count:,} documents, {len(dataset.tokens):,} tokens")
        sidecar_path(output_prefix).unlink(missing_ok=True)
        sources_path(output_prefix).unlink(missing_ok=True)
    if report.options["complete"]:
        _merge_sources(datasets, sidecars, output_prefix)
    summary = counter.summary()
    report.tokens, report.unigram_entropy = summary.tokens, summary.unigram_entropy
    report.bin_sha256, report.idx_sha256 = sha256_of(bin_path(output_prefix)), sha256_of(idx_path(output_prefix))
    write_json(sidecar_path(output_prefix), asdict(report))
    return report


def _sidecar(prefix: str | Path) -> dict[str, Any] | None:
    path = sidecar_path(prefix)
    return read_json(path) if path.exists() else None


def _finished(output_prefix: str | Path, report: BuildReport) -> BuildReport | None:
    """The report of the same merge, if it is there."""
    if not report.options["complete"] or not sidecar_path(output_prefix).exists():
        return None
    try:
        known = BuildReport(**read_json(sidecar_path(output_prefix)))
    except TypeError:
        return None
    same = known.options == report.options and known.tokenizer == report.tokenizer
    return known if same and len(IndexedDataset(output_prefix).tokens) == known.tokens else None


def _report(
    prefixes: Sequence[str | Path],
    sidecars: Sequence[dict[str, Any] | None],
    output_prefix: str | Path,
    datasets: Sequence[IndexedDataset],
) -> BuildReport:
    known = [(prefix, sidecar) for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar is not None]
    for prefix, sidecar in known:
        first_prefix, first = known[0]
        for fact, what in (("fingerprint", "tokenizer"), ("eod_id", "end of documents")):
            if sidecar["tokenizer"].get(fact) != first["tokenizer"].get(fact):
                raise DataError(
                    f"{prefix}: was built with {what} {sidecar['tokenizer'].get('name')}, {first_prefix} with another, "
                    f"{first['tokenizer'].get('name')}; build one of them again"
                )
    complete = len(known) == len(prefixes)
    report = BuildReport(
        prefix=Path(output_prefix).name,
        tokenizer=known[0][1]["tokenizer"] if known else {},
        options={"merged": [str(prefix) for prefix in prefixes], "complete": complete},
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
    report.inexact_names = [name for _, sidecar in known for name in sidecar["inexact_names"]][:KEPT_NAMES]
    report.messages = [text for _, sidecar in known for text in sidecar.get("messages", [])][:KEPT_MESSAGES]
    return report


def _merge_sources(
    datasets: Sequence[IndexedDataset], sidecars: Sequence[dict[str, Any] | None], output_prefix: str | Path
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
                for dataset, sidecar in zip(datasets, sidecars, strict=True):
                    rows = np.memmap(sources_path(dataset.prefix), dtype=SOURCE, mode="r")
                    for start in range(0, len(rows), COPIED_ROWS):
                        piece = np.array(rows[start : start + COPIED_ROWS])
                        piece["file"] += files
                        merged.write(piece.tobytes())
                    files += len(sidecar["inputs"]) if sidecar else 0
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
