"""Describe a dataset, verify it against its recorded hashes, print its documents, and compute statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.builder.decontamination import describe_overlap
from megalm.data.builder.dedup import ExactDeduplicator, exact_signatures, open_signatures
from megalm.data.indexed.dataset import IndexedDataset, bin_path, idx_path, sidecar_path
from megalm.data.indexed.metadata import DocumentSources, check_trained, read_sidecar
from megalm.data.indexed.token_counts import Tell, count_tokens, no_tell
from megalm.data.indexed.trained_tokens import trained_share
from megalm.data.readers.input_files import sha256_of
from megalm.data.readers.losses import Losses
from megalm.data.sampling.packing import expected_padding
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError

HASHED_DOCUMENTS = 4096
PACKED_LENGTHS = (1024, 4096)  # sequence lengths for which to tell the padding of best-fit packing
RECORDED = (
    "text_bytes",
    "empty_documents",
    "skipped",
    "removed",
    "near_copies",
    "inexact_documents",
    "unigram_entropy",
    "options",
)
MARKS = "«", "»"  # around what is trained of a conversation


def describe(
    prefix: str | Path, tokenizer: Tokenizer | None = None, packed_lengths: Sequence[int] = PACKED_LENGTHS
) -> dict[str, str]:
    """Return name -> value of the facts in the index and PREFIX.json, without reading the tokens.

    Args:
        packed_lengths: sequence lengths for which to tell the padding of best-fit packing.

    Raises:
        DataError: the dataset cannot be opened, or was built with another tokenizer than `tokenizer`.
    """
    dataset = IndexedDataset(prefix)
    lengths = dataset.sequence_lengths
    facts = {
        "prefix": dataset.prefix,
        "documents": f"{dataset.document_count:,}",
        "sequences": f"{len(dataset):,}",
        "tokens": f"{len(dataset.tokens):,}",
        "dtype": dataset.dtype.name,
        "fingerprint": dataset.fingerprint,
    }
    if len(lengths):
        facts["tokens per sequence"] = f"{lengths.min():,} to {lengths.max():,}, median {np.median(lengths):,.0f}"
        facts["best-fit packing"] = packed_padding(dataset, packed_lengths)
    check_trained(dataset)
    if dataset.trained is not None:
        facts["trained tokens"] = trained_share(dataset.trained.count(), len(dataset.tokens))
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        recorded = sidecar["tokenizer"]
        if tokenizer is not None and recorded and recorded["fingerprint"] != tokenizer.fingerprint:
            raise DataError(
                f"{prefix}: was built with {recorded['name']} ({recorded['fingerprint'][:12]}), not with "
                f"{tokenizer.spec} ({tokenizer.fingerprint[:12]}); give the right one, or build the dataset again"
            )
        if recorded:
            facts["tokenizer"] = f"{recorded['name']}, {recorded['vocab_size']:,} ids, {recorded['fingerprint'][:12]}"
            facts["begin of document"] = _recorded_token(recorded, "bos", tokenizer)
            facts["end of document"] = _recorded_token(recorded, "eod", tokenizer)
        facts |= {name.replace("_", " "): str(sidecar[name]) for name in RECORDED if name in sidecar}
        for number, line in enumerate(describe_overlap(sidecar.get("overlap", {}))):
            facts[f"overlap{f' {number}' if number else ''}"] = line.removeprefix("overlap: ")
        if lost := Losses.from_report(sidecar.get("losses", {})).lines():
            facts["unreadable input"] = "; ".join(lost)
    return facts


def packed_padding(dataset: IndexedDataset, sequence_lengths: Sequence[int] = PACKED_LENGTHS) -> str:
    """Return a phrase on what data.packing=best_fit costs and cuts at these lengths."""
    lengths = dataset.sequence_lengths
    shares = [(length, expected_padding(lengths, length), np.mean(lengths > length + 1)) for length in sequence_lengths]
    return "; ".join(
        f"at {length:,} tokens {padding:.2%} padding, {longer:.1%} of the documents are longer"
        for length, padding, longer in shares
    )


def _recorded_token(recorded: dict[str, Any], name: str, tokenizer: Tokenizer | None) -> str:
    token = recorded.get(f"{name}_id")
    if token is None:
        return "no token"
    text = recorded.get(f"{name}_token") or (tokenizer.with_eod(token).eod_token if tokenizer else None)
    return f"{text} (id {token})" if text else f"id {token}"


def verify(prefix: str | Path, tokenizer: Tokenizer | None = None, tell: Tell = no_tell) -> dict[str, str]:
    """Read everything and check the index, the token range, and the hashes in PREFIX.json.

    Raises:
        DataError: at the first mismatch.
    """
    dataset = IndexedDataset(prefix)
    sidecar = read_sidecar(prefix) or {}
    vocab_size = tokenizer.vocab_size if tokenizer else sidecar.get("tokenizer", {}).get("vocab_size")
    summary = count_tokens(dataset, vocab_size, tell).summary()
    for path, name, found in (
        (bin_path(prefix), "bin_sha256", summary.sha256),
        (idx_path(prefix), "idx_sha256", sha256_of(idx_path(prefix))),
    ):
        recorded = sidecar.get(name, found)
        if recorded != found:
            raise DataError(
                f"{path}: does not match the hash in {sidecar_path(prefix).name} ({found[:12]}, not {recorded[:12]}); "
                "copy or build it again"
            )
    check_trained(dataset, thorough=True)
    DocumentSources(prefix, dataset.document_count)  # refuses a file of another size
    if signed := sidecar.get("minhash"):
        open_signatures(prefix, signed, dataset.document_count)
    return {
        "largest token": str(summary.largest_token),
        "distinct tokens": f"{summary.distinct_tokens:,}",
        "sha256 of .bin": summary.sha256 + (", as recorded" if "bin_sha256" in sidecar else ", not recorded"),
        "verified": "index and tokens are complete",
    }


def document_text(prefix: str | Path, document: int, tokenizer: Tokenizer | None = None) -> str:
    """Return a document as text, or as ids if there is no tokenizer; see `marked_text` for conversations.

    Raises:
        DataError: the dataset has no such document, or a token is not in the tokenizer's vocabulary.
    """
    dataset = IndexedDataset(prefix, tokenizer.vocab_size if tokenizer else None)
    if not 0 <= document < dataset.document_count:
        raise DataError(f"{prefix}: no document {document}; its {dataset.document_count} documents are numbered from 0")
    first, end = (int(bound) for bound in dataset.document_index[document : document + 2])
    rows = [dataset.sequence_positions(sequence) for sequence in range(first, end)]
    tokens = [token for row in rows for token in dataset.read(row).tolist()]
    trained = None if dataset.trained is None else [bit for row in rows for bit in dataset.trained.at(row).tolist()]
    return marked_text(tokens, trained, tokenizer)


def marked_text(tokens: Sequence[int], trained: Sequence[bool] | None, tokenizer: Tokenizer | None = None) -> str:
    """Return tokens as text, or as ids without a tokenizer.

    Args:
        trained: of a conversation, whether each token is trained: these stand between MARKS, and special tokens are
            shown by name.
    """
    if trained is None:
        return tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))
    pieces, first = [], 0
    for is_trained, run in groupby(trained):
        end = first + len(list(run))
        part = tokens[first:end]
        text = tokenizer.decode_marked(part) if tokenizer else " ".join(map(str, part))
        pieces.append(text.join(MARKS) if is_trained else text)
        first = end
    return ("" if tokenizer else " ").join(pieces)


@dataclass(frozen=True)
class Statistics:
    """Attributes:
    length_histogram: (from, to, documents): lengths in tokens, in powers of two.
    frequent: (id, share of all tokens), most frequent first.
    tokens_per_byte, fallback_share: None without a tokenizer.
    duplicates: number of documents with the same tokens as an earlier one.
    """

    length_histogram: list[tuple[int, int, int]]
    frequent: list[tuple[int, float]]
    tokens_per_byte: float | None
    fallback_share: float | None
    duplicates: int


def statistics(
    dataset: IndexedDataset, tokenizer: Tokenizer | None = None, most: int = 20, tell: Tell = no_tell
) -> Statistics:
    """Compute statistics; reads all tokens twice.

    Raises:
        DataError: a token is not in the tokenizer's vocabulary.
    """
    counts = count_tokens(dataset, tokenizer.vocab_size if tokenizer else None, tell).counts
    total = max(1, len(dataset.tokens))
    order = np.argsort(-counts, kind="stable")[:most]
    text_bytes = fallback = None
    if tokenizer is not None:
        text_bytes = int((tokenizer.token_bytes().astype(np.int64) * counts).sum())
        fallback = float(counts[tokenizer.fallback_ids()].sum() / total)
    powers = np.bincount(np.frexp(dataset.sequence_lengths.astype(np.float64))[1].clip(0))
    return Statistics(
        length_histogram=[(2**power >> 1, 2**power - 1, int(count)) for power, count in enumerate(powers) if count],
        frequent=[(int(token), float(counts[token] / total)) for token in order if counts[token]],
        tokens_per_byte=len(dataset.tokens) / text_bytes if text_bytes else None,
        fallback_share=fallback,
        duplicates=_duplicates(dataset, tell),
    )


def _duplicates(dataset: IndexedDataset, tell: Tell) -> int:
    repeated = 0
    with tempfile.TemporaryDirectory() as folder:
        seen = ExactDeduplicator(Path(folder) / "seen")
        for start in range(0, len(dataset), HASHED_DOCUMENTS):
            rows = [
                dataset[index].astype(np.int32) for index in range(start, min(start + HASHED_DOCUMENTS, len(dataset)))
            ]
            repeated += int((~seen.add(exact_signatures(rows))).sum())
            tell(sum(map(len, rows)))
    return repeated
