"""Causal attention on a CPU by plain matrix products, block of queries by block of queries.

torch's own CPU kernel reaches a fifth of the machine's matrix-product peak in bf16; products over a block of queries
and the keys up to that block's end reach more than twice that, and compile into few passes over the scores
(docs/performance.md has the figures). On a GPU the fused kernels are faster: megalm.model.attention chooses.

Shapes: B batch, N heads, T sequence, D head dimension, Q queries of a block, E end of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megalm.model.attention_tiles import keeps_probabilities, query_blocks


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over earlier tokens, of the same document if there are any.

    Args:
        query, key, value: [B, N, T, D], one floating type.
        documents: [B, T] document numbers, or None.

    Returns:
        [B, N, T, D]. In bf16 probabilities are rounded to bf16 before they meet the values, as in the fused
        kernels; the gradients of keys and values are summed over blocks in fp32.
    """
    return _BlockwiseAttention.apply(query, key, value, documents)  # type: ignore[no-untyped-call]  # torch: untyped


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
        query = query * (1 / math.sqrt(width))
        mixed = query.new_empty(batch, length, heads, width)  # as the output projection reads it, without a copy
        kept = []
        for start, end in query_blocks(length):
            probabilities = _probabilities(query, key, documents, start, end)
            values = probabilities @ value[:, :end]
            mixed[:, start:end] = values.view(batch, heads, -1, width).transpose(1, 2)
            if keeps_probabilities(length):
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, mixed, documents, *kept)
        return mixed.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, documents, *kept = ctx.saved_tensors
        batch, length, heads, width = mixed.shape  # the others are [B * N, T, D]; the query is scaled
        query_grad = torch.empty_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        key_grad, value_grad = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        # What the softmax takes from each row's gradient: the row's gradient times its probabilities, summed.
        row = (outer[0].transpose(1, 2).to(wide) * mixed.to(wide)).sum(-1).to(query.dtype)  # [B, T, N]
        row = row.transpose(1, 2).reshape(-1, length, 1)
        grad = outer[0].reshape(query.shape)
        for index, (start, end) in enumerate(query_blocks(length)):
            probabilities = kept[index] if kept else _probabilities(query, key, documents, start, end)
            upper = grad[:, start:end]
            value_grad[:, :end] += probabilities.transpose(1, 2) @ upper
            scores_grad = (upper @ value[:, :end].transpose(1, 2)).sub_(row[:, start:end]).mul_(probabilities)
            query_grad[:, start:end] = (scores_grad @ key[:, :end]) * (1 / math.sqrt(width))
            key_grad[:, :end] += scores_grad.transpose(1, 2) @ query[:, start:end]
        shape = batch, heads, length, width
        return (*(x.view(shape).to(query.dtype) for x in (query_grad, key_grad, value_grad)), None)


def _probabilities(query: Tensor, key: Tensor, documents: Tensor | None, start: int, end: int) -> Tensor:
    """[B * N, Q, E] attention of queries [start, end) to keys [0, end), in the queries' type."""
    scores = query[:, start:end] @ key[:, :end].transpose(1, 2)
    later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
    scores[:, :, start:end].masked_fill_(later, -math.inf)
    if documents is not None:
        others = documents[:, start:end, None] != documents[:, None, :end]  # [B, Q, E]
        scores = scores.view(len(documents), -1, *scores.shape[1:]).masked_fill_(others.unsqueeze(1), -math.inf)
        scores = scores.flatten(0, 1)
    return scores.softmax(-1)
