"""Multiple choice by log-likelihood: which of the given texts does a checkpoint find likeliest after the context?

Context and choice are one text, and are encoded as one. The split is after the tokens that the context alone and the
context with each of the choices have in common: what is scored then begins at the same token for all choices, also
where a token reaches from the context into a choice. The context follows an end-of-document token, as documents did in
training, but not where data.document_mask kept them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megalm.data.readers.input_files import BROKEN, packing_of, unpacked
from megalm.errors import CheckpointError, DataError
from megalm.inference.batching import ScoredSequence, SequenceBatches, evenly
from megalm.inference.dataset_eval import Row
from megalm.inference.inference_model import NOT_NUMBERS, CheckpointFacts, InferenceModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """`answer` is the place of the right one among `choices`."""

    context: str
    choices: tuple[str, ...]
    answer: int
    source: str  # "file:line"


@dataclass(frozen=True)
class ChoiceSet:
    """Questions of one file, encoded.

    Attributes:
        sequences: of each question's choices, one after the other.
        cut: contexts that are longer than the model's window and lost their beginning.
    """

    name: str
    questions: tuple[Question, ...]
    sequences: tuple[ScoredSequence, ...]
    cut: int


class ChoiceTask:
    """Accuracy on the questions of several files; see `DatasetTask`."""

    def __init__(self, sets: Sequence[ChoiceSet], batch_size: int) -> None:
        self._sets = [(one, SequenceBatches(one.sequences, batch_size)) for one in sets]

    @property
    def batches(self) -> int:
        return sum(len(batches) for _, batches in self._sets)

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        return [_row(one, log_likelihoods(one, batches, model, heartbeat)) for one, batches in self._sets]


def read_choices(path: Path, facts: CheckpointFacts, max_samples: int | None = None) -> ChoiceSet:
    """Read and encode a file of questions, packed or not.

    Args:
        max_samples: at most so many questions, evenly spaced.

    Raises:
        DataError: with file and line: what is no question, or a choice that is longer than the model's window.
    """
    questions = read_questions(path)
    questions = [questions[place] for place in evenly(len(questions), max_samples)]
    sequences: list[ScoredSequence] = []
    cut = 0
    for question in questions:
        found = encode_question(question, facts)
        sequences += [_within(sequence, facts.sequence_length, question) for sequence in found]
        cut += any(len(sequence.tokens) > facts.sequence_length + 1 for sequence in found)
    return ChoiceSet(str(path), tuple(questions), tuple(sequences), cut)


def read_questions(path: Path) -> list[Question]:
    """JSON lines {"context": ..., "choices": [...], "answer": place}; other fields are left alone.

    Raises:
        DataError: no such file, or a line that is no question.
    """
    found = []
    try:
        with unpacked(path.open("rb"), packing_of(path)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found.append(_question(line, f"{path}:{number}"))
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); give a file of JSON lines") from None
    if not found:
        raise DataError(f"{path}: holds no question; give JSON lines of context, choices and answer")
    return found


def encode_question(question: Question, facts: CheckpointFacts) -> list[ScoredSequence]:
    """A sequence for each choice; all have the same tokens before the first one that counts.

    Raises:
        DataError: a choice of which the tokenizer leaves nothing.
    """
    tokenizer = facts.tokenizer
    before, *together = tokenizer.encode_batch(
        [question.context, *(question.context + choice for choice in question.choices)]
    )
    if not all(together):
        raise DataError(
            f"{question.source}: the tokenizer has no token for a choice; choices must be texts that it keeps"
        )
    agreed = min(min(_agreed(before, tokens), len(tokens) - 1) for tokens in together)
    # Something has to stand before the first token that counts.
    start = [] if facts.document_mask and agreed else [tokenizer.eod_id]
    return [ScoredSequence(np.array([*start, *tokens]), len(start) + agreed) for tokens in together]


def log_likelihoods(
    questions: ChoiceSet, batches: SequenceBatches, model: InferenceModel, heartbeat: Callable[[], None]
) -> list[Floats]:
    """Of each question, the log-likelihood of each choice in nats.

    Raises:
        CheckpointError: they are no numbers.
    """
    scores = np.zeros(len(questions.sequences))
    for index, batch in enumerate(batches):
        for micro_batch in batch.micro_batches:
            losses = model.row_losses(micro_batch)
            if np.isnan(losses).any():  # the largest of such scores would be the first
                raise CheckpointError(f"{model.path}: {NOT_NUMBERS}")
            scores[batches.indices(index)] = -losses
        heartbeat()
    ends = np.cumsum([len(question.choices) for question in questions.questions])
    return np.split(scores, ends[:-1])


def _row(questions: ChoiceSet, scores: Sequence[Floats]) -> Row:
    right, right_by_byte = [], []
    for question, score in zip(questions.questions, scores, strict=True):
        sizes = np.array([len(choice.encode()) for choice in question.choices])
        right.append(int(score.argmax()) == question.answer)
        right_by_byte.append(int((score / sizes).argmax()) == question.answer)
    chance = float(np.mean([1 / len(question.choices) for question in questions.questions]))
    return {
        "source": "choices",
        "dataset": questions.name,
        "questions": len(right),
        "accuracy": float(np.mean(right)),
        "accuracy_error": _standard_error(right),
        "byte_accuracy": float(np.mean(right_by_byte)),
        "byte_accuracy_error": _standard_error(right_by_byte),
        "chance": chance,
        "cut_contexts": questions.cut,
    }


def _standard_error(right: Sequence[bool]) -> float | None:
    """Of a mean of answers that are right or wrong; None for one answer."""
    if len(right) < 2:
        return None
    mean = float(np.mean(right))
    return math.sqrt(mean * (1 - mean) / (len(right) - 1))


def _agreed(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _within(sequence: ScoredSequence, length: int, question: Question) -> ScoredSequence:
    """The sequence's last `length` + 1 tokens."""
    lost = max(0, len(sequence.tokens) - (length + 1))
    if sequence.first - lost < 1:
        raise DataError(
            f"{question.source}: a choice of {sequence.targets} tokens is longer than the model's window of {length}; "
            "shorten or remove it"
        )
    return ScoredSequence(sequence.tokens[lost:], sequence.first - lost)


def _question(line: bytes, source: str) -> Question:
    try:
        content = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{source}: is not JSON ({error}); mend or remove the line") from None
    if not isinstance(content, dict) or not {"context", "choices", "answer"} <= content.keys():
        raise DataError(f'{source}: give {{"context": TEXT, "choices": [TEXT, ...], "answer": PLACE}}')
    context, choices, answer = (content[name] for name in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise DataError(f"{source}: context is not a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"{source}: choices must be two or more texts, none of them empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{source}: answer must be the place of the right choice, 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer, source)
