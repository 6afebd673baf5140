"""Loss of a checkpoint on raw text: each document on its own, long ones in windows that share context.

A document stands as it stood in training: after an end-of-document token, so that its first token counts too; where
data.document_mask kept documents apart, it begins without one, and its first token is only context. The token that
would end it is no text and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megalm.communicator import SingleProcessCommunicator
from megalm.data.readers.document_reader import iter_documents
from megalm.data.readers.input_files import ReadReport
from megalm.data.readers.records import ReadOptions
from megalm.errors import ConfigError, DataError
from megalm.inference.batching import ScoredSequence, SequenceBatches, evenly
from megalm.inference.dataset_eval import ALL, Row, loss_fields
from megalm.inference.inference_model import CheckpointFacts, InferenceModel
from megalm.train.evaluator import Evaluation, Evaluator

_LARGEST_EXPONENT = 700.0  # beyond that a float overflows


@dataclass(frozen=True)
class TextSet:
    """Documents of one path, cut.

    Attributes:
        overlap: tokens of a window that the one before has scored.
        words: runs of characters between white space.
        text_bytes: UTF-8 bytes of what is scored.
        skipped: documents that are empty or cannot be read, and why the first is not.
    """

    name: str
    overlap: int
    sequences: tuple[ScoredSequence, ...]
    documents: int
    words: int
    text_bytes: int
    skipped: int
    problem: str

    @property
    def targets(self) -> int:
        return sum(sequence.targets for sequence in self.sequences)


class TextTask:
    """Loss over the documents of several paths; see `DatasetTask`."""

    def __init__(self, sets: Sequence[TextSet], token_bytes: npt.NDArray[np.int32], batch_size: int) -> None:
        self._sets = [(one, SequenceBatches(one.sequences, batch_size)) for one in sets]
        self._token_bytes = token_bytes

    @property
    def batches(self) -> int:
        return sum(len(batches) for _, batches in self._sets)

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        evaluator = Evaluator(
            {one.name: (batches, batches) for one, batches in self._sets},
            self._token_bytes,
            SingleProcessCommunicator(),
            1,
            heartbeat,
        )
        found = evaluator.evaluate(model, whole=True)
        assert found is not None, "a task has sets"
        sets = [one for one, _ in self._sets]
        rows = [_row(result, [one]) for result, one in zip(found.parts or (found,), sets, strict=True)]
        return [*rows, *([_row(replace(found, dataset=ALL), sets)] if len(sets) > 1 else [])]


def read_text(
    path: str,
    facts: CheckpointFacts,
    overlap: int | None = None,
    text_key: str = "text",
    max_samples: int | None = None,
    watched: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> TextSet:
    """Read and cut the documents of a file or a folder, as build_dataset.py reads them.

    Args:
        overlap: tokens of a window that the one before has scored; None: half of them.
        max_samples: at most so many documents, evenly spaced.
        watched: is given the documents and hands them on one by one, so that somebody can count them.

    Raises:
        DataError: no such file, or no document in it that can be scored.
        ConfigError: an overlap that leaves nothing of a window.
    """
    length = facts.sequence_length
    overlap = length // 2 if overlap is None else overlap
    if not 0 <= overlap < length:
        raise ConfigError(
            f"--overlap {overlap}: the model's windows have {length} tokens; 0 to {length - 1} can overlap"
        )
    report = ReadReport()
    options = ReadOptions(text_key=text_key)
    texts = [document.text for document in iter_documents([path], on_error="skip", report=report, options=options)]
    texts = [texts[place] for place in evenly(len(texts), max_samples)]
    sizes = facts.tokenizer.token_bytes()
    sequences, documents, words, text_bytes = [], 0, 0, 0
    for text in watched(texts):
        (tokens,) = facts.tokenizer.encode_arrays([text])
        found = list(document_windows(tokens, facts, overlap))
        if not found:
            continue
        sequences += found
        documents += 1
        words += len(text.split())
        text_bytes += len(text.encode()) - (int(sizes[tokens[0]]) if facts.document_mask else 0)
    if not sequences:
        because = f": {report.messages[0]}" if report.messages else ""
        raise DataError(f"{path}: no document there that can be scored{because}")
    skipped = report.skipped + len(texts) - documents
    problem = next(iter(report.messages), "")
    return TextSet(path, overlap, tuple(sequences), documents, words, text_bytes, skipped, problem)


def document_windows(tokens: npt.NDArray[np.integer], facts: CheckpointFacts, overlap: int) -> Iterator[ScoredSequence]:
    """Windows of a document in which each of its tokens is scored exactly once."""
    if not facts.document_mask:
        tokens = np.concatenate([np.array([facts.tokenizer.eod_id], dtype=tokens.dtype), tokens])
    start, scored, length = 0, 1, facts.sequence_length
    while scored < len(tokens):
        end = min(start + length + 1, len(tokens))  # the last one is a target only
        yield ScoredSequence(tokens[start:end], scored - start)
        start, scored = start + length - overlap, end


def _row(result: Evaluation, sets: Sequence[TextSet]) -> Row:
    nats = result.loss * result.targets
    text_bytes, words = (sum(getattr(one, name) for one in sets) for name in ("text_bytes", "words"))
    return {
        "source": "text",
        "overlap": sets[0].overlap,
        **loss_fields(result),
        # Of the text as it is: a tokenizer that normalises it would give other bytes.
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "word_perplexity": math.exp(min(nats / words, _LARGEST_EXPONENT)) if words else None,
        **{name: sum(getattr(one, name) for one in sets) for name in ("documents", "words", "text_bytes", "skipped")},
    }
