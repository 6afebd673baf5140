"""PREFIX.json: how a dataset was built and what it holds; checks of a build's output; PREFIX.sources beside it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import megalm
from megalm.data.indexed.dataset import IndexedDataset, best_dtype, bin_path, idx_path, sidecar_path
from megalm.data.indexed.trained_tokens import trained_path
from megalm.data.readers.document_reader import record_name
from megalm.data.readers.input_files import InputFile, is_sidecar, sha256_of
from megalm.data.readers.records import ReadOptions
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import read_json

AWAITS_MERGE = "awaits_merge"
# `line` as in records.TextRecord; start and size are bytes of the unpacked file.
SOURCE = np.dtype([("file", "<u4"), ("size", "<u4"), ("line", "<i8"), ("start", "<i8")])


def sources_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.sources")


def signatures_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.minhash")


def overlaps_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.overlaps")


SIDECAR_VERSION = 2
KEPT_NAMES = 20


@dataclass
class DatasetMetadata:
    """How a dataset was built and what it holds; PREFIX.json has the same keys.

    Attributes:
        inputs: path, kind, packing, bytes, mtime_ns and sha256 of each file; or names only.
        listing: for a shard, the hash of the complete input that it is a part of.
        text_bytes: UTF-8 bytes of the documents in the dataset.
        skipped: number of unreadable documents.
        losses: see `readers.losses.Losses`; `max_loss`: the share that was accepted.
        messages: the first unreadable documents and files, with file and line.
        removed: number of removed documents per filter or kind of duplicate.
        near_copies: the first documents that minhash removed, as file and line: the document (`left_out`), the
            earliest kept document that is near (`copy_of`), and the share of equal values (`alike`).
        minhash: how the rows of PREFIX.minhash were made, and their hash; `awaits_merge`: the near copies are still in.
        overlap: of a build with --exclude-overlap, see `decontamination.overlap_report`; PREFIX.overlaps lists
            the first documents that overlap with evaluation sets, a JSON object a line.
        inexact_documents: number of documents that do not decode back exactly; `inexact_names` are the first ones.
        unigram_entropy: nats per token, see `TokenSummary`.
        trained: of conversations, the number of trained tokens, and the hash of PREFIX.trained.
    """

    prefix: str
    tokenizer: dict[str, Any]
    options: dict[str, Any]
    inputs: list[Any]
    listing: str = ""
    documents: int = 0
    empty_documents: int = 0
    skipped: int = 0
    losses: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    near_copies: list[dict[str, Any]] = field(default_factory=list)
    minhash: dict[str, Any] = field(default_factory=dict)
    inexact_documents: int = 0
    inexact_names: list[str] = field(default_factory=list)
    text_bytes: int = 0
    tokens: int = 0
    dtype: str = ""
    unigram_entropy: float = 0.0
    bin_sha256: str = ""
    idx_sha256: str = ""
    trained: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)


def start_report(
    prefix: str | Path, tokenizer: Tokenizer, append_eod: bool, options: dict[str, Any], inputs: list[Any]
) -> DatasetMetadata:
    return DatasetMetadata(
        prefix=Path(prefix).name,
        tokenizer={
            "name": tokenizer.name,
            "spec": _recorded_spec(tokenizer.spec, Path(prefix)),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id if append_eod else None,
            "eod_token": tokenizer.eod_token if append_eod else None,
            "bos_id": tokenizer.bos_id,
            "bos_token": tokenizer.bos_token,
        },
        options=options,
        inputs=inputs,
        dtype=best_dtype(tokenizer.vocab_size).name,
        versions=versions(),
    )


def versions() -> dict[str, Any]:
    return {
        "megalm": megalm.__version__,
        "sidecar": SIDECAR_VERSION,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _recorded_spec(spec: str, prefix: Path) -> str:
    """Record a tokenizer beside the dataset by name, so that the folder can be moved; any other by path."""
    path = Path(spec)
    if not path.exists():  # "bytes"
        return spec
    return path.name if path.resolve().parent == prefix.resolve().parent else str(path.resolve())


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """Read PREFIX.json; None if another toolkit built the dataset, which can have its text under this name.

    Raises:
        DataError: the file is damaged.
    """
    path = sidecar_path(prefix)
    facts = read_json(path) if path.exists() and is_sidecar(path) else None
    return facts if isinstance(facts, dict) and "bin_sha256" in facts else None


def recorded_paths(sidecar: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs of a PREFIX.json."""
    return [entry["path"] if isinstance(entry, dict) else str(entry) for entry in sidecar.get("inputs", ())]


