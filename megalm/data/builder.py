"""Text into an indexed dataset: PREFIX.bin, PREFIX.idx, and PREFIX.json, which says what they were made of."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import megalm
from megalm.data.corpus import Document
from megalm.data.files import write_json
from megalm.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype, bin_path, idx_path, sidecar_path
from megalm.data.summary import summarise
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import DataError

SIDECAR_VERSION = 1
# Enough that passing a chunk to a worker costs nothing beside encoding it.
CHUNK_CHARACTERS = 1_000_000
CHUNK_DOCUMENTS = 1000
KEPT_NAMES = 20


@dataclass(frozen=True)
class BuildProgress:
    """So far: documents and text bytes read, tokens written."""

    documents: int
    text_bytes: int
    tokens: int


@dataclass
class BuildReport:
    """What a dataset was made of and holds; PREFIX.json has the same keys.

    Attributes:
        text_bytes: UTF-8 bytes of the documents that are in the dataset.
        inexact_documents: documents that the tokenizer does not give back exactly; `inexact_names` are the first.
        unigram_entropy: nats per token, see `TokenSummary`.
    """

    prefix: str
    tokenizer: dict[str, Any]
    options: dict[str, Any]
    inputs: list[str]
    documents: int = 0
    empty_documents: int = 0
    inexact_documents: int = 0
    inexact_names: list[str] = field(default_factory=list)
    text_bytes: int = 0
    tokens: int = 0
    dtype: str = ""
    unigram_entropy: float = 0.0
    bin_sha256: str = ""
    versions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Encoded:
    """A chunk of documents as tokens: [sum of lengths], and [documents] lengths."""

    tokens: npt.NDArray[np.generic]
    lengths: npt.NDArray[np.int64]
    empty: int
    text_bytes: int
    inexact: list[str]


def build_dataset(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    append_eod: bool = True,
    workers: int = 1,
    progress: Callable[[BuildProgress], None] | None = None,
    inputs: Sequence[str] = (),
    overwrite: bool = False,
) -> BuildReport:
    """Tokenize documents, in their order, into a dataset; the same bytes for any number of workers.

    Empty documents are left out and counted. Every document is decoded again, and those that do not come back
    exactly are counted and named; they are in the dataset all the same.

    Args:
        append_eod: end every document with the tokenizer's end-of-document token.
        workers: processes that encode; 1 encodes in this one.
        progress: called after every chunk.
        inputs: where the documents came from, for PREFIX.json.
        overwrite: replace a dataset of this name, which is otherwise an error.

    Raises:
        DataError: an output that exists, no document at all, no end-of-document token, a full disk, and what
            `documents` raises; nothing is left under the output's name then.
    """
    check_output(output_prefix, overwrite)
    report = BuildReport(
        prefix=Path(output_prefix).name,
        tokenizer={
            "name": tokenizer.name,
            "spec": _recorded_spec(tokenizer.spec, Path(output_prefix)),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id if append_eod else None,
        },
        options={"append_eod": append_eod},
        inputs=[str(name) for name in inputs],
        dtype=best_dtype(tokenizer.vocab_size).name,
        versions={"megalm": megalm.__version__, "sidecar": SIDECAR_VERSION},
    )
    with IndexedDatasetWriter(output_prefix, best_dtype(tokenizer.vocab_size)) as writer:
        for chunk in _encode_all(_chunks(documents), tokenizer, append_eod, workers):
            writer.append_documents(chunk.tokens, chunk.lengths)
            _add(report, chunk)
            if progress is not None:
                progress(BuildProgress(report.documents + report.empty_documents, report.text_bytes, report.tokens))
        if report.documents == 0:
            raise DataError(
                f"{output_prefix}: no text to build a dataset of ({report.empty_documents} empty documents); "
                "check the input"
            )
        sidecar_path(output_prefix).unlink(missing_ok=True)  # an old one would describe the new files
    summary = summarise(IndexedDataset(output_prefix), tokenizer.vocab_size)
    report.unigram_entropy, report.bin_sha256 = summary.unigram_entropy, summary.sha256
    write_json(sidecar_path(output_prefix), asdict(report))
    return report


def _recorded_spec(spec: str, prefix: Path) -> str:
    """A tokenizer beside the dataset by its name alone, so that the folder can be moved; another by its path."""
    path = Path(spec)
    if not path.exists():  # "bytes"
        return spec
    return path.name if path.resolve().parent == prefix.resolve().parent else str(path.resolve())


def check_output(prefix: str | Path, overwrite: bool) -> None:
    for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix)):
        if path.exists() and not overwrite:
            raise DataError(f"{path}: exists already; choose another output prefix, or overwrite it (--overwrite)")


def _add(report: BuildReport, chunk: _Encoded) -> None:
    report.documents += len(chunk.lengths)
    report.empty_documents += chunk.empty
    report.text_bytes += chunk.text_bytes
    report.tokens += len(chunk.tokens)
    report.inexact_documents += len(chunk.inexact)
    report.inexact_names += chunk.inexact[: KEPT_NAMES - len(report.inexact_names)]


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(chunk: Sequence[Document], tokenizer: Tokenizer, append_eod: bool) -> _Encoded:
    filled = [document for document in chunk if document.text]
    rows = tokenizer.encode_batch([document.text for document in filled])
    inexact = [
        document.source for document, row in zip(filled, rows, strict=True) if tokenizer.decode(row) != document.text
    ]
    if append_eod:
        for row in rows:
            row.append(tokenizer.eod_id)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.fromiter((token for row in rows for token in row), dtype=np.int64, count=int(lengths.sum()))
    return _Encoded(
        tokens=tokens.astype(best_dtype(tokenizer.vocab_size)),
        lengths=lengths,
        empty=len(chunk) - len(filled),
        text_bytes=sum(len(document.text.encode()) for document in filled),
        inexact=inexact,
    )


def _encode_all(
    chunks: Iterator[list[Document]], tokenizer: Tokenizer, append_eod: bool, workers: int
) -> Iterator[_Encoded]:
    """Encoded chunks in their order, whoever encodes them."""
    if workers <= 1:
        yield from (_encode(chunk, tokenizer, append_eod) for chunk in chunks)
        return
    # spawn: the library's own threads do not survive a fork. Each worker loads the tokenizer once, by its spec.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer.spec, append_eod)
    )
    try:
        waiting: deque[Future[_Encoded]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 2 * workers:  # reading must not run ahead of encoding until memory is full
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended while tokenizing, most likely for want of memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Tokenizer, bool] | None = None  # of a worker process only


def _start_worker(spec: str, append_eod: bool) -> None:
    global _worker  # noqa: PLW0603  the one place where a process pool can keep something
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load_tokenizer(spec), append_eod


def _encode_in_worker(chunk: list[Document]) -> _Encoded:
    assert _worker is not None
    return _encode(chunk, *_worker)
