"""SentencePiece models as tokenizers."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megalm.errors import DataError

# The piece that stands for a space. The library reads the character itself as a space too, so where a text has
# it, it is encoded by its bytes instead.
SPACE = "\u2581"
EOD_PIECES = ("<eod>", "<|endoftext|>")


class SentencePieceTokenizer:
    """A `.model` file; see `Tokenizer` for what its members mean.

    Raises:
        DataError: a file that is not a SentencePiece model.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.spec = str(path)
        self.name = f"sentencepiece:{Path(path).name}"
        self._threads = threads
        self._content = Path(path).read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise DataError(f"{path}: is not a SentencePiece model; train or copy it again") from error
        self.vocab_size: int = self._processor.vocab_size()
        space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # Without byte pieces the character stays a space: the builder then counts the document as inexact.
        self._space_ids = space_bytes if all(map(self._processor.is_byte, space_bytes)) else None

    @property
    def eod_id(self) -> int:
        for piece in EOD_PIECES:
            token = self._processor.piece_to_id(piece)
            if token != self._processor.unk_id():
                return int(token)
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        raise DataError(f"{self.spec}: has no end-of-document token (<eod> or an eos piece); train one that has")

    @functools.cached_property
    def fingerprint(self) -> str:
        model = sentencepiece_model_pb2.ModelProto.FromString(self._content)
        digest = hashlib.sha256()
        for piece in model.pieces:
            text = piece.piece.encode()
            digest.update(struct.pack("<IfB", len(text), piece.score, piece.type) + text)
        digest.update(model.normalizer_spec.SerializeToString(deterministic=True))
        trained = model.trainer_spec
        digest.update(f"{trained.model_type} {trained.byte_fallback} {trained.treat_whitespace_as_suffix}".encode())
        return digest.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._space_ids is None or not any(SPACE in text for text in texts):
            return self._processor.encode(list(texts), num_threads=self._threads)
        return [self._encode_around_space_character(text, self._space_ids) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def token_bytes(self) -> npt.NDArray[np.int32]:
        return np.array([self._piece_bytes(token) for token in range(self.vocab_size)], dtype=np.int32)

    def _encode_around_space_character(self, text: str, space_ids: list[int]) -> list[int]:
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE))
        return first + [token for part in rest for token in (*space_ids, *part)]

    def _piece_bytes(self, token: int) -> int:
        processor = self._processor
        if processor.is_byte(token):
            return 1
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return 0
        return len(processor.id_to_piece(token).replace(SPACE, " ").encode())
