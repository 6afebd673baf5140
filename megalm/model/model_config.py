"""The model's dimensions and the exact shape of every parameter, as integers: no torch.

The one place where defaults of the model section become numbers. The model is built from a `ModelConfig`, the
plan counts its parameters and memory, and a test holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalm.config.schema import ModelSection, ModelStyle


@dataclass(frozen=True)
class ModelConfig:
    """Every dimension resolved. H hidden, D head_dim, V vocabulary, F intermediate."""

    style: ModelStyle
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    norm_epsilon: float
    qk_norm: bool
    dropout: float
    attention_dropout: float
    initializer_range: float

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter of the unsharded model, in the model's order."""
        gpt2 = self.style == "gpt2"
        shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (self.vocab_size, self.hidden_size)}
        if gpt2:
            shapes["embedding.positions.weight"] = (self.max_position_embeddings, self.hidden_size)
        for layer in range(self.num_hidden_layers):
            for name, shape in self._block_parameters(bias=gpt2).items():
                shapes[f"layers.{layer}.{name}"] = shape
        shapes |= self._norm("final_norm", bias=gpt2)
        if not self.tie_word_embeddings:
            shapes["head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters().values())

    def _norm(self, name: str, bias: bool) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden_size,)}
        return shapes | ({f"{name}.bias": (self.hidden_size,)} if bias else {})

    def _block_parameters(self, bias: bool) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        linears = {
            "attention.query": (queries, hidden),
            "attention.key": (keys, hidden),
            "attention.value": (keys, hidden),
            "attention.output": (hidden, queries),
        }
        mlp = {"mlp.up": (inner, hidden), "mlp.down": (hidden, inner)}
        if self.style == "llama":
            mlp = {"mlp.gate": (inner, hidden), **mlp}

        def with_bias(items: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
            shapes: dict[str, tuple[int, ...]] = {}
            for name, shape in items.items():
                shapes[f"{name}.weight"] = shape
                if bias:
                    shapes[f"{name}.bias"] = shape[:1]
            return shapes

        shapes = self._norm("attention_norm", bias) | with_bias(linears)
        if self.qk_norm:
            shapes |= {"attention.query_norm.weight": (self.head_dim,), "attention.key_norm.weight": (self.head_dim,)}
        return shapes | self._norm("mlp_norm", bias) | with_bias(mlp)


def build_model_config(model: ModelSection, vocab_size: int, sequence_length: int) -> ModelConfig:
    """Resolve the defaults of the model section; assumes that config.checks has passed it.

    Args:
        vocab_size: the tokenizer's, used where `model.vocab_size` is not set, padded to `model.vocab_multiple`.
        sequence_length: tokens in a sample; the default of `max_position_embeddings`.
    """
    gpt2 = model.style == "gpt2"
    multiple = model.vocab_multiple or 1
    swiglu_size = math.ceil(model.hidden_size * 8 / 3 / 64) * 64
    return ModelConfig(
        style=model.style,
        vocab_size=model.vocab_size or math.ceil(vocab_size / multiple) * multiple,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        intermediate_size=model.intermediate_size or (4 * model.hidden_size if gpt2 else swiglu_size),
        max_position_embeddings=model.max_position_embeddings or sequence_length,
        tie_word_embeddings=gpt2 if model.tie_word_embeddings is None else model.tie_word_embeddings,
        rope_theta=model.rope_theta,
        norm_epsilon=model.norm_epsilon,
        qk_norm=model.qk_norm,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        initializer_range=model.initializer_range,
    )
