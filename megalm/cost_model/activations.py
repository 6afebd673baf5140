"""Bytes that the forward pass keeps for the backward pass, and that the loss needs, by formula.

For the block of megalm/model: pre-norm, separate query, key and value projections, attention, GELU or SwiGLU.
What is counted is what PyTorch's autograd saves; sums of residuals save nothing.
"""

from __future__ import annotations

import math

from megalm.cost_model.shard_sizes import Share
from megalm.model.attention_tiles import kept_probabilities
from megalm.model.model_config import ModelConfig


def activation_bytes(
    share: Share,
    micro_batch: int,
    sequence_length: int,
    element_bytes: int,
    checkpoint_every: int,
    document_mask: bool = False,
    on_cpu: bool = False,
    micro_batches: int = 1,
) -> int:
    """Bytes that a rank keeps from forward to backward, of all micro-batches that its stage has under way.

    Args:
        element_bytes: 2 for bf16 and fp16, 4 for fp32.
        checkpoint_every: every n-th block keeps its input only and is computed again; 0: none.
        on_cpu: where RMS norms have no fused kernel, and attention keeps the probabilities of shorter sequences.
        micro_batches: of one step.
    """
    tokens = micro_batch * sequence_length
    block = tokens * block_bytes_per_token(share, element_bytes, on_cpu)
    if on_cpu:
        block += micro_batch * share.heads * kept_probabilities(sequence_length) * element_bytes
    hidden = tokens * share.shape.hidden_size * element_bytes // share.slices
    blocks = range(share.first_block, share.first_block + share.blocks)
    recomputed = len([index for index in blocks if checkpoint_every and index % checkpoint_every == 0])
    kept = (share.blocks - recomputed) * block + recomputed * hidden
    norm_bytes = _norm_bytes(share.shape.style == "llama", element_bytes, on_cpu)
    # The last stage's final norm and what the head reads; of another stage what it has sent on.
    end = tokens * share.shape.hidden_size * norm_bytes // share.slices + hidden if share.is_last else hidden
    mask = tokens * 4 if document_mask else 0  # document numbers; attention makes its masks block by block
    working = 2 * hidden + (block if recomputed else 0)  # gradients, and the one block that is computed again
    return (kept + end + mask) * share.in_flight(micro_batches) + working


def block_bytes_per_token(share: Share, element_bytes: int, on_cpu: bool = False) -> int:
    """Bytes that one block saves for each token; key and value heads are counted repeated, as attention keeps them."""
    shape = share.shape
    stream, inner = shape.hidden_size // share.slices, shape.intermediate_size // share.tensor
    queries, keys = share.heads * shape.head_dim, share.key_value_heads * shape.head_dim
    norms = 2 * stream * _norm_bytes(shape.style == "llama", element_bytes, on_cpu)
    if shape.qk_norm:
        norms += (queries + keys) * _norm_bytes(True, element_bytes, on_cpu)
    # What query, key and value read and what the MLP reads; queries, keys, values and the output of attention.
    elements = 2 * stream + 4 * queries
    elements += 2 * inner if shape.style == "gpt2" else 4 * inner  # up, gelu | gate, silu, up, product
    dropout_masks = 2 * stream if shape.dropout > 0 else 0  # one byte each
    return norms + elements * element_bytes + dropout_masks


def _norm_bytes(rms: bool, element_bytes: int, on_cpu: bool) -> int:
    """Bytes an element that a norm saves: its input; without a fused RMS norm, the input and the result in fp32."""
    return 8 if on_cpu and rms else element_bytes


def loss_bytes(shape: ModelConfig, tokens: int, element_bytes: int, chunk_tokens: int, tensor: int = 1) -> int:
    """Bytes of the chunked cross-entropy at its largest: a chunk's logits several times over, and two gradients."""
    vocabulary = math.ceil(shape.vocab_size / tensor)
    chunk = min(tokens, chunk_tokens)
    logits = chunk * vocabulary * (2 * element_bytes + 4)  # logits, their gradient; probabilities in fp32
    hidden_gradient = tokens * shape.hidden_size * element_bytes
    # Summed in fp32, with the product of one chunk beside it.
    weight_gradient = vocabulary * shape.hidden_size * (4 + element_bytes)
    return logits + hidden_gradient + weight_gradient
