"""Converts a SentencePiece model to a `tokenizer.json` that gives the same ids, or reports why that is impossible.

SentencePiece writes a space as U+2581 and also reads that character as a space; megalm encodes the character by its
bytes. So the converted pieces contain plain spaces, nothing is replaced, and U+2581 falls back to its bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megalm.data.tokenizers.sentencepiece_tokenizer import SPACE

_UNIGRAM, _BPE = 1, 2
_FLOAT32_ROUNDING = 2.0**-24  # the largest relative error of one addition


class NoEquivalentError(Exception):
    """The tokenizers library cannot give the same ids; the message is the reason."""


class SentencePieceModel:
    """A `.model` file that can be converted for the tokenizers library; `pieces` are those of its protocol buffer."""

    def __init__(self, path: str | Path) -> None:
        model = sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())
        self._model = model
        self.pieces: list[Any] = list(model.pieces)
        self._names = [piece.piece.replace(SPACE, " ") for piece in self.pieces]
        self._normal = {
            name: piece.score
            for name, piece in zip(self._names, self.pieces, strict=True)
            if piece.type == piece.NORMAL
        }
        self._user = [name for name, piece in self._each() if piece.type == piece.USER_DEFINED]
        trained = model.trainer_spec
        self.is_unigram = trained.model_type == _UNIGRAM
        self.unknown = next((name for name, piece in self._each() if piece.type == piece.UNKNOWN), None)
        self.bos = self._control(trained.bos_piece, trained.bos_id)
        self.pad = self._control(trained.pad_piece, trained.pad_id) or self._control("<pad>", 0)

    def to_tokenizer(self) -> tokenizers.Tokenizer:
        """The equivalent tokenizer of the tokenizers library.

        Raises:
            NoEquivalentError: it would give other ids.
        """
        self._require_equivalent()
        made = tokenizers.Tokenizer(self._unigram() if self.is_unigram else self._bpe())
        if self.is_unigram and (isolated := self._isolated_characters()):
            pattern = tokenizers.Regex(f"[{re.escape(isolated)}]")
            made.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        special = [name for name, piece in self._each() if piece.type in (piece.CONTROL, piece.UNKNOWN)]
        made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
        return made

    def are_equally_likely(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether two rows of ids have the same sum of scores within the precision of 32-bit floats.

        SentencePiece adds in 32 bits, the tokenizers library in 64, so they can choose different segmentations of the
        same likelihood.
        """
        if not self.is_unigram:
            return False
        sums = [math.fsum(self.pieces[token].score for token in row) for row in (one, other)]
        size = max(map(abs, sums))
        return abs(sums[0] - sums[1]) <= 2 * _FLOAT32_ROUNDING * size * max(len(one), len(other))

    def _require_equivalent(self) -> None:
        trained, normalizer = self._model.trainer_spec, self._model.normalizer_spec
        bytes_known = sum(piece.type == piece.BYTE for piece in self.pieces)
        characters = set("".join(self._normal))
        known = {name for name in (*self._normal, *self._user) if len(name) == 1}
        reasons = {
            "the model is neither unigram nor BPE": trained.model_type not in (_UNIGRAM, _BPE),
            "the model normalizes the text (a normalization table, an added space or removed whitespace)": bool(
                normalizer.precompiled_charsmap
                or normalizer.add_dummy_prefix
                or normalizer.remove_extra_whitespaces
                or self._model.denormalizer_spec.precompiled_charsmap
            ),
            "unknown characters do not fall back to bytes": bytes_known != 256 or not trained.byte_fallback,
            "a piece contains a character that is not itself a piece": not characters <= known,
            "two pieces differ only in a space and U+2581": len(set(self._names)) != len(self._names),
            "a user-defined piece has several characters, or is part of another piece": any(
                len(name) > 1 or name in characters for name in self._user
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                raise NoEquivalentError(reason)

    def _unigram(self) -> models.Unigram:
        highest, lowest = max(self._normal.values()), min(self._normal.values())
        longest = max(map(len, self._names))
        # Pieces with this score are never chosen: the characters of their names cost less.
        never = (longest + 1) * min(lowest, 0.0) - 100.0

        def score(piece: Any) -> float:
            if piece.type == piece.NORMAL:
                return float(piece.score)
            # A user-defined piece is a single character here that no other piece contains: any score selects it.
            return highest if piece.type == piece.USER_DEFINED else never

        vocabulary = [(name, score(piece)) for name, piece in self._each()]
        unknown = self._names.index(self.unknown) if self.unknown is not None else None
        return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=True)

    def _isolated_characters(self) -> str:
        """Characters that occur only in the names of control, unknown and byte pieces.

        Such a character costs more than any piece, so the tokenizers library would choose the whole name; split off, it
        cannot. No other piece contains it, so nothing else changes.
        """
        other = "".join(name for name, piece in self._each() if piece.type not in (piece.NORMAL, piece.USER_DEFINED))
        return "".join(sorted(set(other) - set("".join((*self._normal, *self._user)))))

    def _bpe(self) -> models.BPE:
        """Every merge of two pieces to a third, in the order of the third piece's score."""
        places = {name: place for place, name in enumerate(self._names)}
        merges = [
            (-score, places[name[:cut]], name[:cut], name[cut:])
            for name, score in self._normal.items()
            for cut in range(1, len(name))
            if name[:cut] in self._normal and name[cut:] in self._normal
        ]
        return models.BPE(
            vocab=places,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=self.unknown,
            byte_fallback=True,
        )

    def _each(self) -> Iterator[tuple[str, Any]]:
        return zip(self._names, self.pieces, strict=True)

    def _control(self, name: str, number: int) -> str | None:
        known = any(piece.piece == name and piece.type == piece.CONTROL for piece in self.pieces)
        return name if number >= 0 and known else None
