"""Exports a run's tokenizer as the files that `AutoTokenizer` loads, and verifies that it gives the same ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megalm.data.tokenizers.chat_template import TEMPLATE_FILE, ChatTemplate, load_chat_template
from megalm.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer, byte_alphabet
from megalm.data.tokenizers.tokenizer import BYTES, TOKENIZER_CONFIG, Tokenizer, token_name
from megalm.errors import DataError
from megalm.huggingface.sentencepiece_to_tokenizer_json import NoEquivalentError, SentencePieceModel
from megalm.utils.atomic_files import read_json, write_bytes_atomically, write_json

TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
# What an import keeps beside the tokenizer, and an export amends: special tokens, chat template, sampling defaults.
BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, TEMPLATE_FILE, GENERATION_CONFIG)
SENTENCEPIECE = "sentencepiece.model"
# The name under which transformers' slow tokenizers and llama.cpp's converter look for the same file.
TOKENIZER_MODEL = "tokenizer.model"

PAD = "<|pad|>"
# Keys of a tokenizer_config.json that hold for another class than PreTrainedTokenizerFast, or would change ids.
_OF_ANOTHER_CLASS_WORDS = (
    "add_bos_token add_eos_token add_prefix_space auto_map backend is_local legacy local_files_only name_or_path "
    "sp_model_kwargs split_special_tokens tokenizer_file use_default_system_prompt"
)
_OF_ANOTHER_CLASS = frozenset(_OF_ANOTHER_CLASS_WORDS.split())
_EOD = "<eod>"  # the bytes tokenizer has no names
_TOKENS_PER_TEXT = 500
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
    """The result of a tokenizer's export.

    Attributes:
        note: a line for the user: the texts that verify it, or the reason for its absence and what to use instead.
        files: the files written to the exported folder.
        special: key of tokenizer_config.json, such as `pad_token` -> its id, as far as the tokenizer has the token.
        has_chat_template: whether conversations can be rendered with it.
    """

    note: str
    files: tuple[str, ...]
    special: dict[str, int] = field(default_factory=dict)
    has_chat_template: bool = False


@dataclass(frozen=True)
class _Converted:
    tokenizer: tokenizers.Tokenizer
    special: dict[str, str | None]  # key of tokenizer_config.json -> token
    pieces: SentencePieceModel | None = None


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, longest: int, rows: int, family: str, template: ChatTemplate | None = None
) -> ExportedTokenizer:
    """Write tokenizer.json and tokenizer_config.json into `folder`, and a SentencePiece model beside them.

    What a tokenizer_config.json beside the run's tokenizer says stays, unless it would give other ids.

    Args:
        tokenizer: the run's tokenizer.
        longest: the model's maximum sequence length.
        rows: the rows of the model's embedding: one without a token becomes the padding token, where there is none.
        family: the `model_type` of config.json.
        template: for conversations; None: the one of the tokenizer's own folder, if any.

    Raises:
        DataError: the tokenizer has no end-of-document token.
    """
    try:
        made = _convert(tokenizer)
        ties, texts = _verify(tokenizer, made)
    except NoEquivalentError as reason:
        note = f"no {TOKENIZER}: {reason}"
        if not _is_sentencepiece(tokenizer):
            return ExportedTokenizer(note, ())
        shutil.copyfile(tokenizer.spec, folder / SENTENCEPIECE)
        note = f"{note}; load {SENTENCEPIECE} with the sentencepiece library"
        if tokenizer.bos_id is None:
            return ExportedTokenizer(note, (SENTENCEPIECE,))
        note += f" and put {tokenizer.bos_token} (id {tokenizer.bos_id}) before a text"
        return ExportedTokenizer(note, (SENTENCEPIECE,), {"bos_token": tokenizer.bos_id})
    files = [TOKENIZER, TOKENIZER_CONFIG]
    if made.pieces is not None:
        # llama.cpp's converter takes a tokenizer.model for BPE, and only for Llama does it ask whether a space comes
        # before a text: it would make other ids of any other without a word.
        is_converted = family == "llama" and not made.pieces.is_unigram
        files.append(TOKENIZER_MODEL if is_converted else SENTENCEPIECE)
        shutil.copyfile(tokenizer.spec, folder / files[-1])
    special = {**made.special, "eos_token": made.tokenizer.id_to_token(tokenizer.eod_id)}
    if tokenizer.bos_id is not None:
        special["bos_token"] = made.tokenizer.id_to_token(tokenizer.bos_id)
    special["pad_token"] = special["pad_token"] or _padding(made, rows)
    made.tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special.values() if name is not None]
    )
    written = made.tokenizer if tokenizer.bos_id is None else _putting_before_texts(made.tokenizer, tokenizer.bos_id)
    # The library's own `save` raises a bare Exception for a full disk as for everything else.
    write_bytes_atomically(folder / TOKENIZER, written.to_str(pretty=True).encode())
    config = {
        **{key: value for key, value in read_tokenizer_config(tokenizer).items() if key not in _OF_ANOTHER_CLASS},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        # Without it transformers 4 hands out token_type_ids, which no model here takes and GPT-2 adds up in silence.
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
        "add_bos_token": tokenizer.bos_id is not None,
        "add_prefix_space": _adds_prefix_space(made.tokenizer),  # converters take true where it is missing
        "clean_up_tokenization_spaces": False,
    }
    template = template or own_chat_template(tokenizer)
    if template is not None:
        config["chat_template"] = template.template  # transformers before 4.52 reads no other place
        write_bytes_atomically(folder / TEMPLATE_FILE, template.template.encode())
        files.append(TEMPLATE_FILE)
    write_json(folder / TOKENIZER_CONFIG, config)
    unended = template is not None and _leaves_turns_open(template, special)
    begin = f", and {special['bos_token']} before a text" if tokenizer.bos_id is not None else ""
    note = f"{TOKENIZER} gives megalm's ids on {texts - ties} of {texts} test texts{begin}"
    if made.pieces is not None and made.pieces.is_unigram:
        note += (
            "; if two segmentations of a text are equally likely, it may choose the other one (it adds scores in 64 "
            f"bits, SentencePiece in 32): {SENTENCEPIECE} always gives megalm's ids"
        )
    if unended:
        note += (
            f"; the chat template ends the assistant's turns without {special['eos_token']}: a model that is "
            "fine-tuned with it does not learn to stop, unless another token ends them and is given as its eos_token"
        )
    vocabulary = made.tokenizer.get_vocab(with_added_tokens=True)
    ids = {key: vocabulary[name] for key, name in special.items() if name is not None}
    return ExportedTokenizer(note, tuple(files), ids, template is not None)


def read_tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the files beside a tokenizer.json say of it; {} for other tokenizers."""
    if Path(tokenizer.spec).suffix != ".json":
        return {}
    return tokenizer.beside(SPECIAL_TOKENS_MAP) | tokenizer.beside(TOKENIZER_CONFIG)


