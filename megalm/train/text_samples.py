"""Generate text from the model during training. Collective: every rank runs the forward passes, rank 0 draws tokens.

Shapes: P prompts, T sequence (padded on the right, which a causal model does not see), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megalm.communicator import Communicator
from megalm.config.schema import SampleSection
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.engine.interface import Engine
from megalm.train.console import RunConsole

_LENGTH_STEP = 64  # lengths are rounded up to this, so that few shapes occur
_SHOWN, _SHOWN_LINES = 3, 12  # at the end of a run


@dataclass(frozen=True)
class SampleWriter:
    """Writes `samples/step-N.txt`; the same step of the same run always draws the same text."""

    folder: Path
    settings: SampleSection
    sequence_length: int
    seed: int
    tokenizer: Tokenizer
    comm: Communicator
    reporter: RunConsole

    def preflight(self, engine: Engine) -> None:
        """Preflight: generate one token of each text."""
        one = self.settings.model_copy(update={"max_new_tokens": 1})
        generate(engine, self.comm, self.tokenizer, one, self.sequence_length, self.seed)

    def write(self, engine: Engine, step: int, show: bool) -> None:
        """Write the samples of `step`. Collective; `show` also prints the beginning of the texts."""
        texts = generate(engine, self.comm, self.tokenizer, self.settings, self.sequence_length, self.seed + step)
        if not texts or not self.comm.is_main:
            return
        parts = [f"--- prompt {prompt!r}\n{text}\n" for prompt, text in zip(self.settings.prompts, texts, strict=True)]
        path = self.folder / f"step-{step:08d}.txt"
        path.write_text("\n".join(parts), encoding="utf-8")
        self.reporter.info(f"step {step}: {len(texts)} samples in {path}")
        if show:
            for part in parts[:_SHOWN]:
                self.reporter.info("\n".join("    " + line for line in part.split("\n")[:_SHOWN_LINES]))


class Predictor(Protocol):
    """The part of `Engine` that generation needs."""

    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]: ...


def generate(
    engine: Predictor,
    comm: Communicator,
    tokenizer: Tokenizer,
    settings: SampleSection,
    sequence_length: int,
    seed: int,
) -> list[str]:
    """Continue each of `settings.prompts`; the prompt is part of the text.

    Each text ends at the end-of-document token or after `max_new_tokens`. If a text exceeds `sequence_length` tokens,
    the model sees only its last tokens.
    """
    if not settings.prompts:
        return []
    texts = prompt_tokens(tokenizer, settings.prompts)
    for _ in extend(engine, comm, texts, tokenizer, settings, sequence_length, seed):
        pass
    return [tokenizer.decode(text) for text in texts]


def prompt_tokens(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each prompt, as a document begins; of an empty one without a bos_id, the end of a document
    before it. A prompt that begins with the name of this token has it once."""
    name = tokenizer.bos_token or ""
    found = tokenizer.encode_batch([prompt.removeprefix(name) for prompt in prompts])
    return [tokenizer.begun(ids).tolist() or [tokenizer.eod_id] for ids in found]


def extend(
    engine: Predictor,
    comm: Communicator,
    texts: list[list[int]],
    tokenizer: Tokenizer,
    settings: SampleSection,
    sequence_length: int,
    seed: int,
) -> Iterator[None]:
    """Extend `texts`, lists of tokens, in place by one token each per yield; see `generate`.

    Ids without a token are never drawn: gaps in the tokenizer's vocabulary, and rows that pad the model's.
    """
    eod_id, known = tokenizer.eod_id, tokenizer.known_ids()
    open_texts = set(range(len(texts)))
    random = np.random.default_rng(seed)
    for _ in range(settings.max_new_tokens):
        windows = [text[-sequence_length:] for text in texts]
        longest = max(len(window) for window in windows)
        length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, sequence_length)
        tokens = np.zeros((len(texts), length), dtype=np.int64)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = window
        positions = np.array([len(window) - 1 for window in windows], dtype=np.int64)
        logits = engine.next_token_logits(tokens, positions)
        drawable = np.zeros(logits.shape[1], dtype=np.bool_)
        drawable[: len(known)] = known[: len(drawable)]
        logits = np.where(drawable, logits, np.float32(-np.inf))
        drawn = [draw(row, settings, text, random) for row, text in zip(logits, texts, strict=True)]
        chosen = comm.broadcast(drawn)
        for index in sorted(open_texts):
            if chosen[index] == eod_id:
                open_texts.discard(index)
            else:
                texts[index].append(chosen[index])
        if not open_texts:
            break
        yield


def draw(
    logits: npt.NDArray[np.float32], settings: SampleSection, text: Sequence[int], random: np.random.Generator
) -> int:
    """Draw one token from fp32 logits [V] with `token_weights`; temperature 0 takes the most likely one."""
    weights = token_weights(logits, settings, text)
    if settings.temperature == 0:
        return int(weights.argmax())
    return int(random.choice(len(weights), p=weights / weights.sum()))


def token_weights(
    logits: npt.NDArray[np.float32], settings: SampleSection, text: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return the weights [V] that tokens are drawn with; at temperature 0 the logits.

    The settings act in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        text: the tokens so far, which the repetition penalty makes less likely.
    """
    values = logits.astype(np.float64)
    if settings.repetition_penalty != 1:
        seen = np.unique(np.asarray(text, dtype=np.int64))
        factors = np.where(values[seen] > 0, 1 / settings.repetition_penalty, settings.repetition_penalty)
        values[seen] *= factors
    if settings.temperature == 0:
        return values
    with np.errstate(over="ignore"):  # at temperatures near 0 all but the top logit overflow
        values = (values - values.max()) / settings.temperature
    if settings.top_k is not None and settings.top_k < len(values):
        values[values < np.partition(values, -settings.top_k)[-settings.top_k]] = -np.inf
    weights = np.exp(values)
    weights /= weights.sum()
    if settings.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= settings.top_p]] = 0.0  # the most likely token has none before it
    if settings.min_p > 0:
        weights[weights < settings.min_p * weights.max()] = 0.0
    return weights
