"""Keep evaluation sets out of a dataset: find the documents that share runs of words with them, drop or cut them.

A run of `tokens` words (see word_hashes) of an evaluation set is an n-gram. A text of a set that is shorter is matched
as a whole, from WHOLE_WORDS words on. n: n-grams, I: items of the sets, m: matches.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.builder.disk_hash_table import Int64s, UInt64s, hash_runs
from megalm.data.builder.word_hashes import Group, grouped_words
from megalm.data.indexed.dataset import IndexedDataset, idx_path
from megalm.data.indexed.metadata import dataset_paths, read_sidecar
from megalm.data.readers.document_reader import Span, SpanCount, read_span, record_name
from megalm.data.readers.input_files import STDIN, InputFile, ReadReport, find_inputs
from megalm.data.readers.records import ReadOptions
from megalm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import writing_to

OverlapAction = Literal["drop", "cut"]
WHOLE_WORDS = 8  # the shortest text of an evaluation set that can be distinguished from usual phrases
MOST_WORDS = 50_000_000  # of all sets: 1.2 GB
# As in the decontamination of GPT-3 (arXiv 2005.14165, appendix C), in characters.
CUT_MARGIN, SHORTEST_PART, MOST_PARTS = 200, 200, 10
LISTED, SHOWN_CHARACTERS, NAMED, SHOWN_FILES = 5000, 200, 20, 10
DATASET = "dataset"
_BITS_PER_KEY, _SECOND_LOOK = 32, 24
_READ_TOGETHER = 4096
_ARRAYS = ("words", "text_ends", "text_items", "items")  # of an OverlapIndex, and its files
_EDGE = 50  # characters in which a part's first whole word begins, if it has spaces


@dataclass(frozen=True)
class OverlapOptions:
    """What is kept out of a dataset, and how.

    Attributes:
        files: files, folders, globs or prefixes of datasets that are evaluation sets.
        tokens: words of an n-gram.
        action: "drop" leaves overlapping documents out; "cut" leaves out the overlap and CUT_MARGIN characters on
            either side, and keeps the parts around it as documents.
        keys: keys or columns that are compared; empty: all that hold text.
        content: hash of the sets' words, by which a changed set is noticed; filled when they are read.

    Raises:
        DataError: `tokens` below 1, or no file.
    """

    files: tuple[str, ...]
    tokens: int = 13
    action: OverlapAction = "drop"
    keys: tuple[str, ...] = ()
    content: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise DataError(f"--overlap-tokens {self.tokens}: give a number of words from 1, such as 13")
        if not self.files:
            raise DataError("--exclude-overlap names no file; give the evaluation sets")

    @property
    def whole_words(self) -> int:
        """The number of words from which a text is matched as a whole."""
        return min(self.tokens, WHOLE_WORDS)


@dataclass
class EvaluationFile:
    """A file that was read, as PREFIX.json records it.

    Attributes:
        items: lines, array elements, table rows, parts between blank lines, or documents of a dataset.
        whole: items without an n-gram that are matched as a whole.
        unchecked: items whose texts all have fewer than `OverlapOptions.whole_words` words.
        documents: documents of the input that overlap with it; filled by the build.
    """

    path: str
    kind: str
    bytes: int
    mtime_ns: int
    items: int = 0
    whole: int = 0
    unchecked: int = 0
    documents: int = 0

    @property
    def on_disk(self) -> list[Path]:
        return dataset_paths(self.path) if self.kind == DATASET else [Path(self.path)]


class Overlaps(NamedTuple):
    """Characters [first, end) of a document that are in evaluation sets, in their order, and the items; each [m]."""

    first: Int64s
    end: Int64s
    items: Int64s


@dataclass
class OverlapCounts:
    """What was compared with the evaluation sets, and what overlaps.

    Attributes:
        checked, checked_bytes: all documents, and their UTF-8 bytes.
        documents: those that overlap: left out (`dropped`), or kept in `parts` with `removed_bytes` fewer.
        files: the number of documents that overlap with an evaluation file, by its number in the record.
    """

    checked: int = 0
    checked_bytes: int = 0
    documents: int = 0
    dropped: int = 0
    parts: int = 0
    removed_bytes: int = 0
    files: dict[str, int] = field(default_factory=dict)

    def add(self, other: OverlapCounts) -> None:
        for name, value in vars(other).items():
            if name == "files":
                self.files = dict(Counter(self.files) + Counter(value))
            else:
                setattr(self, name, getattr(self, name) + value)


class _Table(NamedTuple):
    """Sorted hashes of runs of `length` words [n], and the place [n] in the sets' words where each begins.

    `bits`: two bits for each hash are set, by which words that begin no run are passed over at a look or two.
    """

    length: int
    keys: UInt64s
    places: npt.NDArray[np.uint32]
    bits: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, length: int, keys: UInt64s, places: Int64s) -> _Table:
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        size = max(16, (_BITS_PER_KEY * max(1, len(keys)) - 1).bit_length())
        bits = np.zeros(1 << (size - 3), dtype=np.uint8)
        for low in (0, _SECOND_LOOK):
            byte, bit = _slots(keys, low, size)
            np.bitwise_or.at(bits, byte, np.left_shift(np.uint8(1), bit))
        return cls(length, keys, places[order].astype(np.uint32), bits)

    def find(self, hashes: UInt64s) -> tuple[Int64s, Int64s]:
        """Return (the first words of runs that are in the table [m], the rows that they are [m])."""
        if len(hashes) < self.length:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        runs = hash_runs(hashes, self.length)
        near: Int64s = np.arange(len(runs))
        for low in (0, _SECOND_LOOK):
            byte, bit = _slots(runs[near] if low else runs, low, len(self.bits).bit_length() + 2)
            near = near[np.flatnonzero((self.bits.take(byte) >> bit) & 1)]
        first = np.searchsorted(self.keys, runs[near], side="left")
        count = np.searchsorted(self.keys, runs[near], side="right") - first
        before = np.repeat(np.cumsum(count) - count, count)
        return np.repeat(near, count), np.repeat(first, count) + np.arange(int(count.sum())) - before


def _slots(hashes: UInt64s, low: int, size: int) -> tuple[Int64s, npt.NDArray[np.uint8]]:
    """Return the byte and the bit in it that the `size` bits of each hash above bit `64 - size - low` choose."""
    slots = (hashes << np.uint64(low)) >> np.uint64(64 - size)
    return (slots >> np.uint64(3)).view(np.int64), slots.astype(np.uint8) & np.uint8(7)


@dataclass(frozen=True)
class OverlapIndex:
    """The n-grams of all evaluation sets.

    Attributes:
        tables: of the n-grams, and of the first words of texts that are matched as a whole, if there are any.
        words, text_ends, text_items: all words, where each text ends in them, and its item.
        items: [I, 2] number of the file and line of each item.
        files: what was read; empty if loaded from a folder.
        unchecked: names of the first items that are too short.
    """

    tables: Sequence[_Table]
    words: UInt64s
    text_ends: Int64s
    text_items: Int64s
    items: Int64s
    files: Sequence[EvaluationFile] = ()
    unchecked: Sequence[str] = ()

    @property
    def ngrams(self) -> int:
        """Number of distinct n-grams."""
        return len(self.tables[0].keys)

    @property
    def content(self) -> str:
        """A hash of all words and of where their texts end."""
        return hashlib.sha256(self.words.tobytes() + self.text_ends.tobytes()).hexdigest()

    def find(self, texts: Sequence[str]) -> dict[int, Overlaps]:
        """Return the overlaps of each text that has any, by its number."""
        found: dict[int, Overlaps] = {}
        for group in grouped_words(texts):
            parts = [self._find(group, table, whole) for whole, table in zip((False, True), self.tables, strict=False)]
            rows = np.concatenate(parts)  # [m, 4]: text, first, end, item
            if not len(rows):
                continue
            rows = rows[np.lexsort(rows.T[::-1])]
            numbers, begins = np.unique(rows[:, 0], return_index=True)
            for number, part in zip(numbers.tolist(), np.split(rows, begins[1:]), strict=True):
                found[group.first_text + number] = Overlaps(*part[:, 1:].T)
        return found

    def _find(self, group: Group, table: _Table, whole: bool) -> Int64s:
        """Return rows [m, 4] of text, first character, end and item.

        Args:
            whole: the table has the first words of texts that must be in a document to their end.
        """
        words = group.words
        runs, rows = table.find(words.hashes)
        texts = np.searchsorted(group.bounds, runs, side="right") - 1
        places = table.places[rows].astype(np.int64)
        numbers = np.searchsorted(self.text_ends, places, side="right")
        lengths = self.text_ends[numbers] - places if whole else np.full(len(runs), table.length)
        inside = runs + lengths <= group.bounds[texts + 1]
        if whole:
            for hit in np.flatnonzero(inside):
                here, there, length = runs[hit], places[hit], lengths[hit]
                inside[hit] = np.array_equal(words.hashes[here : here + length], self.words[there : there + length])
        runs, texts = runs[inside], texts[inside]
        last = runs + lengths[inside] - 1
        starts = group.starts[texts]
        items = self.text_items[numbers[inside]]
        return np.stack((texts, words.first[runs] - starts, words.end[last] - starts, items), axis=1)

    def save(self, folder: Path) -> None:
        """Write the arrays to the folder, from which several processes map them. Raises DataError for a full disk."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["lengths"] = np.array([table.length for table in self.tables])
        for number, table in enumerate(self.tables):
            arrays |= {f"{name}{number}": array for name, array in table._asdict().items() if name != "length"}
        for name, array in arrays.items():
            path = _array_path(folder, name)
            with writing_to(path):
                path.unlink(missing_ok=True)  # a worker of a killed build may still map it
                np.save(path, array)

    @classmethod
    def load(cls, folder: Path) -> OverlapIndex:
        def array(name: str) -> Any:
            path = _array_path(folder, name)
            return np.load(path, mmap_mode="r" if path.stat().st_size > _READ_TOGETHER else None)

        tables = [
            _Table(int(length), *(array(f"{name}{number}") for name in ("keys", "places", "bits")))
            for number, length in enumerate(array("lengths"))
        ]
        return cls(tables, *map(array, _ARRAYS))


