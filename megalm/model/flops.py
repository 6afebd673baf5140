"""The work of training, counted: no torch."""

from __future__ import annotations

import math

from megalm.model.model_config import ModelConfig


def flops_per_token(shape: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of the forward and the backward pass, per token of a full sequence.

    Counted: 6 for each parameter of a matrix product (2 forward, 4 backward), the head included even where it is
    tied; and attention's own products, 12 x layers x T x heads x head_dim, halved because the mask is causal. Not
    counted: looking up embeddings, norms, activations, the softmax, and what activation checkpointing repeats.
    """
    layer_matrices = sum(
        math.prod(dims) for name, dims in shape.parameters().items() if name.startswith("layers.") and len(dims) == 2
    )
    head = shape.vocab_size * shape.hidden_size
    attention = 6 * shape.num_hidden_layers * sequence_length * shape.num_attention_heads * shape.head_dim
    return 6 * (layer_matrices + head) + attention
