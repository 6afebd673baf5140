"""Imports a model with other tokens than its own: rows of tokens that stay are copied by what they stand for.

V: rows of the imported model's token embedding and head, V_old: those of the model that is imported.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalm.checkpoint.shard_spec import FragmentKind
from megalm.data.tokenizers.tokenizer import AUTO, BYTE, SPECIAL, TEXT, TokenContent, Tokenizer, load_tokenizer
from megalm.errors import DataError
from megalm.huggingface.export_tokenizer import (
    BESIDE,
    GENERATION_CONFIG,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_MODEL,
    write_tokenizer,
)
from megalm.huggingface.pretrained_folder import ModelSource
from megalm.model.model_config import ModelConfig
from megalm.utils.atomic_files import read_json, write_json
from megalm.utils.did_you_mean import did_you_mean

COPY = "copy:"
MEAN, ZERO = -1, -2  # in place of an old row
# A model's rows stay a multiple of what the old ones were, up to this: tensor groups divide them.
_MULTIPLE = 128
_WITH_ROWS = ("embedding.tokens.weight", "head.weight")
_NAMED = 3


@dataclass(frozen=True)
class NewRows:
    """How the rows of new tokens begin: "mean" of all rows with a token, "zero", or "copy:TOKEN"."""

    rule: str = "mean"

    def __post_init__(self) -> None:
        if self.rule not in ("mean", "zero") and not self.rule.removeprefix(COPY) != self.rule:
            raise DataError(f"--new-rows {self.rule}: is unknown; choose mean, zero or copy:TOKEN")

    def source(self, old: Tokenizer) -> int:
        """Return the old row, or MEAN or ZERO. Raises DataError if the old tokenizer has no such token."""
        if not self.rule.startswith(COPY):
            return MEAN if self.rule == "mean" else ZERO
        name, vocabulary = self.rule.removeprefix(COPY), old.vocabulary()
        if name in vocabulary:
            return vocabulary[name]
        contents = old.token_contents().items()
        same = [token for token, (_, content) in contents if content == name.encode()]
        if not same:
            raise DataError(f"--new-rows {self.rule}: {old.name} has no such token{did_you_mean(name, vocabulary)}")
        return min(same)


@dataclass(frozen=True)
class ChangedVocabulary(ModelSource):
    """A model as `HuggingFaceFolder` has it, with the rows of another tokenizer.

    Attributes:
        rows: [V] the old row of each row, or MEAN or ZERO.
        known: [V_old] whether an old row has a token.
        new: ids of the tokens without an old row; `dropped`: number of old tokens without a new row.
    """

    source: ModelSource
    folder: Path
    config: dict[str, Any]
    shape: ModelConfig
    rows: npt.NDArray[np.int64]
    known: npt.NDArray[np.bool_]
    new: tuple[int, ...]
    dropped: int
    rule: NewRows

    def read(self, name: str, kind: FragmentKind = "master") -> Tensor:
        """See `ModelSource.read`."""
        found = self.source.read(name, kind)
        if name not in _WITH_ROWS:
            return found
        rows = torch.from_numpy(self.rows)
        changed = found[rows.clamp(min=0)]
        changed[rows == MEAN] = found[torch.from_numpy(self.known)].double().mean(0).float()
        changed[rows == ZERO] = 0.0
        return changed

    def note(self, tokenizer: Tokenizer) -> str:
        """Return what became of the rows, as a line."""
        count = int(tokenizer.known_ids().sum())
        contents = tokenizer.token_contents()
        names = [contents[token].content.decode(errors="replace") for token in self.new[:_NAMED]]
        named = f" ({', '.join(map(repr, names))}{', ...' if len(self.new) > _NAMED else ''})" if names else ""
        began = f"; new ones begin as {self.rule.rule}" if names else ""
        return (
            f"of {count:,} tokens {count - len(self.new):,} have the rows of the model's, {len(self.new):,} "
            f"({len(self.new) / max(1, count):.2%}) are new{named}; {self.dropped:,} of the model's are dropped{began}"
        )


def change_vocabulary(source: ModelSource, old: Tokenizer, new: Tokenizer, rule: NewRows) -> ChangedVocabulary:
    """Match the tokens of two tokenizers by what they stand for.

    Raises:
        DataError: `rule` names no token of the old tokenizer.
    """
    old_rows = source.shape.vocab_size
    ours, theirs = new.token_contents(), {t: c for t, c in old.token_contents().items() if t < old_rows}
    first: dict[TokenContent, int] = {}
    for token in sorted(theirs):
        first.setdefault(theirs[token], token)
    known = np.zeros(old_rows, dtype=np.bool_)
    known[list(theirs)] = True
    matched = {token: _match(token, content, theirs, first) for token, content in ours.items()}
    kept = all(matched.get(token) == token for token in theirs)
    size = new.vocab_size
    unit = math.gcd(old_rows, _MULTIPLE)
    size = max(old_rows, size) if kept and size <= old_rows else -(-size // unit) * unit
    rows = np.full(size, MEAN, dtype=np.int64)  # also of rows without a token: zero could be likelier than any
    if kept:
        rows[:old_rows] = np.arange(old_rows)
    begin = rule.source(old)
    for token, row in matched.items():
        rows[token] = begin if row is None else row
    used = {row for row in matched.values() if row is not None}
    missing = tuple(sorted(token for token, row in matched.items() if row is None))
    shape, dropped = replace(source.shape, vocab_size=size), len(theirs.keys() - used)
    return ChangedVocabulary(source, source.folder, source.config, shape, rows, known, missing, dropped, rule)


def _match(
    token: int, content: TokenContent, theirs: dict[int, TokenContent], first: dict[TokenContent, int]
) -> int | None:
    """Return the old token of this content: the same id if that has it, else the first; None if there is none."""
    if theirs.get(token) == content:
        return token
    kinds = {TEXT: (TEXT, SPECIAL), SPECIAL: (SPECIAL, TEXT), BYTE: (BYTE,)}[content.kind]
    if content.kind != SPECIAL and len(content.content) == 1:  # a character here may be a byte there
        kinds = (content.kind, BYTE if content.kind == TEXT else TEXT)
    found = (first.get(TokenContent(kind, content.content)) for kind in kinds)
    return next((row for row in found if row is not None), None)


def read_tokens(path: Path) -> list[dict[str, Any]]:
    """Read tokens to add: a line each, or a JSON list of texts or of objects with `content` and perhaps `special`.

    Raises:
        DataError: the file cannot be read, is empty, or names a token twice.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--add-tokens {path}: cannot be read ({error}); give a text file or a JSON list") from None
    if path.suffix == ".json":
        listed = read_json(path)
        if not isinstance(listed, list):
            raise DataError(f"--add-tokens {path}: is no JSON list; write the tokens as a list of texts")
    else:
        listed = [line for line in content.removeprefix("\ufeff").splitlines() if line]
    tokens = [{"content": entry} if isinstance(entry, str) else entry for entry in listed]
    names: set[str] = set()
    for token in tokens:
        valid = isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]
        if not valid or not isinstance(token.get("special", False), bool) or token.keys() - {"content", "special"}:
            raise DataError(
                f"--add-tokens {path}: {json.dumps(token)[:80]} is no token; give a text, or an object with content "
                "and special (true or false)"
            )
        if token["content"] in names:
            raise DataError(f"--add-tokens {path}: {token['content']!r} is there twice; name each token once")
        names.add(token["content"])
    if not tokens:
        raise DataError(f"--add-tokens {path}: has no token; write one a line")
    return tokens


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[dict[str, Any]], folder: Path, longest: int) -> Path:
    """Write the tokenizer with more tokens as `folder`/tokenizer.json, with what is beside it; return its path.

    Args:
        longest: the model's maximum sequence length, for a tokenizer that becomes a tokenizer.json here.

    Raises:
        DataError: it has such a token, or cannot have it: its id or its text would not come back.
    """
    own = Path(tokenizer.spec)
    for path in (own, *map(own.with_name, BESIDE)):
        if path.is_file() and path.suffix != ".model":
            shutil.copyfile(path, folder / (TOKENIZER if path == own else path.name))
    if (sampling := folder / GENERATION_CONFIG).is_file():
        defaults = read_json(sampling)
        defaults.pop("suppress_tokens", None)  # rows without a token, of which new tokens take some
        write_json(sampling, defaults)
    if not (folder / TOKENIZER).is_file():
        made = write_tokenizer(tokenizer, folder, longest, tokenizer.vocab_size, family="")
        if not (folder / TOKENIZER).is_file():
            raise DataError(
                f"{own}: tokens can be added to a tokenizer.json only, and this becomes {made.note}; give its "
                "tokenizer.json with --tokenizer"
            )
    names, contents = tokenizer.vocabulary(), set(tokenizer.token_contents().values())
    for token in tokens:
        text = token["content"]
        if text in names or TokenContent(TEXT, text.encode()) in contents:
            raise DataError(f"--add-tokens: {text!r} is a token of {tokenizer.name} already; omit it")
    definition = read_json(folder / TOKENIZER)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = [{"id": tokenizer.vocab_size + place, **plain, **token} for place, token in enumerate(tokens)]
    definition["added_tokens"] = [*(definition.get("added_tokens") or ()), *added]
    write_json(folder / TOKENIZER, definition)
    _check_added(load_tokenizer(folder / TOKENIZER), tokenizer, added)
    return folder / TOKENIZER