def _array_path(folder: Path, name: str) -> Path:
    return folder / f"overlap-{name}.npy"


def read_evaluation_sets(options: OverlapOptions, tokenizer: Tokenizer) -> OverlapIndex:
    """Read the sets and index their n-grams.

    Args:
        tokenizer: of the build; decodes datasets that were built with the same.

    Raises:
        DataError: a file is missing or cannot be read, has no text long enough, or all have more than MOST_WORDS words.
    """
    reader = _Reader(options)
    for given in options.files:
        before = len(reader.files)
        if given == STDIN:
            raise DataError("--exclude-overlap -: standard input cannot be read again for a resume; give a file")
        if not Path(given).exists() and idx_path(given).exists():
            reader.read_dataset(given, tokenizer)
        else:
            try:
                found = find_inputs([given], ReadReport())
            except DataError as error:
                raise DataError(f"--exclude-overlap {error}") from error
            for file in found:
                reader.read_file(file)
        named = reader.files[before:]
        if all(file.unchecked == file.items for file in named):
            items = sum(file.items for file in named)
            raise DataError(
                f"--exclude-overlap {given}: no text in its {items:,} items has {options.whole_words} words or more, "
                "so nothing can be found to overlap; give sets with longer texts, or other keys (--overlap-key)"
            )
    return reader.index()


