"""Drawing tokens, and texts that grow beyond the model's window."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import torch

from megalm.config.schema import SampleSection
from megalm.train.text_samples import draw, generate, token_weights
from tests.number_tokenizer import Numbers

T = TypeVar("T")
VOCAB, EOD = 20, 19


class Alone:
    def broadcast(self, value: T) -> T:
        return value


class CountsUp:
    """Predicts the number after the last one; EOD after 18. Remembers the widths that it was asked for."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.widths.append(tokens.shape[1])
        logits = np.zeros((len(tokens), VOCAB), np.float32)
        logits[np.arange(len(tokens)), tokens[np.arange(len(tokens)), positions] + 1] = 50.0
        return logits


def test_texts_go_on_to_their_end_or_the_limit() -> None:
    settings = SampleSection(prompts=("3", "1 2", "16"), max_new_tokens=5, temperature=0.0)
    texts = generate(CountsUp(), Alone(), Numbers(VOCAB), settings, sequence_length=128, seed=0)
    assert texts == ["3 4 5 6 7 8", "1 2 3 4 5 6 7", "16 17 18"]


def test_the_window_is_never_wider_than_the_model() -> None:
    model = CountsUp()
    prompt = " ".join(["1"] * 100)
    settings = SampleSection(prompts=(prompt,), max_new_tokens=4, temperature=0.0)
    assert generate(model, Alone(), Numbers(VOCAB), settings, 80, 0)[0].endswith("1 2 3 4 5")
    assert set(model.widths) == {80}


def test_an_empty_prompt_starts_a_document() -> None:
    class StartsAtZero(CountsUp):
        def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            assert tokens[0, 0] == EOD
            return np.eye(VOCAB, dtype=np.float32)[[0]]

    settings = SampleSection(prompts=("",), max_new_tokens=1, temperature=0.0)
    assert generate(StartsAtZero(), Alone(), Numbers(VOCAB), settings, 8, 0) == [f"{EOD} 0"]


def test_no_prompt_asks_nothing() -> None:
    model = CountsUp()
    assert generate(model, Alone(), Numbers(VOCAB), SampleSection(), 8, 0) == []
    assert model.widths == []


def test_draw_follows_temperature_and_top_k() -> None:
    random = np.random.default_rng(0)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert draw(logits, SampleSection(temperature=0.0), [], random) == 0

    def shares(temperature: float, top_k: int | None) -> np.ndarray:
        settings = SampleSection(temperature=temperature, top_k=top_k)
        drawn = [draw(logits, settings, [], random) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, None), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 2), [0.625, 0.375, 0, 0], atol=0.03)
    assert shares(0.2, None)[0] > 0.9
    assert shares(5.0, None)[3] > 0.15


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.6},
        {"top_p": 1e-9},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5, "temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_tokens_are_as_likely_as_in_transformers(settings: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32) * 3
    text = [4, 7, 7, 12]
    chosen = SampleSection(**{"temperature": 1.0, "top_k": None, **settings})
    scores = torch.from_numpy(logits)[None]
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty),
        transformers.TemperatureLogitsWarper(chosen.temperature),
        *([] if chosen.top_k is None else [transformers.TopKLogitsWarper(chosen.top_k)]),
        transformers.TopPLogitsWarper(chosen.top_p),
        transformers.MinPLogitsWarper(chosen.min_p),
    ]
    for step in steps:
        scores = step(torch.tensor([text]), scores)
    weights = token_weights(logits, chosen, text)
    np.testing.assert_allclose(weights / weights.sum(), scores[0].softmax(0).numpy(), rtol=1e-5)


def test_the_repetition_penalty_acts_on_the_most_likely_token_too() -> None:
    settings = SampleSection(temperature=0.0, repetition_penalty=2.0)
    logits = np.array([3.0, 2.0, -1.0], np.float32)
    assert draw(logits, settings, [0], np.random.default_rng(0)) == 1
    assert draw(logits, settings, [], np.random.default_rng(0)) == 0


def test_draw_survives_the_smallest_temperature() -> None:
    settings = SampleSection(temperature=1e-320, top_k=None)
    assert draw(np.array([1.0, 2.0, 1.5], np.float32), settings, [], np.random.default_rng(0)) == 1


def test_draw_survives_huge_logits() -> None:
    assert draw(np.array([1e4, -1e4, 0], np.float32), SampleSection(), [], np.random.default_rng(0)) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_draws_the_same_text_again(seed: int) -> None:
    class Flat(CountsUp):
        def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            return np.zeros((len(tokens), EOD), np.float32)

    settings = SampleSection(prompts=("1", "2"), max_new_tokens=8, temperature=1.0, top_k=None)
    once = generate(Flat(), Alone(), Numbers(VOCAB), settings, 64, seed)
    assert once == generate(Flat(), Alone(), Numbers(VOCAB), settings, 64, seed)
    assert once != generate(Flat(), Alone(), Numbers(VOCAB), settings, 64, seed + 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_id_without_a_token_is_never_drawn(temperature: float) -> None:
    """Those that pad the model's vocabulary, and gaps in the tokenizer's, are the likeliest here."""

    class Gaps(Numbers):
        def known_ids(self) -> np.ndarray:
            known = np.ones(VOCAB, np.bool_)
            known[3:9] = False
            return known

    class Padded(CountsUp):
        def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            logits = np.zeros((len(tokens), 4 * VOCAB), np.float32)
            logits[:, VOCAB:] = logits[:, 3:9] = 80.0
            logits[:, [1, 12]] = 20.0
            return logits

    settings = SampleSection(prompts=("1",), max_new_tokens=40, temperature=temperature, top_k=None)
    drawn = {int(word) for word in generate(Padded(), Alone(), Gaps(VOCAB), settings, 64, 0)[0].split()}
    assert drawn == ({1} if temperature == 0 else {1, 12})
