"""Facts about a dataset, and whether it is what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalm.data.indexed import IndexedDataset, bin_path, idx_path, sidecar_path
from megalm.data.inputs import sha256_of
from megalm.data.report import sidecar_of
from megalm.data.signatures import open_signatures
from megalm.data.sources import Sources
from megalm.data.summary import Tell, no_tell, summarise
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError

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


def describe(prefix: str | Path, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """Name -> value of what the index and PREFIX.json say, without reading the tokens.

    Raises:
        DataError: a dataset that cannot be opened, or that was built with another tokenizer than `tokenizer`.
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
        facts["tokens a sequence"] = f"{lengths.min():,} to {lengths.max():,}, median {np.median(lengths):,.0f}"
    sidecar = sidecar_of(prefix)
    if sidecar is not None:
        recorded = sidecar["tokenizer"]
        if tokenizer is not None and recorded and recorded["fingerprint"] != tokenizer.fingerprint:
            raise DataError(
                f"{prefix}: was built with {recorded['name']} ({recorded['fingerprint'][:12]}), not with "
                f"{tokenizer.spec} ({tokenizer.fingerprint[:12]}); name the right one, or build the dataset again"
            )
        if recorded:
            facts["tokenizer"] = f"{recorded['name']}, {recorded['vocab_size']:,} ids, {recorded['fingerprint'][:12]}"
        facts |= {name.replace("_", " "): str(sidecar[name]) for name in RECORDED if name in sidecar}
    return facts


def verify(prefix: str | Path, tokenizer: Tokenizer | None = None, tell: Tell = no_tell) -> dict[str, str]:
    """Read everything: the index's entries, the range of the tokens, and the hashes in PREFIX.json.

    Raises:
        DataError: at the first thing that is wrong.
    """
    dataset = IndexedDataset(prefix)
    dataset.verify()
    sidecar = sidecar_of(prefix) or {}
    vocab_size = tokenizer.vocab_size if tokenizer else sidecar.get("tokenizer", {}).get("vocab_size")
    summary = summarise(dataset, vocab_size, tell)
    recorded = sidecar.get("bin_sha256")
    if recorded is not None and recorded != summary.sha256:
        raise DataError(
            f"{bin_path(prefix)}: its content is not what {sidecar_path(prefix).name} recorded "
            f"({summary.sha256[:12]}, not {recorded[:12]}); copy or build it again"
        )
    recorded_index = sidecar.get("idx_sha256")
    if recorded_index is not None and recorded_index != sha256_of(idx_path(prefix)):
        raise DataError(
            f"{idx_path(prefix)}: its content is not what {sidecar_path(prefix).name} recorded; copy or build it again"
        )
    Sources(prefix, dataset.document_count)  # of another size: refused
    if signed := sidecar.get("minhash"):
        open_signatures(prefix, signed, dataset.document_count)
    return {
        "largest token": str(summary.largest_token),
        "distinct tokens": f"{summary.distinct_tokens:,}",
        "sha256 of .bin": summary.sha256 + (", as recorded" if recorded else ", none recorded"),
        "verified": "index and tokens are whole",
    }


def document_text(prefix: str | Path, document: int, tokenizer: Tokenizer | None = None) -> str:
    """A document as text, or as ids without a tokenizer.

    Raises:
        DataError: a document that is not there.
    """
    dataset = IndexedDataset(prefix)
    if not 0 <= document < dataset.document_count:
        raise DataError(f"{prefix}: document {document} of {dataset.document_count}; they are numbered from 0")
    first, end = (int(bound) for bound in dataset.document_index[document : document + 2])
    tokens = [int(token) for sequence in range(first, end) for token in dataset[sequence]]
    return tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))