class _Reader:
    """Collects the words of evaluation sets."""

    def __init__(self, options: OverlapOptions) -> None:
        self._options = options
        self._read = ReadOptions(columns=options.keys, documents="blank-line", every_text=True)
        self.files: list[EvaluationFile] = []
        self._unchecked: list[str] = []
        self._hashes: list[UInt64s] = []
        self._sizes: list[Int64s] = []  # words of each text
        self._owners: list[Int64s] = []  # the item of each text
        self._items: list[tuple[int, int]] = []
        self._words = 0

    def read_file(self, file: InputFile) -> None:
        self.files.append(EvaluationFile(file.path, file.kind, file.size, file.mtime_ns))
        for records in read_span(Span(file), self._read, SpanCount()):
            texts: list[list[str]] = []
            for record in records:
                if record.is_loss:
                    raise DataError(
                        f"--exclude-overlap {record_name(file, self._read, record.line)}: {record.problem}; correct it"
                    )
                structured = file.kind not in (".txt", ".md")
                texts.append(json.loads(record.text or "[]") if structured else [record.text or ""])
                self._items.append((len(self.files) - 1, record.line))
            self._add(texts)

    def read_dataset(self, prefix: str, tokenizer: Tokenizer) -> None:
        dataset = IndexedDataset(prefix)
        status = idx_path(prefix).stat()
        self.files.append(EvaluationFile(prefix, DATASET, status.st_size, status.st_mtime_ns))
        tokenizer = _tokenizer_of(prefix, tokenizer)
        ends = dataset.document_index.tolist()
        numbers = range(dataset.document_count)
        while batch := numbers[:_READ_TOGETHER]:
            numbers = numbers[_READ_TOGETHER:]
            tokens = [[token for row in range(ends[n], ends[n + 1]) for token in dataset[row].tolist()] for n in batch]
            self._items += [(len(self.files) - 1, number) for number in batch]
            self._add([[tokenizer.decode(row)] for row in tokens])

    def _add(self, items: Sequence[Sequence[str]]) -> None:
        """Add the texts of the last items."""
        first, file = len(self._items) - len(items), self.files[-1]
        texts = [text for item in items for text in item]
        owners = np.repeat(np.arange(first, len(self._items)), [len(item) for item in items])
        sizes = np.zeros(len(texts), dtype=np.int64)
        for group in grouped_words(texts):
            here = np.diff(group.bounds)
            sizes[group.first_text : group.first_text + len(here)] = here
            self._hashes.append(group.words.hashes)
        self._sizes.append(sizes)
        self._owners.append(owners)
        longest = np.zeros(len(items), dtype=np.int64)
        np.maximum.at(longest, owners - first, sizes)
        short = longest < self._options.whole_words
        file.items += len(items)
        file.unchecked += int(short.sum())
        file.whole += int((~short & (longest < self._options.tokens)).sum())
        for number in islice(np.flatnonzero(short), max(0, NAMED - len(self._unchecked))):
            self._unchecked.append(item_name(file, int(self._items[first + number][1])))
        self._words += int(sizes.sum())
        if self._words > MOST_WORDS:
            raise DataError(
                f"--exclude-overlap {file.path}: the evaluation sets have more than {MOST_WORDS:,} words, which would "
                "fill the memory; give only what is evaluated"
            )

    def index(self) -> OverlapIndex:
        words: UInt64s = np.concatenate(self._hashes)
        sizes: Int64s = np.concatenate(self._sizes)
        owners = np.concatenate(self._owners)[sizes > 0]
        sizes = sizes[sizes > 0]
        ends = np.cumsum(sizes)
        tokens, whole = self._options.tokens, self._options.whole_words
        starts: Int64s = np.zeros(0, dtype=np.int64)
        keys: UInt64s = np.zeros(0, dtype=np.uint64)
        if len(words) >= tokens:
            runs = hash_runs(words, tokens)
            left = np.repeat(ends, sizes)[: len(runs)] - np.arange(len(runs))  # words to the end of the text
            starts = np.flatnonzero(left >= tokens)
            keys, first = np.unique(runs[starts], return_index=True)
            starts = starts[first]
        tables = [_Table.of(tokens, keys, starts)]
        short = (sizes >= whole) & (sizes < tokens)
        if short.any():
            begins = (ends - sizes)[short]
            tables.append(_Table.of(whole, hash_runs(words, whole)[begins], begins))
        items = np.array(self._items, dtype=np.int64)
        return OverlapIndex(tables, words, ends, owners, items, self.files, self._unchecked)


