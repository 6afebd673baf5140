"""The same weights in Hugging Face's GPT-2 and Llama give the same logits and gradients, to 1e-5 in fp32.

The two add the same products in other orders (fused projections, another attention kernel), which costs a few of
fp32's last bits: 1e-5 is about a hundred of them on logits of order one.
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


def _gpt2(shape: ModelConfig, model: LanguageModel) -> tuple[nn.Module, Callable[[nn.Module], dict[str, Tensor]]]:
    """GPT-2 keeps its matrices transposed, and query, key and value in one."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=shape.hidden_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_positions=LENGTH,
        layer_norm_epsilon=shape.norm_epsilon,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()

    def weights(of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Their names, made from ours by `of`."""
        result = {"wte.weight": of("embedding.tokens.weight"), "wpe.weight": of("embedding.positions.weight")}
        result |= {f"ln_f.{kind}": of(f"final_norm.{kind}") for kind in ("weight", "bias")}
        for layer in range(shape.num_hidden_layers):
            for kind in ("weight", "bias"):
                ours, here = f"layers.{layer}", f"h.{layer}"
                fused = [of(f"{ours}.attention.{part}.{kind}") for part in ("query", "key", "value")]
                result[f"{here}.attn.c_attn.{kind}"] = torch.cat(fused).t()
                result[f"{here}.attn.c_proj.{kind}"] = of(f"{ours}.attention.output.{kind}").t()
                result[f"{here}.mlp.c_fc.{kind}"] = of(f"{ours}.mlp.up.{kind}").t()
                result[f"{here}.mlp.c_proj.{kind}"] = of(f"{ours}.mlp.down.{kind}").t()
                result[f"{here}.ln_1.{kind}"] = of(f"{ours}.attention_norm.{kind}")
                result[f"{here}.ln_2.{kind}"] = of(f"{ours}.mlp_norm.{kind}")
        return result

    with torch.no_grad():
        for name, value in weights(model.get_parameter).items():
            theirs.transformer.get_parameter(name).copy_(value)

    def gradients(other: nn.Module) -> dict[str, Tensor]:
        expected = weights(lambda name: model.get_parameter(name).grad)
        return {name: other.transformer.get_parameter(name).grad for name in expected}

    model.weights_as_theirs = weights  # type: ignore[assignment]
    return theirs, gradients


@pytest.mark.parametrize(
    "section",
    [
        ModelSection(style="llama", **SIZES),
        ModelSection(style="llama", num_key_value_heads=2, tie_word_embeddings=True, rope_theta=500.0, **SIZES),
        ModelSection(style="llama", num_key_value_heads=1, intermediate_size=72, **SIZES),
        ModelSection(style="gpt2", **SIZES),
    ],
    ids=["llama", "llama-gqa-tied", "llama-mqa", "gpt2"],
)
def test_same_logits_and_gradients(section: ModelSection) -> None:
    shape, model = _build(section)
    theirs, their_gradients = _gpt2(shape, model) if shape.style == "gpt2" else _llama(shape, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    labels = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    labels[0, :5] = -100

    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    total, count = model(tokens, labels)
    (total / count).backward()
    logits = theirs(tokens).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    if shape.style == "gpt2":
        ours = model.weights_as_theirs(lambda name: model.get_parameter(name).grad)  # type: ignore[operator]
    else:
        ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in their_gradients(theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


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
