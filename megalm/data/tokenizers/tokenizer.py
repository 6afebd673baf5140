"""The tokenizer protocol, raw bytes as a tokenizer, and loading of SentencePiece and Hugging Face tokenizers.

V is the vocabulary size. Ids are 0..V-1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megalm.data.tokenizers.training import TokenizerReport, train_tokenizer
from megalm.errors import CheckpointError, DataError

__all__ = ["ByteTokenizer", "Tokenizer", "TokenizerReport", "load_tokenizer", "train_tokenizer"]

BYTES = "bytes"


class Tokenizer(Protocol):
    """The tokenizer interface for the rest of megalm."""

    @property
    def name(self) -> str:
        """Display name: the kind and the file's name."""

    @property
    def spec(self) -> str:
        """The argument for `load_tokenizer` that loads it again: a path, or "bytes"."""

    @property
    def vocab_size(self) -> int:
        """V: every id is below it."""

    @property
    def eod_id(self) -> int:
        """The token that ends a document.

        Raises:
            DataError: the tokenizer has none.
        """

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines ids (pieces, scores, normalizer); not of paths or of the training."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; adds no tokens, and reads no text as a control token."""

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """As `encode_batch`, but an array [n] per text; a quarter faster, because it makes no Python integers."""

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        """Whether `ids`, this tokenizer's encoding of `text`, decode back to `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens decode to nothing, bytes that are not UTF-8 to U+FFFD."""

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Return [V] the number of UTF-8 bytes that each id decodes to inside a text; 0 for control tokens."""

    def known_ids(self) -> npt.NDArray[np.bool_]:
        """Return [V] whether an id has a token; one without cannot be decoded, and generation never draws it."""

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        """Return [V] whether an id encodes a character without a piece: the unknown token and byte fallbacks."""


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 ends a document. Exact on every text; needs no training."""

    name = BYTES
    spec = BYTES
    vocab_size = 257
    eod_id = 256
    fingerprint = hashlib.sha256(b"megalm bytes tokenizer, 256 bytes and eod").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        return ids.astype(np.uint8).tobytes() == text.encode()

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < self.eod_id).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int32]:
        sizes = np.ones(self.vocab_size, dtype=np.int32)
        sizes[self.eod_id] = 0
        return sizes

    def known_ids(self) -> npt.NDArray[np.bool_]:
        return np.ones(self.vocab_size, dtype=np.bool_)

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        return np.zeros(self.vocab_size, dtype=np.bool_)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json` (or the folder that holds one), or "bytes".

    Raises:
        DataError: the file is missing, cannot be read, or does not match its suffix.
    """
    if str(spec) == BYTES:
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{spec}: no such tokenizer file; give a SentencePiece .model, a tokenizer.json, or 'bytes' "
            "(data_tools/train_tokenizer.py makes one)"
        )
    # Each library is imported only when used: both together take a third of a second.
    try:
        if path.suffix == ".json":
            from megalm.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer(path)
        from megalm.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    except OSError as error:
        raise DataError(f"{spec}: cannot be read ({error.strerror}); check the file and its permissions") from error


def tokenizer_of(checkpoint: Path, noted: str | None, fingerprint: str | None, named: str | None) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with.

    Args:
        noted, fingerprint: its path and fingerprint in the manifest.
        named: its current path, if it was moved.

    Raises:
        DataError: the tokenizer is not at its recorded path.
        CheckpointError: the manifest records none; or the one found at either path is a different one.
    """
    if noted is None or fingerprint is None:
        raise CheckpointError(f"{checkpoint} does not record its tokenizer")
    if not named and noted != BYTES and not Path(noted).exists():
        raise DataError(f"{noted}: the tokenizer of {checkpoint} does not exist; give its new path with --tokenizer")
    found = load_tokenizer(named or noted)
    if found.fingerprint != fingerprint:
        raise CheckpointError(
            f"{found.spec} is not the tokenizer of {checkpoint}: fingerprint {found.fingerprint[:12]}, "
            f"expected {fingerprint[:12]}; give the right one with --tokenizer"
        )
    return found
