"""Tokenizer for Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from megalm.errors import DataError
from megalm.utils.atomic_files import json_hash, read_json

EOD_TOKENS = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"


class HuggingFaceTokenizer:
    """A `tokenizer.json` file; see `Tokenizer` for its members.

    The end-of-document token is the `eos_token` of the `tokenizer_config.json` beside it, or else the first of
    the usual names found in the vocabulary.

    Raises:
        DataError: the tokenizers library cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.spec = str(path)
        self.name = f"huggingface:{Path(path).parent.name}/{Path(path).name}"
        self._definition: dict[str, Any] = read_json(Path(path))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: is not a tokenizer.json ({error}); export it again") from error
        # Truncation and padding are for input batches; here they would lose or add text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A special token's name inside a text is plain text: a page that quotes <|endoftext|> must not end there.
        self._tokenizer.encode_special_tokens = True
        self._special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        # Ids can have gaps: the model needs a row for the largest id, not one per token.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eod_id(self) -> int:
        for name in (*self._configured_eos(), *EOD_TOKENS):
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return int(token)
        raise DataError(
            f"{self.spec}: no end-of-document token found; set eos_token in the tokenizer_config.json beside it"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        decisive = {key: value for key, value in self._definition.items() if key not in ("truncation", "padding")}
        return json_hash(decisive)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [np.array(row, dtype=np.int32) for row in self.encode_batch(texts)]

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        return self.decode(ids.tolist()) == text

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        decoders = set(_decoder_types(self._definition.get("decoder")))
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token in self._special:
                continue
            sizes[token] = len(piece.encode()) if token in added else _piece_bytes(piece, decoders)
        return sizes

    def known_ids(self) -> npt.NDArray[np.bool_]:
        known = np.zeros(self.vocab_size, dtype=np.bool_)
        known[list(self._tokenizer.get_vocab(with_added_tokens=True).values())] = True
        return known

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        unknown = self._definition.get("model", {}).get("unk_token")
        fallback = np.zeros(self.vocab_size, dtype=np.bool_)
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            fallback[token] = piece == unknown or BYTE_TOKEN.fullmatch(piece) is not None
        return fallback

    def _configured_eos(self) -> Iterator[str]:
        path = Path(self.spec).with_name("tokenizer_config.json")
        if path.is_file():
            config = read_json(path)
            if not isinstance(config, dict):
                raise DataError(f"{path}: is not a JSON object; copy it again, or remove it")
            token = config.get("eos_token")
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                yield name


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder is not None:
        yield decoder.get("type", "")
        for inner in decoder.get("decoders", ()):
            yield from _decoder_types(inner)


def _piece_bytes(piece: str, decoders: set[str]) -> int:
    """Return a piece's bytes inside a text. Decoding a single id would be wrong: decoders strip the start of a text."""
    if "ByteLevel" in decoders:
        return len(piece)  # the byte alphabet has one character per byte
    if "ByteFallback" in decoders and BYTE_TOKEN.fullmatch(piece):
        return 1
    if "WordPiece" in decoders:
        return len(piece[2:].encode()) if piece.startswith("##") else len(piece.encode()) + 1
    return len(piece.replace(SPACE, " ").encode())
