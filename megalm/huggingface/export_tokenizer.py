"""A run's tokenizer as the files that `AutoTokenizer` loads: the same ids, looked at before they are believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megalm.data.tokenizers.tokenizer import BYTES, Tokenizer
from megalm.huggingface.sentencepiece_to_tokenizer_json import NoEquivalentError, SentencePieceModel
from megalm.utils.atomic_files import read_json, write_bytes_atomically, write_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "sentencepiece.model"

_EOD = "<eod>"  # of the bytes tokenizer, which has no names
_PIECES_OF_A_TEXT = 500
_TEXTS = (
    "",
    " ",
    "plain words, and 1234567890 digits",
    "  runs   of    spaces      " + " " * 300,
    "\n",
    "\n\n\tdef f(x):\r\n    return x * 2\n\n\n",
    "nul \0 bell \a escape \x1b delete \x7f zero width \u200b\ufeff",
    "na\u00efve nai\u0308ve \ufb01 \u00c5 \u212b \u00df \u0130",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u3000\u00a0\u2028",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0010ffff\ue000",
    "\u2581 \u2581\u2581a\u2581b \u2585",
    "<0x41><0xE2><0x96><0x81> <s> </s> <|endoftext|>",
    "a" * 700 + "=" * 700,
)


@dataclass(frozen=True)
class ExportedTokenizer:
    """What became of a tokenizer.

    Attributes:
        note: a line for people: what it is proven to be, or why there is none and what to use.
        files: of the exported folder.
        eod, pad: names of tokens, where it has them.
    """

    note: str
    files: tuple[str, ...]
    eod: str | None = None
    pad: str | None = None
    pad_id: int | None = None

    @property
    def is_there(self) -> bool:
        return TOKENIZER in self.files


@dataclass(frozen=True)
class _Made:
    tokenizer: tokenizers.Tokenizer
    special: dict[str, str | None]  # as tokenizer_config.json names them
    pieces: SentencePieceModel | None = None


def write_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> ExportedTokenizer:
    """Write tokenizer.json and tokenizer_config.json into `folder`; a SentencePiece model is kept beside them.

    Args:
        tokenizer: the run's.
        longest: tokens that the model takes.

    Raises:
        DataError: the tokenizer has no token that ends a document.
    """
    files: tuple[str, ...] = ()
    if _is_sentencepiece(tokenizer):
        shutil.copyfile(tokenizer.spec, folder / SENTENCEPIECE)
        files = (SENTENCEPIECE,)
    try:
        made = _make(tokenizer)
        ties, texts = _compared(tokenizer, made)
    except NoEquivalentError as reason:
        kept = f"; load {SENTENCEPIECE} with the sentencepiece library" if files else ""
        return ExportedTokenizer(f"no {TOKENIZER}: {reason}{kept}", files)
    eod = made.tokenizer.id_to_token(tokenizer.eod_id)
    special = {**made.special, "eos_token": eod}
    made.tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special.values() if name is not None]
    )
    # Its own `save` raises bare Exceptions, of which a full disk could not be told from anything else.
    write_bytes_atomically(folder / TOKENIZER, made.tokenizer.to_str(pretty=True).encode())
    write_json(
        folder / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            **special,
            "clean_up_tokenization_spaces": False,
            # In a text the name of a special token is text, as it was in training.
            "split_special_tokens": True,
        },
    )
    note = f"{TOKENIZER}: megalm's ids on {texts - ties} of {texts} texts that were tried"
    if made.pieces is not None and made.pieces.is_unigram:
        note += (
            "; where two ways to cut a text are equally likely to the last bits it may take the other one (scores are "
            f"added in 64 bits there, in 32 in training): {SENTENCEPIECE} gives megalm's ids always"
        )
    pad = special.get("pad_token")
    return ExportedTokenizer(
        note,
        (*files, TOKENIZER, TOKENIZER_CONFIG),
        eod,
        pad,
        None if pad is None else made.tokenizer.token_to_id(pad),
    )


def added_around(tokenizer: Tokenizer) -> list[str]:
    """Names of the tokens that a tokenizer.json puts before or after a text, which megalm leaves out."""
    path = Path(tokenizer.spec)
    if path.suffix != ".json":
        return []
    theirs = tokenizers.Tokenizer.from_file(str(path))
    alone = set(theirs.encode("a", add_special_tokens=False).ids)
    return [str(theirs.id_to_token(token)) for token in theirs.encode("a").ids if token not in alone]


def _is_sentencepiece(tokenizer: Tokenizer) -> bool:
    return tokenizer.name.startswith("sentencepiece:")


def _make(tokenizer: Tokenizer) -> _Made:
    if tokenizer.spec == BYTES:
        return _Made(_bytes_tokenizer(tokenizer.eod_id), {"bos_token": None, "unk_token": None, "pad_token": None})
    if _is_sentencepiece(tokenizer):
        model = SentencePieceModel(tokenizer.spec)
        special = {"bos_token": model.bos, "unk_token": model.unknown, "pad_token": model.pad}
        return _Made(model.tokenizer(), special, model)
    return _Made(*_plain_definition(Path(tokenizer.spec)))


def _bytes_tokenizer(eod_id: int) -> tokenizers.Tokenizer:
    """Ids are byte values. The byte alphabet has a printable character for each byte, in an order of its own."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    printable = [byte for byte in range(256) if chr(byte) in pre_tokenizers.ByteLevel.alphabet()]
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    made = tokenizers.Tokenizer(models.BPE(vocab={**names, _EOD: eod_id}, merges=[]))
    made.pre_tokenizer = alphabet
    made.decoder = decoders.ByteLevel()
    return made