def _check_added(made: Tokenizer, before: Tokenizer, added: Sequence[dict[str, Any]]) -> None:
    """Raises DataError if a token has another id than given, or its text does not become it and come back."""
    vocabulary = made.vocabulary()
    for token in added:
        text = token["content"]
        if vocabulary.get(text) != token["id"]:
            raise DataError(
                f"--add-tokens: {text!r} gets id {vocabulary.get(text)} and not {token['id']}, because ids of "
                f"{before.name} have gaps; number its tokens without gaps"
            )
        if token["special"]:
            continue
        (ids,) = made.encode_batch([f"a{text}b"])
        if token["id"] not in ids or text not in made.decode(ids.tolist()):
            raise DataError(
                f"--add-tokens: {text!r} becomes {made.decode(ids.tolist())!r} within a and b, because the decoder of "
                f"{before.name} reads it otherwise; choose another text"
            )


def find_tokenizer(folder: Path) -> Path:
    """The file itself, or the folder's tokenizer file; megalm's own SentencePiece export comes first."""
    if folder.is_file():
        return folder
    if not folder.exists():
        raise DataError(f"{folder}: no such tokenizer; give a tokenizer.json, a .model file, or their folder")
    names = (SENTENCEPIECE, TOKENIZER, TOKENIZER_MODEL)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder} has none of {', '.join(names)}; save the tokenizer with transformers "
        "(AutoTokenizer.from_pretrained(...).save_pretrained), or name a file with --tokenizer"
    )


