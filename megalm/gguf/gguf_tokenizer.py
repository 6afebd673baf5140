"""A run's tokenizer as llama.cpp reads it, or the reason why llama.cpp would give other ids.

llama.cpp has the cutting of texts compiled in: SentencePiece's BPE, and a byte-level BPE with a pre-tokenizer that is
chosen from a list by name. Its own converter finds that name by a hash of what a tokenizer gives for one text, so it
knows published tokenizers only; here it follows from the definition in tokenizer.json.
Names and numbers: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megalm.data.tokenizers.huggingface_tokenizer import byte_alphabet
from megalm.data.tokenizers.sentencepiece_tokenizer import SPACE
from megalm.data.tokenizers.tokenizer import BYTES, Tokenizer, token_name
from megalm.errors import DataError
from megalm.huggingface.export_tokenizer import own_chat_template, read_tokenizer_config
from megalm.huggingface.sentencepiece_to_tokenizer_json import NoEquivalentError, SentencePieceModel
from megalm.utils.atomic_files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's and SentencePiece's kinds of tokens

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The steps of a tokenizer.json before its byte level -> llama.cpp's name, and whether it takes a whole word that is in
# the vocabulary before it merges.
_PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("gpt2",): ("gpt-2", False),
    (_GPT2,): ("gpt-2", False),
    ("digits", "gpt2"): ("smollm", False),
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): ("llama-bpe", True),
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",): ("qwen2", False),
}

_UNIGRAM = "it is a unigram model, whose unknown characters llama.cpp does not write as bytes"
_UNUSED_SCORE = -1e4
_SPACE_NOTE = "a U+2581 in a text is read as a space by llama.cpp, as bytes by megalm"


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's name of the algorithm, `llama` (SentencePiece's BPE) or `gpt2` (byte-level BPE).
        pre: its name of the pre-tokenizer; only of byte-level BPE.
        tokens, kinds, scores: one entry a row of the model's embedding.
        merges: "LEFT RIGHT", the first one first; only of byte-level BPE.
        special: `eos`, `bos`, `unknown` or `padding` -> id.
        adds_bos: whether `bos` is put before a text.
        template: for conversations.
        note: what the user should know; "" if nothing.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    pre: str = "default"
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    adds_bos: bool = False
    template: str | None = None
    note: str = ""


def to_gguf(tokenizer: Tokenizer, rows: int) -> GGUFTokenizer:
    """Describe a tokenizer for llama.cpp.

    Args:
        rows: of the model's embedding; those without a token are marked as unused.

    Raises:
        DataError: llama.cpp has no way to cut texts as this tokenizer does; the message is the reason.
    """
    try:
        if tokenizer.spec == BYTES:
            made = _bytes(rows)
        elif Path(tokenizer.spec).suffix == ".json":
            definition = read_json(Path(tokenizer.spec))
            is_of_pieces = definition["model"].get("byte_fallback") and not definition.get("pre_tokenizer")
            made = (_converted_pieces if is_of_pieces else _byte_level)(tokenizer, rows, definition)
        else:
            made = _sentencepiece(tokenizer, rows)
    except NoEquivalentError as reason:
        raise DataError(
            f"{tokenizer.spec}: llama.cpp would give other ids ({reason}); export the model without --to gguf, and run "
            "it with a program that reads tokenizer.json, such as vLLM"
        ) from None
    made.special["eos"] = tokenizer.eod_id
    made.kinds[tokenizer.eod_id] = CONTROL
    if tokenizer.bos_id is not None:
        made.special["bos"] = tokenizer.bos_id
        made.kinds[tokenizer.bos_id] = CONTROL
    template = own_chat_template(tokenizer)
    return replace(
        made, adds_bos=tokenizer.bos_id is not None, template=None if template is None else template.template
    )


def _sentencepiece(tokenizer: Tokenizer, rows: int) -> GGUFTokenizer:
    converted = SentencePieceModel(tokenizer.spec)
    if converted.is_unigram:
        raise NoEquivalentError(_UNIGRAM)
    converted.to_tokenizer()  # refuses normalization, and pieces that are cut out first
    pieces, special = converted.pieces, {"bos": converted.bos, "unknown": converted.unknown, "padding": converted.pad}
    tokens, kinds = _rows(rows, ((piece.piece, token, piece.type) for token, piece in enumerate(pieces)))
    scores = [*(piece.score for piece in pieces), *(_UNUSED_SCORE for _ in range(len(pieces), rows))]
    return GGUFTokenizer("llama", tokens, kinds, scores=scores, special=_ids(tokens, special.items()), note=_SPACE_NOTE)


def _rows(rows: int, known: Iterable[tuple[str, int, int]]) -> tuple[list[str], list[int]]:
    """Return the tokens and kinds of all rows, given token, id and kind of those that are used."""
    tokens, kinds = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for name, token, kind in known:
        tokens[token], kinds[token] = name, kind
    return tokens, kinds


def _ids(tokens: Sequence[str], special: Iterable[tuple[str, str | None]]) -> dict[str, int]:
    ids = {name: token for token, name in enumerate(tokens)}
    return {name: ids[token] for name, token in special if token in ids}


def _bytes(rows: int) -> GGUFTokenizer:
    """Byte-level BPE whose pre-tokenizer is of no effect: nothing is merged."""
    names = {byte: name for name, byte in byte_alphabet().items()}
    used = [*((name, byte, NORMAL) for byte, name in names.items()), ("<eod>", 256, CONTROL)]
    # llama.cpp wants at least one merge: of two bytes that UTF-8 never has.
    return GGUFTokenizer("gpt2", *_rows(rows, used), pre="gpt-2", merges=[f"{names[254]} {names[255]}"])


def _converted_pieces(tokenizer: Tokenizer, rows: int, definition: dict[str, Any]) -> GGUFTokenizer:
    """SentencePiece's BPE as an export writes it into tokenizer.json, whose `.model` others did not keep.

    llama.cpp merges whatever two pieces give a third, by the third one's score: the merges have to be all of these, and
    in an order of the third pieces.
    """
    model = definition["model"]
    if model.get("type") == "Unigram":
        raise NoEquivalentError(_UNIGRAM)
    if model.get("type") != "BPE" or definition.get("normalizer") or model.get("ignore_merges"):
        raise NoEquivalentError("it is neither a byte-level BPE nor a SentencePiece model's BPE")
    added = {entry["content"]: entry for entry in definition.get("added_tokens") or ()}
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    normal = {name for name in model["vocab"] if name not in added and name not in bytes_}
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    made = [left + right for left, right in pairs]
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(made))}
    every = {
        (name[:cut], name[cut:])
        for name in normal
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    }
    if set(pairs) != every or [ranks[name] for name in made] != sorted(ranks[name] for name in made):
        raise NoEquivalentError("its merges are not those of a SentencePiece model")
    vocabulary, scores = model["vocab"].items(), [_UNUSED_SCORE] * rows
    for name, token in vocabulary:
        scores[token] = -float(ranks.get(name, 0))
    pieces = ((name.replace(" ", SPACE), token, BYTE if name in bytes_ else NORMAL) for name, token in vocabulary)
    unknown = ((name, entry["id"], UNKNOWN) for name, entry in added.items() if name == model.get("unk_token"))
    tokens, kinds = _rows(rows, (*pieces, *_added(definition), *unknown))
    return GGUFTokenizer(
        "llama", tokens, kinds, scores=scores, special=_ids(tokens, _special(tokenizer)), note=_SPACE_NOTE
    )


def _added(definition: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    for entry in definition.get("added_tokens") or ():
        yield entry["content"], entry["id"], CONTROL if entry["special"] else USER_DEFINED


def _byte_level(tokenizer: Tokenizer, rows: int, definition: dict[str, Any]) -> GGUFTokenizer:
    model = definition["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise NoEquivalentError("it is no byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise NoEquivalentError(f"its {key} is {model[key]!r}")
    steps = tuple(_steps(definition.get("pre_tokenizer") or {}))
    if steps not in _PRE_TOKENIZERS:
        raise NoEquivalentError("its pre-tokenizer is none of GPT-2, Llama 3, Qwen 2 and SmolLM")
    pre, takes_words = _PRE_TOKENIZERS[steps]
    if bool(model.get("ignore_merges")) != takes_words:
        raise NoEquivalentError(
            f"its ignore_merges is {str(not takes_words).lower()}, with this pre-tokenizer llama.cpp's is "
            f"{str(takes_words).lower()}"
        )
    note = _normalization(definition.get("normalizer"))
    words = ((name, token, NORMAL) for name, token in model["vocab"].items())
    tokens, kinds = _rows(rows, (*words, *_added(definition)))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = _ids(tokens, _special(tokenizer))
    return GGUFTokenizer("gpt2", tokens, kinds, pre=pre, merges=merges, special=special, note=note)


def _steps(definition: dict[str, Any]) -> Iterator[str]:
    kind = definition.get("type")
    if kind == "Sequence":
        for step in definition["pretokenizers"]:
            yield from _steps(step)
    elif kind == "Split" and definition.get("behavior") == "Isolated" and not definition.get("invert"):
        yield definition["pattern"].get("Regex", "another")
    elif kind == "Digits" and definition.get("individual_digits"):
        yield "digits"
    elif kind == "ByteLevel" and not definition.get("add_prefix_space"):
        if definition.get("use_regex", True):
            yield "gpt2"
    else:
        yield str(kind)


def _normalization(normalizer: dict[str, Any] | None) -> str:
    if normalizer is None or (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")):
        return ""
    if normalizer.get("type") == "NFC":
        return "llama.cpp does not compose characters as the tokenizer's NFC does: other texts than NFC get other ids"
    raise NoEquivalentError(f"its normalizer is {normalizer.get('type')}")


def _special(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    config = read_tokenizer_config(tokenizer)
    for name, key in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        if text := token_name(config.get(key)):
            yield name, text
