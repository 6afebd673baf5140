"""Drawing tokens, and texts that grow beyond the model's window."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest

from megalm.config.schema import SampleSection
from megalm.train.text_samples import draw, generate

T = TypeVar("T")
VOCAB, EOD = 20, 19


class Alone:
    def broadcast(self, value: T) -> T:
        return value


class Numbers:
    eod_id = EOD

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def known_ids(self) -> np.ndarray:
        return np.ones(VOCAB, np.bool_)


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
    texts = generate(CountsUp(), Alone(), Numbers(), settings, sequence_length=128, seed=0)
    assert texts == ["3 4 5 6 7 8", "1 2 3 4 5 6 7", "16 17 18"]


def test_the_window_is_never_wider_than_the_model() -> None:
    model = CountsUp()
    prompt = " ".join(["1"] * 100)
    settings = SampleSection(prompts=(prompt,), max_new_tokens=4, temperature=0.0)
    assert generate(model, Alone(), Numbers(), settings, 80, 0)[0].endswith("1 2 3 4 5")
    assert set(model.widths) == {80}


def test_an_empty_prompt_starts_a_document() -> None:
    class StartsAtZero(CountsUp):
        def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            assert tokens[0, 0] == EOD
            return np.eye(VOCAB, dtype=np.float32)[[0]]

    settings = SampleSection(prompts=("",), max_new_tokens=1, temperature=0.0)
    assert generate(StartsAtZero(), Alone(), Numbers(), settings, 8, 0) == [f"{EOD} 0"]


def test_no_prompt_asks_nothing() -> None:
    model = CountsUp()
    assert generate(model, Alone(), Numbers(), SampleSection(), 8, 0) == []
    assert model.widths == []


def test_draw_follows_temperature_and_top_k() -> None:
    random = np.random.default_rng(0)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert draw(logits, 0.0, None, random) == 0

    def shares(temperature: float, top_k: int | None) -> np.ndarray:
        drawn = [draw(logits, temperature, top_k, random) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, None), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 2), [0.625, 0.375, 0, 0], atol=0.03)
    assert shares(0.2, None)[0] > 0.9
    assert shares(5.0, None)[3] > 0.15


def test_draw_survives_the_smallest_temperature() -> None:
    assert draw(np.array([1.0, 2.0, 1.5], np.float32), 1e-320, None, np.random.default_rng(0)) == 1


def test_draw_survives_huge_logits() -> None:
    assert draw(np.array([1e4, -1e4, 0], np.float32), 0.7, 50, np.random.default_rng(0)) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_draws_the_same_text_again(seed: int) -> None:
    class Flat(CountsUp):
        def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            return np.zeros((len(tokens), EOD), np.float32)

    settings = SampleSection(prompts=("1", "2"), max_new_tokens=8, temperature=1.0, top_k=None)
    once = generate(Flat(), Alone(), Numbers(), settings, 64, seed)
    assert once == generate(Flat(), Alone(), Numbers(), settings, 64, seed)
    assert once != generate(Flat(), Alone(), Numbers(), settings, 64, seed + 1)


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
    drawn = {int(word) for word in generate(Padded(), Alone(), Gaps(), settings, 64, 0)[0].split()}
    assert drawn == ({1} if temperature == 0 else {1, 12})