def choose_vocabulary(
    source: ModelSource, named: Path | None, tokens: Path | None, rule: NewRows | None, scratch: Path
) -> tuple[ModelSource, Tokenizer, tuple[str, ...]]:
    """Return the model, with other rows if its tokenizer changes; the tokenizer; and what to say of the rows.

    Args:
        named: the tokenizer to import with; None: the model's own.
        tokens: the file with tokens to add.
        rule: how new rows begin.
        scratch: folder for a tokenizer with added tokens.

    Raises:
        DataError: there is no tokenizer, or `tokens` and `rule` cannot be met.
    """
    try:
        own: Path | None = find_tokenizer(source.folder)
    except DataError:
        if named is None:
            raise
        own = None  # the named one is the model's then
    path = find_tokenizer(named) if named is not None else own
    assert path is not None
    new = load_tokenizer(path, bos_token=AUTO)
    old = new if own is None else load_tokenizer(own, bos_token=AUTO)
    if old.vocab_size > source.shape.vocab_size:
        return source, new, ()  # not the model's tokenizer: refused by its size
    notes: list[str] = []
    if old.bos_id != new.bos_id is None:
        notes.append(
            f"the model's own tokenizer puts {old.bos_token} before a text, {new.name} puts nothing; where you build "
            "data, --bos-token TOKEN does"
        )
    if tokens is not None:
        ended, begun = new.eod_id, new.bos_id
        plain = load_tokenizer(add_tokens(new, read_tokens(tokens), scratch, source.shape.max_position_embeddings))
        new = plain.with_eod(ended).with_bos(begun)  # whatever the added ones are called
        if plain.eod_id != ended:
            name = new.eod_token
            notes.append(f"documents end with {name} as before; name it where you build data (--eod-token {name!r})")
    changed = change_vocabulary(source, old, new, rule or NewRows())
    if not changed.new and not changed.dropped and np.array_equal(changed.rows, np.arange(source.shape.vocab_size)):
        if rule is not None:
            raise DataError(
                f"--new-rows {rule.rule}: no token is new; omit it, or name tokens (--add-tokens) or another "
                "tokenizer (--tokenizer)"
            )
        return source, new, tuple(notes)
    return changed, new, (changed.note(new), *notes)
