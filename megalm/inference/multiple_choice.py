"""Multiple-choice questions: the checkpoint's answer is the choice with the largest log-likelihood after the context.

Context and choice are encoded as one text. Scoring starts after the tokens that the context alone and the context with
each choice have in common, so it starts at the same token for all choices, even if a token spans the boundary. The
context begins as a document in training: with its bos_id, or after an end-of-document token, unless data.document_mask
separated documents there.
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
from megalm.inference.batching import ScoredSequence, SequenceBatches, common_prefix, evenly
from megalm.inference.dataset_eval import Row
from megalm.inference.inference_model import COMPUTES_NAN, CheckpointFacts, InferenceModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice."""

    context: str
    choices: tuple[str, ...]
    answer: int
    source: str  # "file:line"


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
        self._sets = [(one, SequenceBatches(one.sequences, batch_size)) for one in sets]

    @property
    def batches(self) -> int:
        return sum(len(batches) for _, batches in self._sets)

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        return [_row(one, log_likelihoods(one, batches, model, heartbeat)) for one, batches in self._sets]


def read_choices(path: Path, facts: CheckpointFacts, max_samples: int | None = None) -> ChoiceSet:
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
        found = encode_question(question, facts)
        sequences += [_within(sequence, facts.sequence_length, question) for sequence in found]
        cut += any(len(sequence.tokens) > facts.sequence_length + 1 for sequence in found)
    return ChoiceSet(str(path), tuple(questions), tuple(sequences), cut)


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines {"context": ..., "choices": [...], "answer": index}; other fields are ignored.

    Raises:
        DataError: the file cannot be read, or a line is not a question.
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
        raise DataError(f"{path} has no question; give JSON lines of context, choices and answer")
    return found


def encode_question(question: Question, facts: CheckpointFacts) -> list[ScoredSequence]:
    """Encode each choice; all sequences have the same tokens before the first scored one.

    Raises:
        DataError: the tokenizer encodes a choice to no token.
    """
    tokenizer = facts.tokenizer
    texts = [question.context, *(question.context + choice for choice in question.choices)]
    try:
        before, *together = (tokens.tolist() for tokens in tokenizer.encode_batch(texts))
    except DataError as error:
        raise DataError(f"{question.source}: {error}") from error
    if not all(together):
        raise DataError(f"{question.source}: the tokenizer encodes a choice to no token; change or remove the choice")
    common = min(min(common_prefix(before, tokens), len(tokens) - 1) for tokens in together)
    # The first scored token needs a token before it.
    start = tokenizer.text_start(facts.document_mask) or ([] if common else [tokenizer.eod_id])
    return [ScoredSequence(np.array([*start, *tokens]), len(start) + common) for tokens in together]


def log_likelihoods(
    questions: ChoiceSet, batches: SequenceBatches, model: InferenceModel, heartbeat: Callable[[], None]
) -> list[Floats]:
    """The log-likelihoods in nats of each question's choices.

    Raises:
        CheckpointError: one is NaN.
    """
    scores = np.zeros(len(questions.sequences))
    for index, batch in enumerate(batches):
        for micro_batch in batch.micro_batches:
            losses = model.row_losses(micro_batch)
            if np.isnan(losses).any():  # argmax would choose a NaN
                raise CheckpointError(f"{model.path}: {COMPUTES_NAN}")
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


def _question(line: bytes, source: str) -> Question:
    try:
        content = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{source} is not JSON ({error}); correct or remove the line") from None
    if not isinstance(content, dict) or not {"context", "choices", "answer"} <= content.keys():
        raise DataError(f'{source}: give {{"context": TEXT, "choices": [TEXT, ...], "answer": INDEX}}')
    context, choices, answer = (content[name] for name in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise DataError(f"{source}: context must be a string")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"{source}: choices must be two or more strings, none of them empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{source}: answer must be the index of the right choice, 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer, source)