def own_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the tokenizer's folder; None if there is none, or it cannot be compiled."""
    try:
        return load_chat_template(None, tokenizer.spec)
    except DataError:
        return None


def _leaves_turns_open(template: ChatTemplate, special: dict[str, str | None]) -> bool:
    """Whether what is trained of a conversation does not end with the token that ends a document."""
    names = {key: name for key, name in special.items() if name is not None}
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text, trained = ChatTemplate(template.template, names).render(json.dumps({"messages": messages, "tools": None}))
    except DataError:  # a template for other messages than these
        return False
    return bool(trained) and not text[slice(*trained[-1])].rstrip().endswith(names["eos_token"])


def _padding(made: _Converted, rows: int) -> str | None:
    """A token that no text gives, for padding; never the one that ends a document.

    Whoever pads with that one, and does not train on padding, never teaches a model to stop.
    """
    special = [token.content for token in made.tokenizer.get_added_tokens_decoder().values() if token.special]
    for word in ("pad", "reserved", "unused", "extra_id"):
        if found := next((name for name in special if word in name.lower()), None):
            return found
    if made.pieces is not None:  # bytes stand for unknown characters, so nothing gives this one
        return made.pieces.unknown
    last = max(made.tokenizer.get_vocab(with_added_tokens=True).values())
    is_dense = last + 1 == made.tokenizer.get_vocab_size(with_added_tokens=True)
    return PAD if is_dense and last + 1 < rows else None


def _adds_prefix_space(tokenizer: tokenizers.Tokenizer) -> bool:
    definition = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    steps = [definition, *definition.get("pretokenizers", ())]
    return any(step.get("add_prefix_space", False) for step in steps)


