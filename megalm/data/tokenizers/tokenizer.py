"""The tokenizer interface, raw bytes as a tokenizer, and loading of SentencePiece and Hugging Face tokenizers.

V is the vocabulary size. Ids are 0..V-1.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megalm.data.readers.input_files import refuse_pointer
from megalm.errors import CheckpointError, DataError
from megalm.utils.atomic_files import read_json
from megalm.utils.did_you_mean import did_you_mean

Integer = TypeVar("Integer", bound=np.integer)

log = logging.getLogger(__name__)

BYTES = "bytes"
TEXT, BYTE, SPECIAL = "text", "byte", "special"  # kinds of tokens
# Usual names of the token that ends a document, the most usual first.
EOD_TOKENS = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>")  # of that which begins one
AUTO, NONE = "auto", "none"  # words of --bos-token
TOKENIZER_CONFIG = "tokenizer_config.json"


class MarkedEncoding(NamedTuple):
    """Ids [n], the [first, end) characters of the text that each came from, and whether they decode back to it."""

    ids: npt.NDArray[np.int32]
    first: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    is_exact: bool


class TokenContent(NamedTuple):
    """What a token stands for: "text" with its UTF-8 bytes, a fallback "byte", or "special" with the bytes of its name.

    Tokenizers of different kinds that mean the same token have the same content, however they write it.
    """

    kind: str
    content: bytes


class Tokenizer(ABC):
    """The tokenizer interface for the rest of megalm.

    Attributes:
        name: display name: the kind and the file's name.
        spec: the argument for `load_tokenizer` that loads it again: a path, or "bytes".
        vocab_size: V: every id is below it.
        reads_special_tokens: whether `encode_marked` exists.
        bos_id: the token that begins each document, see `with_bos`; None: there is none, which is the default.
        bos_is_own: whether "auto" chose it.
    """

    name: str
    spec: str
    vocab_size: int
    reads_special_tokens: bool = False
    bos_id: int | None = None
    bos_is_own: bool = False
    _chosen_eod: int | None = None

    @property
    def eod_id(self) -> int:
        """The token that ends a document: the chosen one, or else the tokenizer's own.

        Raises:
            DataError: the tokenizer has none.
        """
        return self._own_eod() if self._chosen_eod is None else self._chosen_eod

    @property
    def eod_source(self) -> str:
        """Where the choice of `eod_id` is written, if in a file beside the tokenizer; else ""."""
        return ""

    @property
    def eod_is_chosen(self) -> bool:
        """Whether a user, a dataset or a checkpoint names `eod_id`, see `with_eod`."""
        return self._chosen_eod is not None

    @property
    def eod_token(self) -> str:
        """The text of `eod_id`."""
        return self._name_of(self.eod_id)

    @property
    def bos_token(self) -> str | None:
        """The text of `bos_id`."""
        return None if self.bos_id is None else self._name_of(self.bos_id)

    @property
    def own_bos_id(self) -> int | None:
        """The token that the files of the tokenizer put before a text; None: they put none.

        Raises:
            DataError: they name one that it does not have.
        """
        config = self.beside(TOKENIZER_CONFIG)
        if not config.get("add_bos_token"):
            return None
        name = token_name(config.get("bos_token"))
        token = self.vocabulary().get(name or "")
        if token is None:
            raise DataError(
                f"{Path(self.spec).with_name(TOKENIZER_CONFIG)}: has add_bos_token, but its bos_token {name!r} is no "
                f"token of {self.spec}; correct it, or choose a token or none (--bos-token, in training data.bos_token)"
            )
        return token

    def beside(self, name: str) -> dict[str, Any]:
        """Return the JSON object of this name beside the tokenizer's file; {} if there is none.

        Raises:
            DataError: it is damaged, or no object.
        """
        path = Path(self.spec).with_name(name)
        if self.spec == BYTES or not path.is_file():
            return {}
        found = read_json(path)
        if not isinstance(found, dict):
            raise DataError(f"{path}: is not a JSON object; copy it again, or remove it")
        return found

    def _name_of(self, wanted: int) -> str:
        return next((text for text, token in self.vocabulary().items() if token == wanted), str(wanted))

    def with_eod(self, eod: str | int) -> Tokenizer:
        """Return this tokenizer with another `eod_id`: a token's text as a user chooses it, or an id from a record.

        Raises:
            DataError: there is no such token.
        """
        chosen = copy.copy(self)
        chosen._chosen_eod = self._chosen(eod, "ends", EOD_TOKENS)
        return chosen

    def with_bos(self, bos: str | int | None) -> Tokenizer:
        """Return this tokenizer with another `bos_id`.

        Args:
            bos: a token's text as a user chooses it, "auto" (`own_bos_id`) or "none"; an id or None from a record.

        Raises:
            DataError: there is no such token.
        """
        chosen = copy.copy(self)
        chosen.bos_is_own = bos == AUTO
        if bos == AUTO:
            bos = self.own_bos_id
        chosen.bos_id = None if bos is None or bos == NONE else self._chosen(bos, "begins", BOS_TOKENS)
        return chosen

    def _chosen(self, chosen: str | int, does: str, usual: Sequence[str]) -> int:
        vocabulary = self.vocabulary()
        token = vocabulary.get(chosen, -1) if isinstance(chosen, str) else chosen
        if not 0 <= token < self.vocab_size:
            its = ", ".join(name for name in usual if name in vocabulary)
            near = did_you_mean(str(chosen), vocabulary) + (f"; it has {its}" if its else "")
            raise DataError(f"{self.spec}: {chosen!r} is no token of it{near}")
        if isinstance(chosen, str) and self.token_bytes()[token]:
            log.warning("%s: %r %s documents, but is ordinary text that they can contain", self.spec, chosen, does)
        return token

    def begun(self, ids: npt.NDArray[Integer]) -> npt.NDArray[Integer]:
        """Return the ids [n] of a text with `bos_id` before them, [n] or [n + 1]: never twice, as a chat template may
        have written it already."""
        if self.bos_id is None or (len(ids) and ids[0] == self.bos_id):
            return ids
        return np.concatenate([np.array([self.bos_id], dtype=ids.dtype), ids])

    def text_start(self, document_mask: bool) -> list[int]:
        """Return the token before a text that is evaluated: what a document begins with, or else follows, in training.

        Args:
            document_mask: attention was confined to one document, so that no document followed a token.
        """
        if self.bos_id is not None:
            return [self.bos_id]
        return [] if document_mask else [self.eod_id]

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, [n]; adds no tokens, and reads no text as a control token.

        Raises:
            DataError: a text cannot be encoded; `encode_each` tells which.
        """
        with library_errors(f"the tokenizer {self.spec} cannot encode this text"):
            return self._encode_batch(texts)

    def encode_marked(self, texts: Sequence[str]) -> list[MarkedEncoding]:
        """Return the encodings of texts in which the names of special tokens are these tokens, as of a chat template.

        Only where `reads_special_tokens`.

        Raises:
            DataError: a text cannot be encoded.
        """
        with library_errors(f"the tokenizer {self.spec} cannot encode this conversation"):
            return self._encode_marked(texts)

    def _encode_marked(self, texts: Sequence[str]) -> list[MarkedEncoding]:
        raise NotImplementedError(self.spec)

    def encode_each(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32] | DataError]:
        """The same as `encode_batch`, but with the error in the place of a text that cannot be encoded."""
        try:
            return [*self.encode_batch(texts)]
        except DataError as error:
            if len(texts) == 1:
                return [error]
            return [found for text in texts for found in self.encode_each([text])]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that determines ids (pieces, scores, normalizer); not of paths or of the training."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return the ids of the tokens by name, special ones included."""

    @abstractmethod
    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        """Whether `ids`, this tokenizer's encoding of `text`, decode back to `text`."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens decode to nothing, bytes that are not UTF-8 to U+FFFD."""

    def decode_marked(self, ids: Sequence[int]) -> str:
        """The same as `decode`, but with the names of special tokens, where the tokenizer reads them from text."""
        return self.decode(ids)

    @abstractmethod
    def token_contents(self) -> dict[int, TokenContent]:
        """Return what each id that has a token stands for inside a text."""

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Return [V] the number of UTF-8 bytes that each id decodes to inside a text; 0 for control tokens."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, (kind, content) in self.token_contents().items():
            sizes[token] = 0 if kind == SPECIAL else len(content)
        return sizes

    def known_ids(self) -> npt.NDArray[np.bool_]:
        """Return [V] whether an id has a token; one without cannot be decoded, and generation never draws it."""
        known = np.zeros(self.vocab_size, dtype=np.bool_)
        known[list(self.vocabulary().values())] = True
        return known

    @abstractmethod
    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        """Return [V] whether an id encodes a character without a piece: the unknown token and byte fallbacks."""

    @abstractmethod
    def _own_eod(self) -> int:
        """Return `eod_id` if none is chosen."""

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """See `encode_batch`; raises whatever the library raises."""


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes, 256 ends a document. Exact on every text; needs no training."""

    name = BYTES
    spec = BYTES
    vocab_size = 257
    reads_special_tokens = True  # it has none that a text could name
    fingerprint = hashlib.sha256(b"megalm bytes tokenizer, 256 bytes and eod").hexdigest()

    def _own_eod(self) -> int:
        return 256

    def vocabulary(self) -> dict[str, int]:
        return {"<eod>": 256}  # as an export names it; the bytes have no names

    def _encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def _encode_marked(self, texts: Sequence[str]) -> list[MarkedEncoding]:
        marked = []
        for text, ids in zip(texts, self._encode_batch(texts), strict=True):
            sizes = [len(character.encode()) for character in text]
            characters = np.repeat(np.arange(len(text)), sizes)
            marked.append(MarkedEncoding(ids, characters, characters + 1, is_exact=True))
        return marked

    def is_exact(self, text: str, ids: npt.NDArray[np.int32]) -> bool:
        return ids.astype(np.uint8).tobytes() == text.encode()

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_contents(self) -> dict[int, TokenContent]:
        return {byte: TokenContent(TEXT, bytes([byte])) for byte in range(256)} | {256: TokenContent(SPECIAL, b"<eod>")}

    def known_ids(self) -> npt.NDArray[np.bool_]:
        return np.ones(self.vocab_size, dtype=np.bool_)

    def fallback_ids(self) -> npt.NDArray[np.bool_]:
        return np.zeros(self.vocab_size, dtype=np.bool_)


def eod_or_none(tokenizer: Tokenizer) -> int | None:
    """Return the end-of-document token; None if there is none, which is refused only where one is needed."""
    try:
        return tokenizer.eod_id
    except DataError:
        return None


def describe_ends(tokenizer: Tokenizer, append_eod: bool = True) -> str:
    """Return a phrase such as "documents begin with <s> (id 1) and end with </s> (id 2)"; "" if there is neither."""
    parts = []
    if tokenizer.bos_id is not None:
        own = ", which the tokenizer puts before a text," if tokenizer.bos_is_own else ""
        parts.append(f"begin with {tokenizer.bos_token} (id {tokenizer.bos_id}){own}")
    if append_eod and eod_or_none(tokenizer) is not None:
        source = f", {tokenizer.eod_source}" if tokenizer.eod_source else ""
        parts.append(f"end with {tokenizer.eod_token} (id {tokenizer.eod_id}){source}")
    missing = ["no end-of-document token"] if append_eod and eod_or_none(tokenizer) is None else []
    return "; ".join([*([f"documents {' and '.join(parts)}".rstrip(",")] if parts else []), *missing])


def token_name(token: Any) -> str | None:
    """Return the text of a token of a tokenizer_config.json, where it is a text or an object with `content`."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what a tokenizer's library raises into one line; a panic of its code is not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise DataError(f"{what} ({' '.join(str(error).split())[:200]})") from error