def _tokenizer_of(prefix: str, tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer of a dataset; that of the build, if it is the same or the dataset records none."""
    recorded = (read_sidecar(prefix) or {}).get("tokenizer") or {}
    if recorded.get("fingerprint", tokenizer.fingerprint) == tokenizer.fingerprint:
        return tokenizer
    spec = recorded["spec"]
    beside = Path(prefix).parent / spec
    found = load_tokenizer(beside if beside.exists() else spec)
    if found.fingerprint != recorded["fingerprint"]:
        raise DataError(f"--exclude-overlap {prefix}: its tokenizer {spec} has changed; build it again")
    return found


def item_name(file: EvaluationFile, line: int) -> str:
    """Return the name of an item as in errors: "file:line", "array[element]", or "prefix[document]"."""
    if file.kind == DATASET:
        return f"{file.path}[{line}]"
    return record_name(InputFile(file.path, file.kind), ReadOptions(documents="blank-line"), line)


class ListedOverlap(NamedTuple):
    """A document that overlaps, number of the evaluation file, line of the item, number of matches, the first text."""

    document: str
    file: int
    line: int
    matches: int
    text: str


def overlap_report(options: OverlapOptions, index: OverlapIndex, counts: OverlapCounts, listed: int) -> dict[str, Any]:
    """Return `overlap` of PREFIX.json: the options, the evaluation files with their counts, and what overlaps."""
    facts = asdict(counts)
    by_file = facts.pop("files")
    files = [asdict(file) | {"documents": by_file.get(str(number), 0)} for number, file in enumerate(index.files)]
    how = {"tokens": options.tokens, "whole_words": options.whole_words, "action": options.action}
    sets = {"ngrams": index.ngrams, "files": files, "unchecked": index.unchecked}
    return {**how, **facts, **sets, "listed": listed}


def overlap_listing(index: OverlapIndex, listed: Sequence[ListedOverlap]) -> list[bytes]:
    """Return the lines of PREFIX.overlaps."""
    lines = []
    for found in listed:
        item = item_name(index.files[found.file], found.line)
        row = {"document": found.document, "evaluation": item, "matches": found.matches, "text": found.text}
        lines.append(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
    return lines


def describe_overlap(overlap: dict[str, Any]) -> list[str]:
    """Return what `overlap` of PREFIX.json says, as lines; none without --exclude-overlap."""
    if not overlap:
        return []
    documents = f"{overlap['documents']:,} of {overlap['checked']:,} documents"
    share, size = overlap["documents"] / max(1, overlap["checked"]), overlap["removed_bytes"]
    kept = f", {overlap['parts']:,} parts of others kept" if overlap["action"] == "cut" else ""
    lines = [
        f"overlap: {documents} ({share:.3%}) share {overlap['tokens']} words in a row with evaluation sets: "
        f"{overlap['dropped']:,} left out{kept}, {size / max(1, overlap['checked_bytes']):.3%} of the text"
    ]
    files = sorted(overlap["files"], key=lambda file: -int(file["documents"]))
    for file in files[:SHOWN_FILES]:
        line = f"overlap with {file['path']}: {file['documents']:,} documents; {file['items']:,} items"
        if file["whole"]:
            line += f", {file['whole']:,} with fewer words matched whole"
        if file["unchecked"]:
            line += f", {file['unchecked']:,} with fewer than {overlap['whole_words']} words not checked"
        lines.append(line)
    if len(files) > SHOWN_FILES:
        lines.append(f"overlap with {len(files) - SHOWN_FILES:,} other files: see PREFIX.json")
    if overlap["unchecked"]:
        lines.append(f"not checked, the first: {overlap['unchecked'][0]}")
    return lines


def merge_overlaps(overlaps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of `overlap_report` of the parts of a merge; {} if they are of different sets, or one of none."""

    def identity(overlap: dict[str, Any]) -> Any:
        files = [{**file, "documents": 0} for file in overlap["files"]]
        return overlap["tokens"], overlap["action"], overlap["ngrams"], files

    if not all(overlaps) or any(identity(other) != identity(overlaps[0]) for other in overlaps):
        return {}
    summed = dict(overlaps[0])
    for name in vars(OverlapCounts()).keys() - {"files"}:
        summed[name] = sum(overlap[name] for overlap in overlaps)
    of_files = zip(*(overlap["files"] for overlap in overlaps), strict=True)
    summed["files"] = [{**same[0], "documents": sum(file["documents"] for file in same)} for same in of_files]
    return summed


def without_overlaps(text: str, found: Overlaps) -> list[str]:
    """Return the parts of a document around its overlaps, in whole words; empty if they are too short or too many."""
    parts, place = [], 0
    for first, end in zip(found.first.tolist(), found.end.tolist(), strict=True):
        if first - CUT_MARGIN > place:
            parts.append(_whole_words(text, place, first - CUT_MARGIN))
        place = max(place, end + CUT_MARGIN)
    parts.append(_whole_words(text, min(place, len(text)), len(text)))
    if len(parts) > MOST_PARTS:
        return []
    return [part for part in parts if len(part) >= SHORTEST_PART]


def _whole_words(text: str, first: int, end: int) -> str:
    if first and (found := re.compile(r"\s").search(text, first, min(end, first + _EDGE))):
        first = found.start()
    if end < len(text) and (spaces := [*re.finditer(r"\s", text[max(first, end - _EDGE) : end])]):
        end = max(first, end - _EDGE) + spaces[-1].start()
    return text[first:end].strip()
