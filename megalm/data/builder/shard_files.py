"""The files of a unit of work: PART.tokens, PART.npz (a row per document; trained tokens), and PART.json, the last.

A part without PART.json does not exist; a part whose files do not match PART.json is made again.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.decontamination import LISTED, SHOWN_CHARACTERS, OverlapCounts, OverlapIndex, without_overlaps
from megalm.data.builder.dedup import exact_signatures, minhash_signatures
from megalm.data.indexed.dataset import best_dtype
from megalm.data.readers.document_reader import Span, SpanCount, lines_before, read_span, record_name
from megalm.data.readers.input_files import KEPT_MESSAGES
from megalm.data.readers.losses import Losses
from megalm.data.readers.records import EMPTY, ByteBlock, TextRecord
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import write_atomically, write_json, writing_to

# One row per document. `line` counts within the span; start and size are bytes of the unpacked file.
DOCUMENT = np.dtype(
    [
        ("tokens", "<i4"),
        ("text_bytes", "<u4"),
        ("span", "<u4"),
        ("size", "<u4"),
        ("line", "<i8"),
        ("start", "<i8"),
        ("exact", "?"),
    ]
)


@dataclass
class WorkUnitSummary:
    """The content of PART.json. Positions are [span, line in it]."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    span_lines: list[int] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)  # all but `lost_files`: other parts can be of the same files
    lost_spans: list[int] = field(default_factory=list)  # those whose file cannot be read from some place on
    messages: list[tuple[int, int, str]] = field(default_factory=list)  # span, line, problem
    removed: dict[str, int] = field(default_factory=dict)  # per filter
    overlap: OverlapCounts = field(default_factory=OverlapCounts)
    # The first documents that overlap: span, line, and as in ListedOverlap from the file on.
    overlaps: list[tuple[int, int, int, int, int, str]] = field(default_factory=list)
    crc: int = 0  # of PART.tokens
    content: str = ""  # for a stream: hash of the bytes passed to the worker


