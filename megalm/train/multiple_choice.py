"""Multiple-choice questions: the model's answer is the choice with the largest log-likelihood after the context.

Context and choice are encoded as one text. Scoring starts after the tokens that the context alone and the context with
each choice have in common, so it starts at the same token for all choices, even if a token spans the boundary. The
context begins as a document in training: with its bos_id, or after an end-of-document token, unless data.document_mask
separated documents there.

The same in training, by its engine, and in `megalm evaluate`, by a model alone. Shapes: B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalm.data.readers.questions import Question, read_questions
from megalm.data.sampling.batch_loader import MicroBatch, ScoredSequence, SequenceBatches, common_prefix
from megalm.data.sampling.samples import evenly
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError

Floats = npt.NDArray[np.float64]


class RowScorer(Protocol):
    """A model, or the part of `Engine` that questions need."""

    def row_losses(self, batch: MicroBatch) -> Floats: ...


@dataclass(frozen=True)
class Encoding:
    """How a model reads a question.

    Attributes:
        sequence_length: of its window, in tokens.
        document_mask: attention was confined to one document in training.
    """

    tokenizer: Tokenizer
    sequence_length: int
    document_mask: bool


@dataclass(frozen=True)
class ChoiceSet:
    """The encoded questions of one file.

    Attributes:
        sequences: one for each choice of each question, in order.
        cut: contexts that lost their beginning because they exceed the model's window.
    """

    name: str
    questions: tuple[Question, ...]
    sequences: tuple[ScoredSequence, ...]
    cut: int


class ChoiceTask:
    """Accuracy on the questions of several files; see `DatasetTask`."""

    def __init__(self, sets: Sequence[ChoiceSet], batch_size: int) -> None:
        self.sets = sets
        self._batches = [SequenceBatches(one.sequences, batch_size) for one in sets]

    @property
    def batches(self) -> int:
        return sum(map(len, self._batches))

    def rows(self, model: RowScorer, heartbeat: Callable[[], None]) -> list[dict[str, Any]]:
        pairs = zip(self.sets, self._batches, strict=True)
        return [_row(one, log_likelihoods(one, batches, model, heartbeat)) for one, batches in pairs]

    def preflight(self, model: RowScorer) -> None:
        """Score the longest batch of each file, to find out whether memory suffices."""
        for batches in self._batches:
            model.row_losses(batches.batch(0).micro_batches[0])


# What a run evaluates on while it trains, and at its end.
Choices = tuple[ChoiceTask, ChoiceTask]
NO_CHOICES: Choices = (ChoiceTask((), 1), ChoiceTask((), 1))


def read_choices(path: Path, encoding: Encoding, max_samples: int | None = None) -> ChoiceSet:
    """Read and encode a file of questions, compressed or not.

    Args:
        max_samples: the largest number of questions, evenly spaced.

    Raises:
        DataError: a line is not a question, or a choice exceeds the model's window; names file and line.
    """
    questions = read_questions(path)
    questions = [questions[place] for place in evenly(len(questions), max_samples)]
    sequences: list[ScoredSequence] = []
    cut = 0
    for question in questions:
        found = encode_question(question, encoding)
        sequences += [_within(sequence, encoding.sequence_length, question) for sequence in found]
        cut += any(len(sequence.tokens) > encoding.sequence_length + 1 for sequence in found)
    return ChoiceSet(str(path), tuple(questions), tuple(sequences), cut)


def encode_question(question: Question, encoding: Encoding) -> list[ScoredSequence]:
    """Encode each choice; all sequences have the same tokens before the first scored one.

    Raises:
        DataError: the tokenizer encodes a choice to no token.
    """
    tokenizer = encoding.tokenizer
    texts = [question.context, *(question.context + choice for choice in question.choices)]
    try:
        before, *together = (tokens.tolist() for tokens in tokenizer.encode_batch(texts))
    except DataError as error:
        raise DataError(f"{question.source}: {error}") from error
    if not all(together):
        raise DataError(f"{question.source}: the tokenizer encodes a choice to no token; change or remove the choice")
    common = min(min(common_prefix(before, tokens), len(tokens) - 1) for tokens in together)
    # The first scored token needs a token before it.
    start = tokenizer.text_start(encoding.document_mask) or ([] if common else [tokenizer.eod_id])
    return [ScoredSequence(np.array([*start, *tokens]), len(start) + common) for tokens in together]


def log_likelihoods(
    questions: ChoiceSet, batches: SequenceBatches, model: RowScorer, heartbeat: Callable[[], None]
) -> list[Floats]:
    """The log-likelihoods in nats of each question's choices."""
    scores = np.zeros(len(questions.sequences))
    for index, batch in enumerate(batches):
        for micro_batch in batch.micro_batches:
            scores[batches.indices(index)] = -model.row_losses(micro_batch)
        heartbeat()
    ends = np.cumsum([len(question.choices) for question in questions.questions])
    return np.split(scores, ends[:-1])


def _row(questions: ChoiceSet, scores: Sequence[Floats]) -> dict[str, Any]:
    right, right_by_byte, bits = [], [], []
    for question, score in zip(questions.questions, scores, strict=True):
        sizes = np.array([len(choice.encode()) for choice in question.choices])
        right.append(_is_right(score, question))
        right_by_byte.append(_is_right(score / sizes, question))
        bits.append(-score[question.answer] / math.log(2) / sizes[question.answer])
    chance = float(np.mean([1 / len(question.choices) for question in questions.questions]))
    return {
        "source": "choices",
        "dataset": questions.name,
        "questions": len(right),
        "accuracy": float(np.mean(right)),
        "accuracy_error": _standard_error(right),
        "byte_accuracy": float(np.mean(right_by_byte)),
        "byte_accuracy_error": _standard_error(right_by_byte),
        "answer_bits_per_byte": float(np.mean(bits)),
        "chance": chance,
        "cut_contexts": questions.cut,
    }


def _is_right(scores: Floats, question: Question) -> float:
    """1 if the answer has the largest score, the first of equal ones, else 0; NaN if a score is, which argmax takes."""
    return math.nan if np.isnan(scores).any() else float(scores.argmax() == question.answer)


def _standard_error(right: Sequence[float]) -> float | None:
    """The standard error of the accuracy; None for one answer."""
    if len(right) < 2:
        return None
    mean = float(np.mean(right))
    return math.sqrt(mean * (1 - mean) / (len(right) - 1))


def _within(sequence: ScoredSequence, length: int, question: Question) -> ScoredSequence:
    """The sequence's last `length` + 1 tokens."""
    lost = max(0, len(sequence.tokens) - (length + 1))
    if sequence.first - lost < 1:
        raise DataError(
            f"{question.source}: a choice of {sequence.targets} tokens exceeds the model's window of {length}; shorten "
            "or remove it"
        )
    return ScoredSequence(sequence.tokens[lost:], sequence.first - lost)
