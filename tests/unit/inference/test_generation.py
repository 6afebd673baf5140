"""Keys and values that are kept give the tokens that computing all anew gives; text comes in whole pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import ModelSection, SampleSection
from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer
from megalm.inference.generation import CachedModel, stream
from megalm.inference.inference_model import InferenceModel
from megalm.model.moe import routers
from megalm.train.text_samples import generate
from tests.inference_models import EXPERTS, GPT2, LLAMA, SIZES, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 40
PROMPTS = ("def read(", "", "x" * 30, "class größer:\n" * 5)


@pytest.fixture(
    scope="module",
    params=[LLAMA, ModelSection(style="llama", tie_word_embeddings=True, **SIZES), GPT2, EXPERTS],
    ids=["llama-gqa-qk-norm", "llama-tied", "gpt2", "experts"],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    return InferenceModel(write_run(tmp_path_factory.mktemp("run"), ByteTokenizer(), request.param, LENGTH))


def settings(temperature: float, tokens: int = 30, prompts: tuple[str, ...] = PROMPTS) -> SampleSection:
    return SampleSection(prompts=prompts, max_new_tokens=tokens, temperature=temperature, top_k=50)


class Whole:
    """A model that keeps nothing between calls."""

    def __init__(self, model: InferenceModel) -> None:
        self._model = model

    @torch.inference_mode()
    def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        rows, places = (torch.from_numpy(array).to(self._model.device) for array in (tokens, positions))
        return self._model.network(rows, positions=places).float().cpu().numpy()


@pytest.mark.parametrize(("temperature", "seeds"), [(0.0, 1), (0.7, 2), (1.5, 2)])
def test_the_same_texts(model: InferenceModel, temperature: float, seeds: int) -> None:
    """Prompts of all lengths, through the end of the window and beyond, where it begins to move."""
    for seed in range(seeds):
        texts = [
            generate(one, SingleProcessCommunicator(), model.tokenizer, settings(temperature), LENGTH, seed)
            for one in (Whole(model), CachedModel(model))
        ]
        assert texts[0] == texts[1]
    assert max(len(text.encode()) for text in texts[0]) > LENGTH


def test_a_bias_of_experts_is_read_in_fp32_and_chooses(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", ByteTokenizer(), EXPERTS, LENGTH)
    for dtype in (torch.float32, torch.bfloat16):
        model = InferenceModel(place, dtype=dtype)
        found = routers(model.network)
        assert len(found) == 2
        assert all(torch.equal(router.expert_bias, torch.linspace(-1, 1, 4)) for router in found.values())
    model = InferenceModel(place)
    tokens, positions = np.arange(20)[None], np.array([19])
    biased = Whole(model).next_token_logits(tokens, positions)
    for router in routers(model.network).values():
        router.expert_bias = torch.zeros(4)
    assert not np.array_equal(Whole(model).next_token_logits(tokens, positions), biased)


def test_the_same_logits_whatever_was_asked_before(model: InferenceModel) -> None:
    random = np.random.default_rng(0)
    cached = CachedModel(model)
    text = random.integers(0, 256, 30)
    other = np.concatenate([text[:11], random.integers(0, 256, 9)])
    for rows in ([text[:10]], [text[:11]], [text[:20]], [other], [text, other[:5]], [text[3:]], [other[:4]], [text]):
        tokens = np.zeros((len(rows), 32), dtype=np.int64)
        for row, values in enumerate(rows):
            tokens[row, : len(values)] = values
        positions = np.array([len(values) - 1 for values in rows])
        expected = Whole(model).next_token_logits(tokens, positions)
        np.testing.assert_allclose(cached.next_token_logits(tokens, positions), expected, rtol=1e-4, atol=1e-5)


def test_a_token_more_costs_a_token(model: InferenceModel) -> None:
    """What it is for: only what is new goes through the blocks."""
    widths: list[int] = []
    hook = model.network.layers[0].attention.query.register_forward_hook(  # type: ignore[union-attr]
        lambda _, inputs, __: widths.append(inputs[0].shape[1])
    )
    try:
        generate(
            CachedModel(model), SingleProcessCommunicator(), model.tokenizer, settings(0.0, 5, ("abcdef",)), LENGTH, 0
        )
    finally:
        hook.remove()
    assert widths == [6, 1, 1, 1, 1]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stream_joined_is_the_text(model: InferenceModel, prompt: str, seed: int) -> None:
    once = settings(1.5, 40, (prompt,))
    pieces = list(stream(CachedModel(model), model.tokenizer, prompt, once, LENGTH, seed))
    assert ["".join(pieces)] == generate(Whole(model), SingleProcessCommunicator(), model.tokenizer, once, LENGTH, seed)
    assert len(pieces) > 5


class Says:
    """Predicts the tokens of a text, one after the other."""

    def __init__(self, tokens: list[int], prompt: int, vocabulary: int) -> None:
        self._tokens, self._place, self._vocabulary = tokens, prompt, vocabulary

    def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits = np.zeros((1, self._vocabulary), np.float32)
        logits[0, self._tokens[self._place]] = 50.0
        self._place += 1
        return logits


@pytest.fixture(scope="module")
def pieces_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer([source_files()["textwrap.py"].read_text(encoding="utf-8")], path, vocab_size=500)
    return load_tokenizer(path)


def test_a_padded_vocabulary_generates_what_the_tokenizer_decodes(pieces_tokenizer: Tokenizer, tmp_path: Path) -> None:
    section = LLAMA.model_copy(update={"vocab_multiple": 4096})
    padded = InferenceModel(write_run(tmp_path, pieces_tokenizer, section, LENGTH))
    assert (padded.shape.vocab_size, pieces_tokenizer.vocab_size) == (4096, 500)
    (text,) = generate(
        Whole(padded), SingleProcessCommunicator(), pieces_tokenizer, settings(1.5, 60, ("a",)), LENGTH, 0
    )
    assert len(text) > 1
    assert "".join(stream(CachedModel(padded), pieces_tokenizer, "a", settings(1.5, 60), LENGTH, 0)) == text


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_of_several_tokens_come_whole(kind: str, pieces_tokenizer: Tokenizer) -> None:
    """Bytes of `ß`, `❌` and of an emoji are tokens of their own, and so is a space in front of a word."""
    tokenizer = ByteTokenizer() if kind == "bytes" else pieces_tokenizer
    prompt, continuation = "größe", " à ❌ a text\n    🎉 too "
    start, whole = (ids.tolist() for ids in tokenizer.encode_batch([prompt, prompt + continuation]))
    assert whole[: len(start)] == start
    says = Says([*whole, tokenizer.eod_id], len(start), tokenizer.vocab_size)
    pieces = list(stream(says, tokenizer, prompt, settings(0.0, 100), 200, 0))
    assert "".join(pieces) == prompt + continuation
    assert pieces[0] == prompt
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum("❌" in piece for piece in pieces) == 1


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    tokenizer = ByteTokenizer()
    says = Says([97, 0xE2, 0x9D, 98, 0xF0, 256], 1, 257)
    assert "".join(stream(says, tokenizer, "a", settings(0.0, 100), 200, 0)) == "a\ufffdb\ufffd"
