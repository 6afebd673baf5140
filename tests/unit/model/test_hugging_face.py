"""A batch of conversations has the loss and the gradients of Hugging Face's labels, to 1e-5 in fp32.

`huggingface/test_families.py` compares logits and gradients of all families.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megalm.config.schema import ModelSection
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.trained_tokens import trained_path
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, ValidationLoader
from megalm.data.sampling.samples import ValidationSamples
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.transformer import LanguageModel, initialize

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 61, 20
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}


def _build(section: ModelSection) -> tuple[ModelConfig, LanguageModel]:
    shape = build_model_config(section, VOCAB, LENGTH)
    model = LanguageModel(shape, chunk_tokens=7)
    initialize(model, shape, seed=3)
    with torch.no_grad():  # gains of 1 and biases of 0 would hide a swapped pair
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return shape, model


def _llama(shape: ModelConfig, model: LanguageModel) -> tuple[nn.Module, Callable[[nn.Module], dict[str, Tensor]]]:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=LENGTH,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {
        "embedding.tokens": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "layers.": "model.layers.",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }

    def translate(name: str) -> str:
        for ours, other in names.items():
            name = name.replace(ours, other)
        return name

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs.get_parameter(translate(name)).copy_(parameter)
    return theirs, lambda other: {
        name: other.get_parameter(translate(name)).grad for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize(("micro", "ranks"), [(4, 1), (1, 1), (2, 2), (1, 4)])
def test_tokens_that_are_not_trained(tmp_path: Path, micro: int, ranks: int) -> None:
    """A batch of conversations, of unequal targets on all ranks: the loss and gradients of labels of -100."""
    prefix, random = tmp_path / "chats", np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.append(random.integers(0, VOCAB, size=4 * LENGTH - 3))
    trained = random.random(4 * LENGTH) < np.repeat([0.1, 0.9, 0.0, 0.5], LENGTH)
    trained_path(prefix).write_bytes(np.packbits(trained[:-3], bitorder="little").tobytes())
    samples = ValidationSamples(IndexedDataset(prefix), (0, 1), LENGTH - 1)
    batches = [next(iter(ValidationLoader(samples, BatchLayout(4, micro, rank, ranks)))) for rank in range(ranks)]

    shape, model = _build(ModelSection(style="llama", **SIZES))
    theirs, their_gradients = _llama(shape, model)
    losses = []
    for batch in batches:
        for part in batch.micro_batches:
            total, _ = model(torch.from_numpy(part.tokens), torch.from_numpy(part.labels))
            (total / batch.divisor).backward()
            losses.append(total.detach() / batch.divisor)
    places = np.stack([samples.place(index).positions for index in range(4)])
    tokens, marks = torch.from_numpy(samples.dataset.read(places)), torch.from_numpy(trained[places])
    expected = theirs(tokens, labels=tokens.masked_fill(~marks, -100)).loss
    expected.backward()

    torch.testing.assert_close(torch.stack(losses).sum(), expected, rtol=1e-5, atol=1e-5)
    for name, gradient in their_gradients(theirs).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-5)
