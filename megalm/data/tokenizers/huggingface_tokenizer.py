"""Tokenizer for Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from megalm.data.tokenizers.tokenizer import (
    BYTE,
    EOD_TOKENS,
    SPECIAL,
    TEXT,
    TOKENIZER_CONFIG,
    MarkedEncoding,
    TokenContent,
    Tokenizer,
    library_errors,
    token_name,
)
from megalm.errors import DataError
from megalm.utils.atomic_files import json_hash, read_json

log = logging.getLogger(__name__)

_MOST_IDS = 10_000_000  # twenty times the largest vocabulary in use
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"
CLASS_TOKEN = "[CLS]"  # BERT's, for the class of a text; no model has it before what it continues


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` file; see `Tokenizer` for its members.

    Its own end-of-document token is the `eos_token` of the `tokenizer_config.json` beside it, or else the first of
    the usual names found in the vocabulary.

    Raises:
        DataError: the tokenizers library cannot read the file.
    """

    reads_special_tokens = True

    def __init__(self, path: str | Path) -> None:
        self.spec = str(path)
        self.name = f"huggingface:{Path(path).parent.name}/{Path(path).name}"
        self._definition: dict[str, Any] = _definition_of(Path(path))
        with library_errors(f"{path}: is not a usable tokenizer.json; export it again"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
            log.warning("%s: its BPE dropout is switched off: it would give other tokens for the same text", path)
        # Truncation and padding are for input batches; here they would lose or add text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A special token's name inside a text is plain text: a page that quotes <|endoftext|> must not end there.
        self._tokenizer.encode_special_tokens = True
        self._special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        # Ids can have gaps: the model needs a row for the largest id, not one per token.
        self.vocab_size = max(self.vocabulary().values(), default=-1) + 1
        if self.vocab_size > _MOST_IDS:
            raise DataError(
                f"{path}: its largest id is {self.vocab_size - 1:,}; a model has a row for each id up to it, at most "
                f"{_MOST_IDS:,}; number the tokens from 0"
            )

    def _own_eod(self) -> int:
        return self._fitting_eod[1]

    @property
    def eod_source(self) -> str:
        named = not self.eod_is_chosen and self._fitting_eod[0] in self._configured_eos
        return f"the eos_token of {TOKENIZER_CONFIG}" if named else ""

    @functools.cached_property
    def own_bos_id(self) -> int | None:
        """The one token that the post-processor puts before a text; else as `tokenizer_config.json` says."""
        before, _ = self.added_around()
        if len(before) != 1 or self._name_of(before[0]) == CLASS_TOKEN:
            return super().own_bos_id
        if self.beside(TOKENIZER_CONFIG).get("add_bos_token") is False:
            log.warning(
                "%s: puts %s before a text, but %s beside it says that it adds none; choose (--bos-token, in training "
                "data.bos_token)",
                self.spec,
                self._name_of(before[0]),
                TOKENIZER_CONFIG,
            )
        return before[0]

    def added_around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the file's post-processor puts before a text and after it."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        first = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        return whole[:first], whole[first + len(plain) :]

    @functools.cached_property
    def _fitting_eod(self) -> tuple[str, int]:
        """The name and the id of the file's own end-of-document token; warns if others fit as well."""
        configured = self._configured_eos
        found = {name: self._tokenizer.token_to_id(name) for name in (*configured, *EOD_TOKENS)}
        fitting = {name: int(token) for name, token in found.items() if token is not None}
        if not fitting:
            raise DataError(
                f"{self.spec}: no end-of-document token found; choose one of its tokens (--eod-token, in training "
                "data.eod_token)"
            )
        (name, token), *others = fitting.items()
        if others and not (name in configured and name in EOD_TOKENS):
            log.warning(
                "%s: documents end with %s (id %d), but %s would fit as well; choose one (--eod-token, in training "
                "data.eod_token)",
                self.spec,
                name,
                token,
                ", ".join(other for other, _ in others),
            )
        return name, token

    @functools.cached_property
    def fingerprint(self) -> str:
        decisive = {key: value for key, value in self._definition.items() if key not in ("truncation", "padding")}
        return json_hash(decisive)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def _encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encode_marked(self, texts: Sequence[str]) -> list[MarkedEncoding]:
        self._tokenizer.encode_special_tokens = False
        try:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        marked = []
        for text, encoding in zip(texts, encodings, strict=True):
            bounds = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            is_exact = self._tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
            ids = np.array(encoding.ids, dtype=np.int32)
            marked.append(MarkedEncoding(ids, bounds[:, 0], bounds[:, 1], is_exact))
        return marked

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        return self.decode(ids.tolist()) == text

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_marked(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_contents(self) -> dict[int, TokenContent]:
        decoders = set(_decoder_types(self._definition.get("decoder")))
        added = self._tokenizer.get_added_tokens_decoder()
        return {
            token: TokenContent(SPECIAL if token in self._special else TEXT, piece.encode())
            if token in added
            else _piece_content(piece, decoders)
            for piece, token in self.vocabulary().items()
        }

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        unknown = self._definition.get("model", {}).get("unk_token")
        fallback = np.zeros(self.vocab_size, dtype=np.bool_)
        for piece, token in self.vocabulary().items():
            fallback[token] = piece == unknown or BYTE_TOKEN.fullmatch(piece) is not None
        return fallback

    @property
    def _configured_eos(self) -> list[str]:
        name = token_name(self.beside(TOKENIZER_CONFIG).get("eos_token"))
        return [name] if name else []


def _definition_of(path: Path) -> dict[str, Any]:
    """Read the file, and say what else it is if it is no tokenizer.json."""
    try:
        definition = read_json(path)
    except RecursionError:
        raise DataError(f"{path}: is nested too deep for a tokenizer.json; export it again") from None
    if isinstance(definition, dict) and isinstance(definition.get("model"), dict):
        return definition
    if isinstance(definition, dict) and definition and all(isinstance(token, int) for token in definition.values()):
        raise DataError(
            f"{path}: is a vocabulary without its merges; save the whole tokenizer as a tokenizer.json: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of transformers"
        )
    raise DataError(f"{path}: is not a tokenizer.json, it has no section 'model'; export it again")


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder is not None:
        yield decoder.get("type", "")
        for inner in decoder.get("decoders", ()):
            yield from _decoder_types(inner)


def _piece_content(piece: str, decoders: set[str]) -> TokenContent:
    """Return a piece's bytes inside a text. Decoding a single id would be wrong: decoders strip the start of a text."""
    if "ByteLevel" in decoders:
        alphabet = byte_alphabet()
        spelled = all(character in alphabet for character in piece)
        return TokenContent(TEXT, bytes(map(alphabet.__getitem__, piece)) if spelled else piece.encode())
    if "ByteFallback" in decoders and BYTE_TOKEN.fullmatch(piece):
        return TokenContent(BYTE, bytes([int(piece[3:5], 16)]))
    if "WordPiece" in decoders:
        return TokenContent(TEXT, (piece[2:] if piece.startswith("##") else f" {piece}").encode())
    return TokenContent(TEXT, piece.replace(SPACE, " ").encode())


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level piece is: printable ones as Latin-1, others from 256 on."""
    printable = [byte for byte in range(256) if chr(byte) in tokenizers.pre_tokenizers.ByteLevel.alphabet()]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
