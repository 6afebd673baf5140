"""The scalings of the maximal-update parametrisation in the plain model."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.config.schema import ModelSection
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.parameter_groups import group_keys
from megalm.model.transformer import LanguageModel, initial_weight, initialize

VOCAB, LENGTH = 53, 16


def shape_of(base: int | None, **settings: object) -> ModelConfig:
    section = ModelSection(hidden_size=32, num_hidden_layers=2, mup_base_width=base, **settings)
    return build_model_config(section, VOCAB, LENGTH)


def model_of(shape: ModelConfig) -> LanguageModel:
    model = LanguageModel(shape)
    initialize(model, shape, seed=1)
    return model.eval()


@pytest.mark.parametrize("base", [8, 32, 64])
def test_matrices_of_blocks_start_by_the_root_of_the_multiplier(base: int) -> None:
    plain, scaled = shape_of(None, qkv_bias=True), shape_of(base, qkv_bias=True)
    for name, size in plain.parameters().items():
        own = 1 / math.sqrt(32 / base) if name.startswith("layers.") and len(size) == 2 else 1.0
        one, other = (initial_weight(name, size, shape, seed=5) for shape in (plain, scaled))
        torch.testing.assert_close(other, own * one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_divided_and_so_is_their_loss(style: str, tied: bool) -> None:
    """Beside a model whose other scalings are the same."""
    scaled = shape_of(8, style=style, tie_word_embeddings=tied)
    model, plain = model_of(scaled), LanguageModel(shape_of(None, style=style, tie_word_embeddings=tied, head_dim=8))
    plain.load_state_dict(model.state_dict())
    for block in plain.layers:
        block.attention.rule = model.layers[0].attention.rule
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    torch.testing.assert_close(logits, plain.eval()(tokens) / 4)
    total, count = model(tokens, tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == tokens.numel()


def test_at_the_base_width_only_the_scores_differ() -> None:
    """They are divided by head_dim, and the optimizer's groups are those without."""
    same, plain = shape_of(32), shape_of(None, attention_scale=1 / 8)
    models = [model_of(shape) for shape in (same, plain)]
    tokens = torch.arange(LENGTH).unsqueeze(0)
    assert torch.equal(models[0](tokens), models[1](tokens))
    assert not torch.equal(models[0](tokens), model_of(shape_of(None))(tokens))
    dimensions = {name: len(size) for name, size in same.parameters().items()}
    assert group_keys(dimensions, (), True) == group_keys(dimensions, (), True, width_multiplier=same.width_multiplier)
