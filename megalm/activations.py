"""Bytes that the forward pass keeps for the backward pass, and that the loss needs, by formula.

For the block of megalm/model: pre-norm, separate query, key and value projections, attention that keeps no T x T
matrix, GELU or SwiGLU. What is counted is what PyTorch's autograd saves; sums of residuals save nothing.
"""

from __future__ import annotations

import math

from megalm.model.shape import ModelShape
from megalm.topology import Topology


def activation_bytes(
    shape: ModelShape,
    micro_batch: int,
    sequence_length: int,
    element_bytes: int,
    checkpoint_every: int,
    topology: Topology,
    document_mask: bool = False,
) -> int:
    """Bytes kept from forward to backward by one micro-batch, on the fullest rank.

    Args:
        element_bytes: 2 for bf16 and fp16, 4 for fp32.
        checkpoint_every: every n-th block keeps its input only and is computed again; 0: none.
    """
    tokens = micro_batch * sequence_length
    layers = math.ceil(shape.num_hidden_layers / topology.pipeline)
    block = tokens * block_elements_per_token(shape, topology.tensor) * element_bytes
    block_input = tokens * shape.hidden_size * element_bytes
    recomputed = math.ceil(layers / checkpoint_every) if checkpoint_every else 0
    kept = (layers - recomputed) * block + recomputed * block_input
    working = block if recomputed else 0  # the one block that is being computed again
    ends = tokens * shape.hidden_size * element_bytes * 2  # the embeddings' output and the last norm's
    mask = micro_batch * sequence_length * sequence_length if document_mask else 0
    in_flight = topology.pipeline  # micro-batches that a pipeline's first stage has under way
    return (kept + ends + mask) * in_flight + working + 2 * block_input


def block_elements_per_token(shape: ModelShape, tensor: int = 1) -> int:
    """Elements that one block saves for each token."""
    hidden = shape.hidden_size
    queries = shape.num_attention_heads * shape.head_dim // tensor
    keys = shape.num_key_value_heads * shape.head_dim // tensor
    inner = shape.intermediate_size // tensor
    norms = 2 * hidden  # their inputs: the residual stream, twice
    projections = 2 * hidden  # what query, key and value read, and what the MLP reads
    # Attention keeps queries, its output, and keys and values repeated to as many heads.
    attention = 4 * queries
    if shape.num_key_value_heads != shape.num_attention_heads:
        attention += 2 * keys
    if shape.qk_norm:
        attention += queries + keys
    mlp = 2 * inner if shape.style == "gpt2" else 4 * inner  # up, gelu | gate, silu, up, product
    dropout = 2 * hidden if shape.dropout > 0 else 0
    return norms + projections + attention + mlp + dropout


def loss_bytes(shape: ModelShape, tokens: int, element_bytes: int, chunk_tokens: int, tensor: int = 1) -> int:
    """Bytes of the chunked cross-entropy at its largest: a chunk's logits several times over, and two gradients."""
    vocabulary = math.ceil(shape.vocab_size / tensor)
    chunk = min(tokens, chunk_tokens)
    logits = chunk * vocabulary * (2 * element_bytes + 4)  # logits, their gradient; probabilities in fp32
    hidden_gradient = tokens * shape.hidden_size * element_bytes
    # Summed in fp32, with the product of one chunk beside it.
    weight_gradient = vocabulary * shape.hidden_size * (4 + element_bytes)
    return logits + hidden_gradient + weight_gradient
