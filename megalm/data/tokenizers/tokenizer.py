"""Tokenizers behind one protocol: SentencePiece, Hugging Face tokenizer.json, and raw bytes.

V is the size of the vocabulary. Ids are 0..V-1.
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
    """What the rest of megalm knows of a tokenizer."""

    @property
    def name(self) -> str:
        """For people: the kind and the file's name."""

    @property
    def spec(self) -> str:
        """What `load_tokenizer` takes to load it again: a path, or "bytes"."""

    @property
    def vocab_size(self) -> int:
        """V: every id is below it."""

    @property
    def eod_id(self) -> int:
        """The token that ends a document.

        Raises:
            DataError: where the tokenizer has none.
        """

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids (pieces, scores, normaliser); not of paths or of how it was trained."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; no token is added, and no text is read as a control token."""

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The same ids as of `encode_batch`, [n] for each text, without a Python integer for each: a quarter faster."""

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        """Whether decoding `ids`, which are this tokenizer's own of `text`, gives `text` back."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens give nothing, bytes that are not UTF-8 give U+FFFD."""

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """[V] how many UTF-8 bytes each id decodes to inside a text; 0 for control tokens."""

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        """[V] ids that stand for a character without a piece: unknown ones, and bytes of it."""


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 ends a document: exact on every text, trained on none."""

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

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        return np.zeros(self.vocab_size, dtype=np.bool_)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json` (or the folder that holds one), or "bytes".

    Raises:
        DataError: a file that is absent, cannot be read, or is not what its name says.
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
    # Each library is imported only by those who use it: both together cost a third of a second.
    try:
        if path.suffix == ".json":
            from megalm.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer(path)
        from megalm.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    except OSError as error:
        raise DataError(f"{spec}: cannot be read ({error.strerror}); check the file and its rights") from error


def tokenizer_of(checkpoint: Path, noted: str | None, fingerprint: str | None, named: str | None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Args:
        noted, fingerprint: what its manifest says of it.
        named: where it is now, if it moved.

    Raises:
        DataError: it is not where it was.
        CheckpointError: nothing is noted; or the one that is there, or that was named, is another.
    """
    if noted is None or fingerprint is None:
        raise CheckpointError(f"{checkpoint} does not say which tokenizer it was trained with")
    if not named and noted != BYTES and not Path(noted).exists():
        raise DataError(
            f"{noted}: the tokenizer of {checkpoint} is not there any more; name where it is now with --tokenizer"
        )
    found = load_tokenizer(named or noted)
    if found.fingerprint != fingerprint:
        raise CheckpointError(
            f"{found.spec} is not the tokenizer of {checkpoint}: fingerprint {found.fingerprint[:12]}, "
            f"expected {fingerprint[:12]}; name the right one with --tokenizer"
        )
    return found