def load_tokenizer(
    spec: str | Path, eod_token: str | int | None = None, bos_token: str | int | None = None
) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json` (or the folder that holds one), or "bytes".

    Args:
        eod_token: the token that ends a document, see `Tokenizer.with_eod`; None: the tokenizer's own.
        bos_token: the token that begins a document, see `Tokenizer.with_bos`; None: none does.

    Raises:
        DataError: the file is missing, cannot be read, or does not match its suffix; or it has no such token.
    """
    tokenizer = _load(spec).with_bos(bos_token)
    return tokenizer if eod_token is None else tokenizer.with_eod(eod_token)


def _load(spec: str | Path) -> Tokenizer:
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
    refuse_pointer(path)
    if path.suffix == ".tiktoken":
        raise DataError(
            f"{path}: is of tiktoken; save it as a tokenizer.json: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER) of transformers"
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


def tokenizer_of(
    checkpoint: Path,
    noted: str | None,
    fingerprint: str | None,
    ends: tuple[int | None, int | None],
    named: str | None,
) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with.

    Args:
        noted, fingerprint: its path and fingerprint in the manifest.
        ends: bos_id and eod_id in the manifest: the tokens that begin and end a document.
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
    bos_id, eod_id = ends
    found = found.with_bos(bos_id)
    return found if eod_id is None else found.with_eod(eod_id)
