"""Bytes that the forward pass keeps for the backward pass, and that the loss needs, by formula.

For the block of megalm/model: pre-norm, separate query, key and value projections, attention, GELU or SwiGLU.
What is counted is what PyTorch's autograd saves; sums of residuals save nothing.
"""

from __future__ import annotations

import math

from megalm.model.query_blocks import kept_probabilities
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
    on_cpu: bool = False,
) -> int:
    """Bytes kept from forward to backward by one micro-batch, on the fullest rank.

    Args:
        element_bytes: 2 for bf16 and fp16, 4 for fp32.
        checkpoint_every: every n-th block keeps its input only and is computed again; 0: none.
        on_cpu: where RMS norms have no fused kernel, and attention keeps the probabilities of shorter sequences.
    """
    tokens = micro_batch * sequence_length
    layers = math.ceil(shape.num_hidden_layers / topology.pipeline)
    block = tokens * block_bytes_per_token(shape, element_bytes, topology.tensor, on_cpu)
    if on_cpu:
        heads = shape.num_attention_heads // topology.tensor
        block += micro_batch * heads * kept_probabilities(sequence_length) * element_bytes
    hidden = tokens * shape.hidden_size * element_bytes
    recomputed = math.ceil(layers / checkpoint_every) if checkpoint_every else 0
    kept = (layers - recomputed) * block + recomputed * hidden
    norm_bytes = _norm_bytes(shape.style == "llama", element_bytes, on_cpu)
    final_norm = tokens * shape.hidden_size * norm_bytes + hidden
    mask = tokens * 4 if document_mask else 0  # document numbers; attention makes its masks block by block
    in_flight = topology.pipeline  # micro-batches that a pipeline's first stage has under way
    working = 2 * hidden + (block if recomputed else 0)  # gradients, and the one block that is computed again
    return (kept + final_norm + mask) * in_flight + working


def block_bytes_per_token(shape: ModelShape, element_bytes: int, tensor: int = 1, on_cpu: bool = False) -> int:
    """Bytes that one block saves for each token; key and value heads are counted repeated, as attention keeps them."""
    hidden, inner = shape.hidden_size, shape.intermediate_size // tensor
    queries = shape.num_attention_heads * shape.head_dim // tensor
    keys = shape.num_key_value_heads * shape.head_dim // tensor
    norms = 2 * hidden * _norm_bytes(shape.style == "llama", element_bytes, on_cpu)
    if shape.qk_norm:
        norms += (queries + keys) * _norm_bytes(True, element_bytes, on_cpu)
    # What query, key and value read and what the MLP reads; queries, keys, values and the output of attention.
    elements = 2 * hidden + 4 * queries
    elements += 2 * inner if shape.style == "gpt2" else 4 * inner  # up, gelu | gate, silu, up, product
    dropout_masks = 2 * hidden if shape.dropout > 0 else 0  # one byte each
    return norms + elements * element_bytes + dropout_masks


def _norm_bytes(rms: bool, element_bytes: int, on_cpu: bool) -> int:
    """Bytes an element that a norm saves: its input; without a fused RMS norm, the input and the result in fp32."""
    return 8 if on_cpu and rms else element_bytes


def loss_bytes(shape: ModelShape, tokens: int, element_bytes: int, chunk_tokens: int, tensor: int = 1) -> int:
    """Bytes of the chunked cross-entropy at its largest: a chunk's logits several times over, and two gradients."""
    vocabulary = math.ceil(shape.vocab_size / tensor)
    chunk = min(tokens, chunk_tokens)
    logits = chunk * vocabulary * (2 * element_bytes + 4)  # logits, their gradient; probabilities in fp32
    hidden_gradient = tokens * shape.hidden_size * element_bytes
    # Summed in fp32, with the product of one chunk beside it.
    weight_gradient = vocabulary * shape.hidden_size * (4 + element_bytes)
    return logits + hidden_gradient + weight_gradient