def _plain_definition(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """A tokenizer.json without what megalm leaves out: cutting, padding, tokens around a text."""
    definition = {**read_json(path), "truncation": None, "padding": None}
    if (definition.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        definition["post_processor"] = None  # it would add a beginning that the model was not trained with
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    beside = path.with_name(TOKENIZER_CONFIG)
    stated = read_json(beside) if beside.is_file() else {}
    special = {key: _known(made, stated.get(key)) for key in ("bos_token", "unk_token", "pad_token")}
    special["unk_token"] = special["unk_token"] or _known(made, definition.get("model", {}).get("unk_token"))
    return made, special


def _known(tokenizer: tokenizers.Tokenizer, token: Any) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) and tokenizer.token_to_id(name) is not None else None


def _compared(ours: Tokenizer, made: _Made) -> tuple[int, int]:
    """(texts that are cut otherwise, but as likely; texts).

    Raises:
        NoEquivalentError: it gives other ids, or another text.
    """
    theirs = made.tokenizer
    theirs.encode_special_tokens = True
    texts = list(_texts(ours, theirs))
    ties = 0
    for text, row in zip(texts, ours.encode_batch(texts), strict=True):
        found = theirs.encode(text, add_special_tokens=False).ids
        if theirs.decode(found) != ours.decode(row):
            raise NoEquivalentError(f"it gives another text back of {text[:40]!r}")
        if found != row:
            if made.pieces is None or not made.pieces.are_equally_likely(found, row):
                raise NoEquivalentError(f"it gives other ids for {text[:40]!r}")
            ties += 1
    return ties, len(texts)


def _texts(ours: Tokenizer, theirs: tokenizers.Tokenizer) -> Iterator[str]:
    """The awkward ones, the names of special tokens, and the whole vocabulary, a part at a time."""
    yield from _TEXTS
    yield " ".join(sorted(token.content for token in theirs.get_added_tokens_decoder().values()))
    for start in range(0, ours.vocab_size, _PIECES_OF_A_TEXT):
        known = range(start, min(start + _PIECES_OF_A_TEXT, ours.vocab_size))
        yield ours.decode([token for token in known if theirs.id_to_token(token) is not None])