def finished_report(
    prefix: str | Path, options: dict[str, Any], tokenizer: Mapping[str, Any], thorough: bool
) -> DatasetMetadata | None:
    """Return the report of an existing dataset if it was built the same way, by this version, and is complete.

    Args:
        tokenizer: as in `DatasetMetadata`; its fingerprint, eod_id and bos_id are compared.
        thorough: read all files and compare them with the recorded hashes.
    """
    try:
        report = DatasetMetadata(**(read_sidecar(prefix) or {}))
        if len(IndexedDataset(prefix).tokens) != report.tokens:
            return None
    except (DataError, TypeError):
        return None
    same_tokens = all(report.tokenizer.get(fact) == tokenizer.get(fact) for fact in ("fingerprint", "eod_id", "bos_id"))
    if report.options != options or not same_tokens:
        return None
    if options.get("dedup") == "minhash" and not (report.minhash and signatures_path(prefix).exists()):
        return None
    if bool(report.trained) != trained_path(prefix).exists():
        return None
    recorded = {bin_path: report.bin_sha256, idx_path: report.idx_sha256}
    if report.trained:
        recorded[trained_path] = report.trained["sha256"]
    return report if not thorough or all(sha256_of(of(prefix)) == known for of, known in recorded.items()) else None


def check_trained(dataset: IndexedDataset, thorough: bool = False) -> None:
    """Check PREFIX.trained against PREFIX.json.

    Args:
        thorough: read the file and compare it with the recorded hash.

    Raises:
        DataError: it is missing, or damaged, or is there without a word of it in PREFIX.json.
    """
    sidecar = read_sidecar(dataset.prefix)
    if sidecar is not None and bool(sidecar.get("trained")) != (dataset.trained is not None):
        path, name = trained_path(dataset.prefix), sidecar_path(dataset.prefix).name
        said = "is missing, although" if dataset.trained is None else "is not of this dataset:"
        knows = "says which tokens are trained" if dataset.trained is None else "has no trained tokens"
        raise DataError(f"{path}: {said} {name} {knows}; copy all files of the dataset, or build it again")
    recorded = sidecar["trained"]["sha256"] if thorough and sidecar is not None and sidecar.get("trained") else None
    if recorded is not None and dataset.trained is not None and dataset.trained.sha256() != recorded:
        raise DataError(
            f"{trained_path(dataset.prefix)}: does not match the hash in {sidecar_path(dataset.prefix).name}; "
            "copy or build it again"
        )


def dataset_paths(prefix: str | Path) -> list[Path]:
    """Return all files that a dataset can have."""
    return [
        of(prefix)
        for of in (bin_path, idx_path, sidecar_path, sources_path, signatures_path, trained_path, overlaps_path)
    ]


def check_output(prefix: str | Path, overwrite: bool) -> None:
    """Refuse to write where something else is.

    Raises:
        DataError: an output file already exists; PREFIX.json is none of a dataset, whatever `overwrite`; or the prefix
            is a folder without a file name.
    """
    if Path(prefix).name in ("", ".."):  # "" is the current folder
        raise DataError(f"output prefix {str(prefix)!r}: is a folder; add a file name")
    path = sidecar_path(prefix)
    if path.exists() and _is_of_others(prefix):
        raise DataError(
            f"{path}: is not the description of a dataset, and is not overwritten; choose another output prefix, or "
            "move it away"
        )
    for path in dataset_paths(prefix):
        if path.exists() and not overwrite:
            raise DataError(f"{path}: already exists; choose another output prefix, or overwrite it (--overwrite)")


def _is_of_others(prefix: str | Path) -> bool:
    try:
        return read_sidecar(prefix) is None
    except DataError:  # damaged: building again replaces it
        return False


@dataclass(frozen=True)
class DocumentSource:
    """Origin of a document: `name` is "file:line" as in errors; bytes [start, start + size), size 0 for table rows."""

    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.name}, bytes {self.start:,} to {self.start + self.size:,}" if self.size else self.name


class DocumentSources:
    """PREFIX.sources, the origin of each document: a 24-byte row, whose `file` indexes the file list in PREFIX.json.

    The file is optional for readers of the dataset; `available` is False if it has none.

    Attributes:
        rows: SOURCE [documents], if available.

    Raises:
        DataError: the file does not match the dataset.
    """

    def __init__(self, prefix: str | Path, documents: int) -> None:
        path = sources_path(prefix)
        self.available = path.exists() and documents > 0
        if not self.available:
            return
        size = path.stat().st_size
        if size != documents * SOURCE.itemsize:
            raise DataError(
                f"{path}: {documents * SOURCE.itemsize:,} bytes expected for {documents:,} documents, {size:,} found; "
                "copy or build it again"
            )
        self.rows = np.memmap(path, dtype=SOURCE, mode="r")
        sidecar = read_json(sidecar_path(prefix))
        self._files = [InputFile(file["path"], file["kind"]) for file in sidecar["inputs"]]
        self._options = ReadOptions(documents=sidecar["options"]["read"]["documents"])

    def __getitem__(self, document: int) -> DocumentSource | None:
        if not self.available:
            return None
        row = self.rows[document]
        name = record_name(self._files[row["file"]], self._options, int(row["line"]))
        return DocumentSource(name, int(row["start"]), int(row["size"]))