@dataclass(frozen=True)
class WorkUnitFiles:
    directory: Path
    name: str

    def path(self, suffix: str) -> Path:
        return self.directory / f"{self.name}.{suffix}"

    def finished(self) -> WorkUnitSummary | None:
        """Return the part's summary, if it exists; the content is checked when it is read."""
        try:
            facts = json.loads(self.path("json").read_bytes())
            made = {"losses": Losses(**facts["losses"]), "overlap": OverlapCounts(**facts["overlap"])}
            summary = WorkUnitSummary(**{**facts, **made})
            sizes = [self.path(suffix).stat().st_size for suffix in ("tokens", "npz")]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return summary if sizes[1] and (sizes[0] > 0) == (summary.tokens > 0) else None

    def documents(self) -> npt.NDArray[Any]:
        """Return DOCUMENT rows, [n]. Raises DataError for a damaged file."""
        return self._array("documents")

    def signatures(self) -> npt.NDArray[Any]:
        """Return [n, ...]; meaningless if the part has no documents. Raises DataError for a damaged file."""
        return self._array("signatures")

    def trained(self, tokens: int) -> npt.NDArray[np.bool_]:
        """Return [tokens] whether each is trained; only for conversations. Raises DataError for a damaged file."""
        bits = self._array("trained")
        if len(bits) != -(-tokens // 8):
            raise self.damaged()
        return np.unpackbits(bits, count=tokens).astype(np.bool_)

    def _array(self, name: str) -> npt.NDArray[Any]:
        try:
            with np.load(self.path("npz")) as arrays:  # a zip file, which has its own checksums
                return np.asarray(arrays[name])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise self.damaged() from error

    def damaged(self) -> DataError:
        self.path("json").unlink(missing_ok=True)
        return DataError(f"{self.path('tokens')}: is damaged; start the same build again to make this part again")


class _Place(NamedTuple):
    """The span that is read: its number in the unit, and the line at which a block cut from a stream starts."""

    number: int
    span: Span
    first_line: int


class _Readable(NamedTuple):
    """A record with a text, and the characters of it that are trained, if it is a conversation."""

    record: TextRecord
    trained: Sequence[tuple[int, int]] = ()


class WorkUnitWriter:
    """Turns records into a part; each worker writes one at a time."""

    def __init__(self, part: WorkUnitFiles, options: BuildOptions, tokenizer: Tokenizer) -> None:
        self._part, self._options, self._tokenizer = part, options, tokenizer
        self._dtype = best_dtype(tokenizer.vocab_size)
        self._eod_id = tokenizer.eod_id if options.append_eod else None
        self._policy = options.loss_policy
        self._overlap_index = OverlapIndex.load(part.directory) if options.overlap is not None else None
        self._summary = WorkUnitSummary()
        self._removed: Counter[str] = Counter()
        self._rows: list[npt.NDArray[Any]] = []
        self._signatures: list[npt.NDArray[Any]] = []
        self._trained: list[npt.NDArray[np.bool_]] = []  # of each batch of documents, if they are conversations

    def write(
        self, spans: Sequence[Span], block: ByteBlock | None = None, content_hash: str = "", first_line: int = 0
    ) -> WorkUnitSummary:
        """Read the spans and write the part.

        Args:
            block: bytes of the only span, cut from a stream; they start at line `first_line` of the stream.

        Raises:
            DataError: an unreadable record, with on_error "fail"; a full disk.
        """
        part = self._part

        def fill(tokens: BinaryIO) -> None:
            for number, span in enumerate(spans):
                count = SpanCount()
                place = _Place(number, span, first_line)
                for records in read_span(span, self._options.read, count, block):
                    tokens.write(self._encode(self._kept(records, place), place))
                self._summary.span_lines.append(count.lines)
                self._summary.losses.input_bytes += count.disk_bytes

        # Each file gets its name only once complete: workers can outlive a killed build for a moment.
        with writing_to(part.path("tokens")):
            part.path("json").unlink(missing_ok=True)
            write_atomically(part.path("tokens"), fill, durable=False)
            save = partial(
                np.savez,
                documents=np.concatenate(self._rows) if self._rows else np.zeros(0, DOCUMENT),
                signatures=np.concatenate(self._signatures) if self._signatures else np.zeros((0, 2), "<u8"),
                # Without conversations, no bit.
                trained=np.packbits(np.concatenate(self._trained)) if self._trained else np.zeros(0, dtype=np.uint8),
            )
            write_atomically(part.path("npz"), save, durable=False)
        self._summary.removed, self._summary.content = dict(self._removed), content_hash
        write_json(part.path("json"), asdict(self._summary), durable=False)
        return self._summary

    def _kept(self, records: Iterable[TextRecord], place: _Place) -> list[_Readable]:
        chat, kept = self._options.chat, []
        for record in records:
            readable = _Readable(record)
            if chat is not None and record.text is not None:
                try:
                    text, trained = chat.render(record.text)
                    problem = "" if text else EMPTY
                    readable = _Readable(record._replace(text=text or None, problem=problem), trained)
                except DataError as error:
                    readable = _Readable(record._replace(text=None, problem=str(error)))
            self._summary.losses.count(readable.record)
            if readable.record.text is None:
                self._leave_out(readable.record, place)
            else:
                kept.append(readable)
        if self._overlap_index is not None:
            kept = self._without_overlaps(self._overlap_index, kept, place)
        broken = [self._options.filters.removes(record.text or "") for record, _ in kept]
        self._removed.update(bound for bound in broken if bound is not None)
        return [readable for readable, bound in zip(kept, broken, strict=True) if bound is None]

    def _without_overlaps(self, index: OverlapIndex, readable: list[_Readable], place: _Place) -> list[_Readable]:
        """Return the documents without overlap, and the parts of others if these are cut; counts and lists them."""
        texts = [record.text or "" for record, _ in readable]
        cuts = self._options.overlap is not None and self._options.overlap.action == "cut"
        counts, kept, sizes = self._summary.overlap, [], [_size_of(text) for text in texts]
        counts.checked += len(texts)
        counts.checked_bytes += sum(sizes)
        overlaps = index.find(texts)
        for number, document in enumerate(readable):
            found = overlaps.get(number)
            if found is None:
                kept.append(document)
                continue
            record, text = document.record, texts[number]
            parts = without_overlaps(text, found) if cuts else []
            kept += [_Readable(record._replace(text=part)) for part in parts]
            counts.documents += 1
            counts.dropped += not parts
            counts.parts += len(parts)
            counts.removed_bytes += sizes[number] - sum(map(_size_of, parts))
            for file in np.unique(index.items[found.items, 0]).tolist():
                counts.files[str(file)] = counts.files.get(str(file), 0) + 1
            if len(self._summary.overlaps) < LISTED:
                shown = text[found.first[0] : found.end[0]][:SHOWN_CHARACTERS]
                file, line = index.items[found.items[0]].tolist()
                self._summary.overlaps.append((place.number, record.line, file, line, len(found.first), shown))
        return kept

    def _leave_out(self, record: TextRecord, place: _Place) -> None:
        """Note a record without a text. Raises DataError if the policy refuses it."""
        summary = self._summary

        def name() -> str:
            line = (place.first_line or lines_before(place.span)) + record.line
            return record_name(place.span.file, self._options.read, line)

        self._policy.check(record, name)
        if record.lost_bytes is not None and place.number not in summary.lost_spans:
            summary.lost_spans.append(place.number)
        if record.is_loss and len(summary.messages) < KEPT_MESSAGES:
            summary.messages.append((place.number, record.line, record.problem))

    def _encode(self, readable: Sequence[_Readable], place: _Place) -> bytes:
        """Return the records' tokens as file bytes; appends their rows, signatures, and which are trained."""
        records, found = [], []
        for (record, _), document in zip(readable, self._encoded(readable), strict=True):
            if isinstance(document, DataError):
                unusable = record._replace(text=None, problem=str(document))
                self._summary.losses.count_unreadable(unusable)
                self._leave_out(unusable, place)
            else:
                records.append(record)
                found.append(document)
        if not records:
            return b""
        texts = [document.text for document in found]
        encoded = [self._tokenizer.begun(document.tokens) for document in found]
        tokens, lengths = with_ends(encoded, self._eod_id, self._dtype)
        rows = np.zeros(len(records), DOCUMENT)
        rows["tokens"] = lengths
        rows["exact"] = [document.is_exact for document in found]
        rows["text_bytes"] = [document.text_bytes for document in found]
        rows["span"] = place.number
        for name in ("size", "line", "start"):
            rows[name] = [getattr(record, name) for record in records]
        if self._options.dedup == "minhash":
            self._signatures.append(minhash_signatures(texts))
        elif self._options.dedup == "exact":
            self._signatures.append(exact_signatures(encoded))
        else:
            self._signatures.append(np.zeros((len(records), 0), "<u8"))
        self._rows.append(rows)
        if self._options.chat is not None:
            for document, whole in zip(found, encoded, strict=True):  # the ends are no part of a conversation
                ends = len(whole) - len(document.tokens), 0 if self._eod_id is None else 1
                self._trained.append(np.pad(document.trained, ends))
        content = tokens.tobytes()
        self._summary.crc = zlib.crc32(content, self._summary.crc)
        self._summary.documents += len(records)
        self._summary.tokens += len(tokens)
        self._summary.text_bytes += int(rows["text_bytes"].sum())
        return content

    def _encoded(self, readable: Sequence[_Readable]) -> Iterator[EncodedDocument | DataError]:
        if self._options.chat is not None:
            return (encode_conversation(self._tokenizer, record.text or "", trained) for record, trained in readable)
        return encode_documents(self._tokenizer, [record.text for record, _ in readable if record.text is not None])


class EncodedDocument(NamedTuple):
    """Tokens [n]; `is_exact`: they decode back to the text; `trained` [n]: only of a conversation."""

    text: str
    tokens: npt.NDArray[np.int32]
    is_exact: bool
    text_bytes: int
    trained: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[EncodedDocument | DataError]:
    """Yield each text's encoding, or why the tokenizer cannot encode it."""
    for text, tokens in zip(texts, tokenizer.encode_each(texts), strict=True):
        if isinstance(tokens, DataError):
            yield tokens
        else:
            yield EncodedDocument(text, tokens, tokenizer.is_exact(text, tokens), _size_of(text))


def encode_conversation(
    tokenizer: Tokenizer, text: str, trained: Sequence[tuple[int, int]]
) -> EncodedDocument | DataError:
    """Return a rendered conversation's encoding: a token is trained if any of its characters [start, end) is."""
    try:
        (found,) = tokenizer.encode_marked([text])
    except DataError as error:
        return error
    is_trained = np.zeros(len(found.ids), dtype=np.bool_)
    for start, end in trained:
        is_trained |= (found.first < end) & (found.end > start)
    return EncodedDocument(text, found.ids, found.is_exact, _size_of(text), is_trained)


def _size_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def with_ends(
    encoded: Sequence[npt.NDArray[np.int32]], eod_id: int | None, dtype: np.dtype[np.generic]
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
    """Return (tokens [sum n] of all documents, each followed by the end-of-document token if given; lengths)."""
    end = np.array([] if eod_id is None else [eod_id], dtype=np.int32)
    tokens = np.concatenate([part for row in encoded for part in (row, end)]).astype(dtype)
    return tokens, np.array([len(row) + len(end) for row in encoded], dtype=np.int64)
