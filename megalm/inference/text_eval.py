"""Evaluates checkpoints on raw text: each document alone, long documents in overlapping windows.

A document begins with the bos_id of training, or without one follows an end-of-document token as in training, so that
its first token is scored too. If data.document_mask separated documents without a bos_id in training, no token comes
before, and the first token is only context. The token before the document is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.data.readers.document_reader import Document, iter_documents
from megalm.data.readers.input_files import ReadReport
from megalm.data.readers.records import ReadOptions
from megalm.data.sampling.batch_loader import ScoredSequence, SequenceBatches
from megalm.data.sampling.samples import evenly
from megalm.errors import ConfigError, DataError
from megalm.inference.dataset_eval import Row, evaluate_sets, loss_fields
from megalm.inference.inference_model import CheckpointFacts, InferenceModel
from megalm.train.evaluator import Evaluation
from megalm.utils.formatting import perplexity_of


@dataclass(frozen=True)
class TextSet:
    """The windows of all documents of one path.

    Attributes:
        overlap: tokens that a window shares with the one before.
        words: words between white space.
        text_bytes: UTF-8 bytes of the scored text.
        skipped: empty or unreadable documents; `problem` is the first reason, and the counts with bytes.
    """

    name: str
    overlap: int
    sequences: tuple[ScoredSequence, ...]
    documents: int
    words: int
    text_bytes: int
    skipped: int
    problem: str


class TextTask:
    """Loss over the documents of several paths; see `DatasetTask`."""

    def __init__(self, sets: Sequence[TextSet], token_bytes: npt.NDArray[np.int32], batch_size: int) -> None:
        self._sets = [(one, SequenceBatches(one.sequences, batch_size)) for one in sets]
        self._token_bytes = token_bytes

    @property
    def batches(self) -> int:
        return sum(len(batches) for _, batches in self._sets)

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        results = evaluate_sets(model, {one.name: batches for one, batches in self._sets}, self._token_bytes, heartbeat)
        sets = [one for one, _ in self._sets]
        groups = [*([one] for one in sets), sets]  # the last is the total's, if there is one
        return [_row(result, group) for result, group in zip(results, groups, strict=False)]


def read_text(
    path: str,
    facts: CheckpointFacts,
    overlap: int | None = None,
    text_key: str = "text",
    max_samples: int | None = None,
    watched: Callable[[Sequence[Document]], Iterable[Document]] = iter,
) -> TextSet:
    """Read the documents of a file or a folder, as build_dataset.py reads them, and cut them to windows.

    Args:
        overlap: tokens that a window shares with the one before; None: half a window.
        max_samples: the largest number of documents, evenly spaced.
        watched: iterates over the documents; a caller can show the progress.

    Raises:
        DataError: the file is missing, or has no document that can be scored.
        ConfigError: the overlap is as long as a window.
    """
    length = facts.sequence_length
    overlap = length // 2 if overlap is None else overlap
    if not 0 <= overlap < length:
        raise ConfigError(f"--overlap {overlap}: the model's window has {length} tokens; give 0 to {length - 1}")
    report = ReadReport()
    options = ReadOptions(text_key=text_key)
    found = list(iter_documents([path], on_error="skip", report=report, options=options))
    chosen = [found[place] for place in evenly(len(found), max_samples)]
    sizes = facts.tokenizer.token_bytes()
    sequences, documents, words, text_bytes = [], 0, 0, 0
    for text, source in watched(chosen):
        (tokens,) = facts.tokenizer.encode_each([text])
        if isinstance(tokens, DataError):
            report.note(f"{source}: {tokens}")
            continue
        windows = list(document_windows(tokens, facts, overlap))
        if not windows:
            continue
        sequences += windows
        documents += 1
        words += len(text.split())
        text_bytes += len(text.encode()) - (
            0 if facts.tokenizer.text_start(facts.document_mask) else int(sizes[tokens[0]])
        )
    if not sequences:
        because = f": {report.messages[0]}" if report.messages else ""
        raise DataError(f"{path} has no document that can be scored{because}")
    skipped = report.skipped + len(chosen) - documents
    problem = "; ".join([*report.messages[:1], *report.losses.lines()])
    return TextSet(path, overlap, tuple(sequences), documents, words, text_bytes, skipped, problem)


def document_windows(tokens: npt.NDArray[np.integer], facts: CheckpointFacts, overlap: int) -> Iterator[ScoredSequence]:
    """Windows of a document that together score each of its tokens exactly once."""
    before = facts.tokenizer.text_start(facts.document_mask)
    tokens = np.concatenate([np.array(before, dtype=tokens.dtype), tokens])
    start, scored, length = 0, 1, facts.sequence_length
    while scored < len(tokens):
        end = min(start + length + 1, len(tokens))  # the last token is a target only
        yield ScoredSequence(tokens[start:end], scored - start)
        start, scored = start + length - overlap, end


def _row(result: Evaluation, sets: Sequence[TextSet]) -> Row:
    nats = result.loss * result.targets
    text_bytes, words = (sum(getattr(one, name) for one in sets) for name in ("text_bytes", "words"))
    return {
        "source": "text",
        "overlap": sets[0].overlap,
        **loss_fields(result),
        # Bytes of the original text: a normalizing tokenizer would decode to other bytes.
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "word_perplexity": perplexity_of(nats / words) if words else None,
        **{name: sum(getattr(one, name) for one in sets) for name in ("documents", "words", "text_bytes", "skipped")},
    }
