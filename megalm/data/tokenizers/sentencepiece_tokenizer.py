"""Tokenizer for SentencePiece models."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megalm.data.tokenizers.tokenizer import BYTE, SPECIAL, TEXT, TokenContent, Tokenizer
from megalm.errors import DataError

# The piece for a space. The library also reads the character itself as a space, so where a text contains it, it is
# encoded by its bytes instead.
SPACE = "\u2581"
# The library needs at least 16 bytes of memory per character of a text, and its fp32 score sums lose precision over
# millions of characters: longer texts are encoded in parts.
LONGEST_TEXT = 1 << 20  # characters
EOD_PIECES = ("<eod>", "<|endoftext|>")


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file; see `Tokenizer` for its members.

    Raises:
        DataError: the file is not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.spec = str(path)
        self.name = f"sentencepiece:{Path(path).name}"
        self._content = Path(path).read_bytes()
        try:
            if not self._content:  # the library accepts an empty file as a model
                raise RuntimeError("an empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise DataError(f"{path}: is not a SentencePiece model; train or copy it again") from error
        self.vocab_size = self._processor.vocab_size()
        space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # Without byte pieces the character becomes a space, and the builder counts the document as inexact.
        self._space_ids = space_bytes if all(map(self._processor.is_byte, space_bytes)) else None

    def _own_eod(self) -> int:
        for piece in EOD_PIECES:
            token = self._processor.piece_to_id(piece)
            if token != self._processor.unk_id():
                return int(token)
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        raise DataError(
            f"{self.spec}: has no end-of-document token (<eod> or an eos piece); choose one of its pieces "
            "(--eod-token, in training data.eod_token), or train a tokenizer that has one"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        model = self._model
        digest = hashlib.sha256()
        for piece in model.pieces:
            text = piece.piece.encode()
            digest.update(struct.pack("<IfB", len(text), piece.score, piece.type) + text)
        digest.update(model.normalizer_spec.SerializeToString(deterministic=True))
        trained = model.trainer_spec
        digest.update(f"{trained.model_type} {trained.byte_fallback} {trained.treat_whitespace_as_suffix}".encode())
        return digest.hexdigest()

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(token): token for token in range(self.vocab_size)}

    def _encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [self._encode(text) for text in texts]

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        if not self._copies:
            return self.decode(ids.tolist()) == text
        # Pieces are then consecutive substrings of the text: only a character without a piece is lost, and no other
        # piece can compensate for its bytes.
        return int(self._sizes.take(ids).sum()) == (len(text) if text.isascii() else len(text.encode()))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def token_contents(self) -> dict[int, TokenContent]:
        return {token: _piece_content(piece) for token, piece in enumerate(self._model.pieces)}

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        processor = self._processor
        return np.array([processor.is_byte(token) or processor.is_unknown(token) for token in range(self.vocab_size)])

    @functools.cached_property
    def _model(self) -> Any:
        return sentencepiece_model_pb2.ModelProto.FromString(self._content)

    @functools.cached_property
    def _sizes(self) -> npt.NDArray[np.int32]:
        return self.token_bytes()

    @functools.cached_property
    def _copies(self) -> bool:
        """Whether the text is split into pieces unchanged: no normalization, no spaces added or removed."""
        normalizer = self._model.normalizer_spec
        return not (
            normalizer.precompiled_charsmap
            or normalizer.add_dummy_prefix
            or normalizer.remove_extra_whitespaces
            or self._model.denormalizer_spec.precompiled_charsmap
            or self._space_ids is None
        )

    @functools.cached_property
    def _breaks_at_newlines(self) -> bool:
        """Whether a newline is always a separate token, so that lines encode the same together and separately."""
        user_defined = [piece.piece for piece in self._model.pieces if piece.type == piece.USER_DEFINED]
        return "\n" in user_defined and sum("\n" in piece.piece for piece in self._model.pieces) == 1

    def _encode(self, text: str) -> npt.NDArray[np.int32]:
        if len(text) > LONGEST_TEXT and self._copies and self._breaks_at_newlines:
            return np.concatenate([self._encode_part(part) for part in _cut_at_newlines(text)])
        return self._encode_part(text)

    def _encode_part(self, text: str) -> npt.NDArray[np.int32]:
        if self._space_ids is None or SPACE not in text:
            return np.asarray(self._processor.encode_as_numpy(text), dtype=np.int32)
        space = np.array(self._space_ids, dtype=np.int32)
        first, *rest = (self._processor.encode_as_numpy(part) for part in text.split(SPACE))
        return np.concatenate([first, *(row for part in rest for row in (space, part))]).astype(np.int32)


def _piece_content(piece: Any) -> TokenContent:
    if piece.type == piece.BYTE:
        return TokenContent(BYTE, bytes([int(piece.piece[3:5], 16)]))
    if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.UNUSED):
        return TokenContent(SPECIAL, piece.piece.encode())
    return TokenContent(TEXT, piece.piece.replace(SPACE, " ").encode())


def _cut_at_newlines(text: str) -> Iterator[str]:
    """Split into parts of at most `LONGEST_TEXT` characters, after a newline where possible."""
    start = 0
    while start < len(text):
        end = start + LONGEST_TEXT
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
