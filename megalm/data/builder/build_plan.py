"""A build's options, and its plan: the input split into independent units of work, done in any order.

The units depend on the input and the options only, so an interrupted build can resume with another number of workers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from megalm.data.builder.decontamination import OverlapOptions
from megalm.data.builder.dedup import Dedup, check_threshold
from megalm.data.readers.document_reader import TABLE, LossPolicy, OnError, Span, row_groups
from megalm.data.readers.formats import format_of
from megalm.data.readers.input_files import InputFile
from megalm.data.readers.records import BLOCK_BYTES, ReadOptions, RecordLayout, without_end
from megalm.data.tokenizers.chat_template import ChatTemplate
from megalm.errors import DataError
from megalm.utils.atomic_files import json_hash

PLAN_VERSION = 3
UNITS_OF_A_SHARD = 4  # minimum, if the input can be cut
SMALLEST_UNIT, LARGEST_UNIT, WANTED_UNITS = 4 << 20, 128 << 20, 1000
PACKED_TO_TEXT = 4  # estimated text bytes per byte of a packed file
SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Filters:
    """Bounds that a document must meet; None disables a bound.

    Attributes:
        min_characters, max_characters: length of the text.
        min_letter_share: share of letters among the characters that are not whitespace.
        max_repeated_line_share: share of characters in lines that occurred before in the same document.
        max_word_length: mean characters per word; text that is neither prose nor code (e.g. base64) has long words.

    Raises:
        DataError: a bound outside its valid range, or a minimum above its maximum.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_letter_share: float | None = None
    max_repeated_line_share: float | None = None
    max_word_length: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_letter_share", "max_repeated_line_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise DataError(f"--{name.replace('_', '-')} {share:g}: give a share from 0 to 1, such as 0.5")
        for name in ("min_characters", "max_characters", "max_word_length"):
            bound = getattr(self, name)
            if bound is not None and not 0 < bound < float("inf"):
                raise DataError(f"--{name.replace('_', '-')} {bound:g}: give a number above 0")
        if (self.min_characters or 0) > (self.max_characters or float("inf")):
            raise DataError(
                f"--min-characters {self.min_characters} is more than --max-characters {self.max_characters}, so "
                "no document can pass; change one of them"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The configured bounds, in the order in which they are checked."""
        return tuple(name for name, bound in vars(self).items() if bound is not None)

    def removes(self, text: str) -> str | None:
        """Return the first bound that the text violates, or None."""
        for name in self.names:
            bound, value = getattr(self, name), MEASURES[name.partition("_")[2]](text)
            if value < bound if name.startswith("min_") else value > bound:
                return name
        return None


def letter_share(text: str) -> float:
    dense = "".join(text.split())
    return sum(map(str.isalpha, dense)) / max(1, len(dense))


def repeated_line_share(text: str) -> float:
    counts = Counter(line.strip() for line in text.splitlines())
    repeated = sum(len(line) * (times - 1) for line, times in counts.items())
    return repeated / max(1, sum(len(line) * times for line, times in counts.items()))


def mean_word_length(text: str) -> float:
    words = text.split()
    return sum(map(len, words)) / max(1, len(words))


MEASURES: dict[str, Callable[[str], float]] = {
    "characters": len,
    "letter_share": letter_share,
    "repeated_line_share": repeated_line_share,
    "word_length": mean_word_length,
}


@dataclass(frozen=True)
class BuildOptions:
    """The options that determine a dataset, besides its input and its tokenizer.

    Attributes:
        append_eod: end every document with the tokenizer's end-of-document token.
        on_error: "fail" on unreadable records, or "skip" and count them.
        empty_documents: "skip" leaves documents without text out and counts them; or "fail".
        max_loss: the largest share of the input that "skip" may leave out, see `Losses.check`. It does not change the
            dataset, so it is no part of `to_json`.
        minhash_threshold: share of equal MinHash values from which documents count as near copies.
        split: weights of PREFIX-train, PREFIX-validation and PREFIX-test; empty: one dataset.
        shard: (k, n): build only the k-th of n parts of the input, from 0, about equal in bytes. With "minhash" a shard
            keeps its near copies until the merge, because removal depends on the shards before it.
        unit_bytes: text bytes of a unit of work; by default derived from the input size.
        chat: renders the messages that `read.messages_key` names; PREFIX.trained then tells which tokens are trained.
        overlap: the evaluation sets whose words no document may share.
    """

    append_eod: bool = True
    on_error: OnError = "fail"
    empty_documents: OnError = "skip"
    max_loss: float | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    filters: Filters = field(default_factory=Filters)
    dedup: Dedup = "none"
    minhash_threshold: float = 0.8
    split: tuple[float, ...] = ()
    shard: tuple[int, int] = (0, 1)
    unit_bytes: int | None = None
    chat: ChatTemplate | None = None
    overlap: OverlapOptions | None = None

    def __post_init__(self) -> None:
        if (self.chat is None) != (not self.read.messages_key):
            raise DataError("messages need a chat template, and a template messages; name the key with --messages-key")
        if len(self.split) == 1 or len(self.split) > len(SPLIT_NAMES):
            raise DataError(f"--split {self.split}: give two or three weights, such as 95,5 or 90,5,5")
        shard, shards = self.shard
        if not 0 <= shard < shards:
            raise DataError(f"--shard {shard}/{shards}: shards are numbered from 0 to {shards - 1}")
        if shards > 1 and self.split:
            raise DataError(
                f"--split and --shard {shard}/{shards}: each shard would be split separately; "
                "merge the shards and split in training (data.split)"
            )
        check_threshold(self.minhash_threshold)
        if self.chat is not None and self.overlap is not None and self.overlap.action == "cut":
            raise DataError(
                "--overlap-action cut and --messages-key: a part of a conversation is none; omit --overlap-action"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the options for PREFIX.json: only those that determine the dataset's bytes."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        facts.pop("unit_bytes")
        facts.pop("max_loss")
        # Options that did not always exist are recorded if they are used: datasets from before stay recognizable.
        if self.empty_documents == "skip":
            facts.pop("empty_documents")
        if not self.read.kind:
            facts["read"].pop("kind")
        if self.chat is None:
            facts.pop("chat")
            facts["read"].pop("messages_key")
        facts["read"].pop("every_text")  # of evaluation sets only
        if self.overlap is None:
            facts.pop("overlap")
        return facts

    @property
    def loss_policy(self) -> LossPolicy:
        return LossPolicy(self.on_error, self.empty_documents, self.max_loss)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> BuildOptions:
        """Restore options from `to_json`; ignores other keys."""
        import pydantic  # imported here so that workers do not load it

        return pydantic.TypeAdapter(cls).validate_python(facts)

    def to_words(self) -> list[str]:
        """Return the non-default options as arguments of build_dataset.py."""
        words = [] if self.append_eod else ["--no-append-eod"]
        for (name, value), usual in zip(self._arguments(), BuildOptions()._arguments(), strict=True):
            if value != usual[1]:
                words += [f"--{name.replace('_', '-')}", str(value)]
        for path in self.overlap.files if self.overlap is not None else ():
            words += ["--exclude-overlap", path]
        return words

    def _arguments(self) -> list[tuple[str, object]]:
        overlap = self.overlap or OverlapOptions(files=("",))
        return [
            ("text_key", self.read.text_key),
            ("columns", ",".join(self.read.columns)),
            ("messages_key", self.read.messages_key),
            ("txt_documents", self.read.documents),
            ("max_document_mb", self.read.largest_bytes >> 20),
            ("input_kind", self.read.kind),
            ("on_error", self.on_error),
            ("empty_documents", self.empty_documents),
            ("max_loss", None if self.max_loss is None else f"{100 * self.max_loss:g}%"),
            ("dedup", self.dedup),
            ("minhash_threshold", self.minhash_threshold),
            ("split", ",".join(f"{weight:g}" for weight in self.split)),
            *vars(self.filters).items(),
            ("overlap_tokens", overlap.tokens),
            ("overlap_action", overlap.action),
            ("overlap_key", ",".join(overlap.keys)),
        ]

    def output_prefixes(self, prefix: str | Path) -> list[str]:
        names = SPLIT_NAMES[: len(self.split)]
        return [f"{prefix}-{name}" for name in names] or [str(prefix)]


@dataclass(frozen=True)
class Group:
    """Spans that a worker reads as one unit; or, with `stream`, a file that is cut into units while it is read."""

    spans: tuple[Span, ...]
    stream: bool
    weight: int  # estimated bytes of text


@dataclass(frozen=True)
class Plan:
    files: tuple[InputFile, ...]
    groups: tuple[Group, ...]
    unit_bytes: int
    identity: str  # equal for builds that share their units

    @property
    def weight(self) -> int:
        return sum(group.weight for group in self.groups)

    @property
    def streamed_bytes(self) -> int:
        """Bytes on disk of the files that this process reads, and not the workers."""
        return sum(span.file.size for group in self.groups if group.stream for span in group.spans)

    @property
    def most_units(self) -> int:
        """Maximum number of units, as far as known before streams are read."""
        return 1 << 30 if any(group.stream for group in self.groups) else len(self.groups)


def make_plan(files: Sequence[InputFile], options: BuildOptions, tokenizer: Mapping[str, Any]) -> Plan:
    """Split the input into units.

    Args:
        tokenizer: as in `DatasetMetadata`.

    Raises:
        DataError: a file cannot be read.
    """
    total = sum(_text_bytes(file) for file in files)
    unit_bytes = options.unit_bytes or min(LARGEST_UNIT, max(SMALLEST_UNIT, total // WANTED_UNITS))
    shard, shards = options.shard
    if shards > 1:  # small inputs are distributed too
        unit_bytes = max(1, min(unit_bytes, total // (shards * UNITS_OF_A_SHARD)))
    whole = list(_groups(_pieces(files, options, unit_bytes), unit_bytes))
    groups = _take_shard(whole, shard, shards)
    if whole and not groups:
        raise DataError(
            f"--shard {shard}/{shards} has nothing to read: the input has only {len(whole)} separate parts, "
            "of unequal size; use fewer shards"
        )
    facts = {
        "version": PLAN_VERSION,
        "files": [file.facts() for file in files],
        "options": options.to_json() | {"unit_bytes": unit_bytes},
        "tokenizer": tokenizer["fingerprint"],
        "eod_id": tokenizer["eod_id"],
        # Without one, a build that an earlier version has begun continues.
        **({} if tokenizer["bos_id"] is None else {"bos_id": tokenizer["bos_id"]}),
    }
    used = {span.file.path for group in groups for span in group.spans}
    return Plan(tuple(file for file in files if file.path in used), tuple(groups), unit_bytes, json_hash(facts))


def _text_bytes(file: InputFile) -> int:
    return file.size * PACKED_TO_TEXT if file.packing or file.kind == TABLE else file.size


def _pieces(files: Iterable[InputFile], options: BuildOptions, unit_bytes: int) -> Iterable[Group]:
    """Yield the smallest pieces that can be read independently."""
    for file in files:
        size = _text_bytes(file)
        if file.kind == TABLE:
            yield from _table_pieces(file, unit_bytes)
        elif file.is_stdin or (size > unit_bytes and (file.packing or file.kind == ".json")):
            yield Group((Span(file),), stream=True, weight=size)
        elif size > unit_bytes and format_of(file.kind, options.read).first_end(bytearray(b"\n\n")):
            bounds = _bounds(file, options.read, unit_bytes)
            for start, end in pairwise(bounds):
                yield Group((Span(file, start, end),), stream=False, weight=end - start)
        else:
            yield Group((Span(file),), stream=False, weight=size)


def _table_pieces(file: InputFile, unit_bytes: int) -> Iterable[Group]:
    groups, size = row_groups(file), _text_bytes(file)
    if groups < 2:
        yield Group((Span(file),), stream=False, weight=size)
        return
    step = max(1, groups * unit_bytes // max(1, size))
    for first in range(0, groups, step):
        end = min(first + step, groups)
        yield Group((Span(file, first, end),), stream=False, weight=size * (end - first) // groups)


def _bounds(file: InputFile, options: ReadOptions, unit_bytes: int) -> list[int]:
    """Return offsets between records, about `unit_bytes` apart, from the start of the file to its end."""
    layout, bounds = format_of(file.kind, options), [0]
    with file.open_raw() as raw:
        while bounds[-1] + unit_bytes < file.size:
            bounds.append(_end_behind(raw, bounds[-1] + unit_bytes, layout) or file.size)
    return bounds if bounds[-1] == file.size else [*bounds, file.size]


def _end_behind(raw: BinaryIO, place: int, layout: RecordLayout) -> int:
    """Return the offset of the first record end after `place`; 0 if there is none."""
    raw.seek(place)
    buffer = bytearray()
    while block := raw.read(BLOCK_BYTES):
        buffer += block
        if end := layout.first_end(buffer):
            return place + end
        searched = without_end(buffer)
        del buffer[:searched]
        place += searched
    return 0


def _groups(pieces: Iterable[Group], unit_bytes: int) -> Iterable[Group]:
    """Combine small pieces: one unit for each of a million small files would cost more than their text."""
    spans: list[Span] = []
    weight = 0
    for piece in pieces:
        if spans and (piece.stream or weight + piece.weight > unit_bytes):
            yield Group(tuple(spans), stream=False, weight=weight)
            spans, weight = [], 0
        if piece.stream:
            yield piece
        else:
            spans += piece.spans
            weight += piece.weight
    if spans:
        yield Group(tuple(spans), stream=False, weight=weight)


def _take_shard(groups: list[Group], shard: int, shards: int) -> list[Group]:
    """Return the shard's consecutive groups; the shards in order make up the complete input."""
    total, before, taken = sum(group.weight for group in groups), 0, []
    for group in groups:
        middle = before + group.weight / 2
        if min(shards - 1, int(middle * shards / max(1, total))) == shard:
            taken.append(group)
        before += group.weight
    return taken