def _putting_before_texts(made: tokenizers.Tokenizer, token: int) -> tokenizers.Tokenizer:
    """With a post-processor that puts the token there: transformers 5 goes by that alone, not by add_bos_token."""
    name, definition = made.id_to_token(token), json.loads(made.to_str())
    single, second = (
        [{"SpecialToken": {"id": name, "type_id": number}}, {"Sequence": {"id": text, "type_id": number}}]
        for number, text in enumerate("AB")
    )
    begin = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
    before = definition["post_processor"]
    definition["post_processor"] = {"type": "Sequence", "processors": [before, begin]} if before else begin
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def added_around(tokenizer: Tokenizer) -> list[str]:
    """The tokens that a tokenizer.json adds around a text, and megalm does not: all but `bos_id`."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    before, after = tokenizer.added_around()
    names = {token: name for name, token in tokenizer.vocabulary().items()}
    return [names[token] for token in (*(before if before != [tokenizer.bos_id] else ()), *after)]


def _is_sentencepiece(tokenizer: Tokenizer) -> bool:
    return tokenizer.name.startswith("sentencepiece:")


def _convert(tokenizer: Tokenizer) -> _Converted:
    if tokenizer.spec == BYTES:
        return _Converted(_bytes_tokenizer(tokenizer.eod_id), {"bos_token": None, "unk_token": None, "pad_token": None})
    if _is_sentencepiece(tokenizer):
        model = SentencePieceModel(tokenizer.spec)
        special = {"bos_token": model.bos, "unk_token": model.unknown, "pad_token": model.pad}
        return _Converted(model.to_tokenizer(), special, model)
    return _Converted(*_plain_definition(tokenizer))


def _bytes_tokenizer(eod_id: int) -> tokenizers.Tokenizer:
    """Ids are byte values; GPT-2's byte alphabet names unprintable bytes by the characters from 256 on."""
    made = tokenizers.Tokenizer(models.BPE(vocab={**byte_alphabet(), _EOD: eod_id}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _plain_definition(tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """A tokenizer.json without truncation, padding and added tokens, which megalm does not apply."""
    definition = {**read_json(Path(tokenizer.spec)), "truncation": None, "padding": None}
    if (definition.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        definition["post_processor"] = None  # it adds tokens that training need not have had
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    config = read_tokenizer_config(tokenizer)
    special = {key: _known(made, config.get(key)) for key in ("bos_token", "unk_token", "pad_token")}
    special["unk_token"] = special["unk_token"] or _known(made, definition.get("model", {}).get("unk_token"))
    return made, special


def _known(tokenizer: tokenizers.Tokenizer, token: Any) -> str | None:
    name = token_name(token)
    return name if name is not None and tokenizer.token_to_id(name) is not None else None


def _verify(original: Tokenizer, made: _Converted) -> tuple[int, int]:
    """Compare the tokenizers; returns the numbers of equally likely segmentations and of texts.

    Raises:
        NoEquivalentError: ids or decoded text differ.
    """
    converted = made.tokenizer
    converted.encode_special_tokens = True
    texts = list(_texts(original, converted))
    ties = 0
    for text, ids in zip(texts, original.encode_batch(texts), strict=True):
        row = ids.tolist()
        found = converted.encode(text, add_special_tokens=False).ids
        if converted.decode(found) != original.decode(row):
            raise NoEquivalentError(f"it decodes {text[:40]!r} to another text")
        if found != row:
            if made.pieces is None or not made.pieces.are_equally_likely(found, row):
                raise NoEquivalentError(f"it encodes {text[:40]!r} to other ids")
            ties += 1
    return ties, len(texts)


def _texts(original: Tokenizer, converted: tokenizers.Tokenizer) -> Iterator[str]:
    """Hard cases, the names of all special tokens, and the whole vocabulary in several texts."""
    yield from _TEXTS
    yield " ".join(sorted(token.content for token in converted.get_added_tokens_decoder().values()))
    for start in range(0, original.vocab_size, _TOKENS_PER_TEXT):
        known = range(start, min(start + _TOKENS_PER_TEXT, original.vocab_size))
        yield original.decode([token for token in known if converted.id_to_token(token) is not None])
