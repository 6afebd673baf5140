"""Several datasets into one, copied without tokenizing again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalm.data.files import read_json, write_json
from megalm.data.indexed import IndexedDataset, IndexedDatasetWriter, sidecar_path
from megalm.data.report import KEPT_NAMES, BuildReport, check_output, versions
from megalm.data.summary import summarise
from megalm.errors import DataError

SUMMED = ("empty_documents", "inexact_documents", "text_bytes")


def merge_datasets(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BuildReport:
    """Write all documents of `prefixes`, in that order, to one dataset.

    Where all inputs have their PREFIX.json, its counts are added up; where one has none, what cannot be known
    is left at nothing, and `options["complete"]` is false.

    Raises:
        DataError: inputs of different dtypes or tokenizers, an input that is also the output, or an output
            that exists.
    """
    if len(prefixes) < 2:
        raise DataError("merging takes two datasets or more; name their prefixes")
    if Path(output_prefix).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise DataError(f"{output_prefix}: is an input and the output; choose another output prefix")
    check_output(output_prefix, overwrite)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sidecars = [read_json(path) if (path := sidecar_path(prefix)).exists() else None for prefix in prefixes]
    report = _report(prefixes, sidecars, output_prefix, datasets)
    vocab_size = report.tokenizer.get("vocab_size")
    for dataset, sidecar in zip(datasets, sidecars, strict=True):
        dataset.verify()
        if sidecar is None:  # nothing says which tokenizer made it: its tokens must at least be possible
            summarise(dataset, vocab_size)
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.append_dataset(dataset)
            if progress is not None:
                progress(f"{dataset.prefix}: {dataset.document_count:,} documents, {len(dataset.tokens):,} tokens")
        sidecar_path(output_prefix).unlink(missing_ok=True)
    summary = summarise(IndexedDataset(output_prefix), vocab_size)
    report.tokens, report.unigram_entropy, report.bin_sha256 = summary.tokens, summary.unigram_entropy, summary.sha256
    write_json(sidecar_path(output_prefix), asdict(report))
    return report


def _report(
    prefixes: Sequence[str | Path],
    sidecars: Sequence[dict[str, Any] | None],
    output_prefix: str | Path,
    datasets: Sequence[IndexedDataset],
) -> BuildReport:
    known = [(prefix, sidecar) for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar is not None]
    for prefix, sidecar in known:
        first_prefix, first = known[0]
        if sidecar["tokenizer"]["fingerprint"] != first["tokenizer"]["fingerprint"]:
            raise DataError(
                f"{prefix}: was built with tokenizer {sidecar['tokenizer']['name']}, {first_prefix} with another, "
                f"{first['tokenizer']['name']}; build one of them again"
            )
    complete = len(known) == len(prefixes)
    report = BuildReport(
        prefix=Path(output_prefix).name,
        tokenizer=known[0][1]["tokenizer"] if known else {},
        options={"merged": True, "complete": complete},
        inputs=[str(prefix) for prefix in prefixes],
        documents=sum(dataset.document_count for dataset in datasets),
        dtype=datasets[0].dtype.name,
        versions=versions(),
    )
    if complete:
        for key in SUMMED:
            setattr(report, key, sum(sidecar[key] for _, sidecar in known))
        names = [name for _, sidecar in known for name in sidecar["inexact_names"]]
        report.inexact_names = names[:KEPT_NAMES]
    return report
