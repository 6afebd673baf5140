"""Causal self-attention, multi-head or grouped-query.

Shapes: B batch, T sequence, H hidden, N heads held here, K key/value heads held here, D head dimension. N and K follow
from the projections' widths, so the same code runs on a shard of the heads.

Under a document mask tokens attend within their own document only. No [T, T] mask exists where memory counts: the CPU's
attention compares document numbers block by block, and flex attention on a GPU gets a block mask, most of whose blocks
are empty or full. Only attention dropout, which neither kernel supports, builds the dense mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megalm.model.layer_factory import LayerFactory
from megalm.model.model_config import ModelConfig, keeps_probabilities, query_blocks
from megalm.model.modules import DropoutClock, RMSNorm, RotaryEmbedding, uncompiled

_BLOCK = 128  # tokens; flex attention's kernels are tuned for this size


@dataclass(frozen=True)
class DocumentMask:
    """Made once per batch by `document_mask`, then read by every block.

    Args:
        documents: [B, T] document numbers.
        blocks: the same for flex attention; None on a CPU.
    """

    documents: Tensor
    blocks: BlockMask | None

    def dense(self) -> Tensor:
        """[B, 1, T, T], true where attention is allowed: the same document, not later."""
        length = self.documents.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.documents.device).tril()
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return (earlier & same).unsqueeze(1)


def document_mask(documents: Tensor) -> DocumentMask:
    """[B, T] document numbers -> the mask for attention on their device."""
    return DocumentMask(documents, None if documents.device.type == "cpu" else flex_blocks(documents))


def flex_blocks(documents: Tensor) -> BlockMask:
    """[B, T] -> which blocks of queries see which blocks of keys, and the rule inside a block.

    It compares the lowest and highest document of each block; `create_block_mask` would compare every pair of tokens.
    """

    def allowed(batch: Any, _: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch, length = documents.shape
    blocks = -(-length // _BLOCK)
    last = documents[:, -1:].expand(batch, blocks * _BLOCK - length)
    by_block = torch.cat((documents, last), dim=1).view(batch, blocks, _BLOCK)
    lowest, highest = by_block.amin(-1), by_block.amax(-1)  # [B, n]
    place = torch.arange(blocks, device=documents.device)
    earlier = place.unsqueeze(1) > place
    meet = (lowest.unsqueeze(2) <= highest.unsqueeze(1)) & (lowest.unsqueeze(1) <= highest.unsqueeze(2))
    one = lowest == highest
    whole = earlier & one.unsqueeze(2) & one.unsqueeze(1) & (lowest.unsqueeze(2) == lowest.unsqueeze(1))
    part = meet & (earlier | (place.unsqueeze(1) == place)) & ~whole  # [B, n, n]
    return BlockMask.from_kv_blocks(
        *_ordered(part), *_ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, n] -> how many key blocks each query block meets [B, 1, n], and their numbers, first in [B, 1, n, n]."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), numbers.int().unsqueeze(1)


class KeyValueCache:
    """Keys and values [B, t, K, D] of the t earlier tokens in one layer, for generation."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self._kept is None else self._kept[0].shape[1]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new tokens [B, T, K, D] and return all."""
        if self._kept is not None:
            key, value = torch.cat((self._kept[0], key), dim=1), torch.cat((self._kept[1], value), dim=1)
        self._kept = key, value
        return key, value

    def truncate(self, length: int) -> None:
        if self._kept is not None:
            self._kept = self._kept[0][:, :length], self._kept[1][:, :length]


class Attention(nn.Module):
    """Projections, position rotation and attention of one block, over the heads held here."""

    def __init__(
        self, shape: ModelConfig, layers: LayerFactory, rope: RotaryEmbedding | None, clock: DropoutClock, layer: int
    ) -> None:
        super().__init__()
        bias = shape.style == "gpt2"
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.dropout_rate = shape.attention_dropout
        self.clock = clock
        self.place = layers.place(layer, "attention", sharded=True)
        self.sequence = layers.sequence
        self.project = layers.projection()
        self.query = layers.column(shape.hidden_size, queries, bias, parts=shape.num_attention_heads)
        self.key = layers.column(shape.hidden_size, keys, bias, parts=shape.num_key_value_heads)
        self.value = layers.column(shape.hidden_size, keys, bias, parts=shape.num_key_value_heads)
        self.output = layers.row(queries, shape.hidden_size, bias, parts=shape.num_attention_heads)
        self.query_norm = self._head_norm(shape, layers)
        self.key_norm = self._head_norm(shape, layers)
        self.rope = rope

    def forward(self, hidden: Tensor, mask: DocumentMask | None, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, H] -> [B, T, H]; without a mask every token sees all before it, including those in the cache."""
        query, key, value = map(self._heads, self.project(hidden, self.query, self.key, self.value))
        query, key = self.query_norm(query), self.key_norm(key)  # [B, T, N, D], [B, T, K, D]
        if self.rope is not None:
            new = query.shape[1]
            places = self.sequence.positions(new, query.device)
            if cache is not None:
                places = slice(len(cache), len(cache) + new)
            query, key = self.rope(query, places), self.rope(key, places)
        if cache is not None:
            key, value = cache.extend(key, value)
        by_head = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mixed = self.sequence.attend(self._attend, *by_head, mask)
        return self.output(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _head_norm(shape: ModelConfig, layers: LayerFactory) -> nn.Module:
        if not shape.qk_norm:
            return nn.Identity()
        return layers.replicated(RMSNorm(shape.head_dim, shape.norm_epsilon), sharded=True)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_dim)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None) -> Tensor:
        if self.training and self.dropout_rate:
            return self._attend_with_dropout(query, key, value, mask)
        new, known = query.shape[2], key.shape[2]
        if new < known:  # the keys of a cache come first
            seen = torch.ones(new, known, dtype=torch.bool, device=query.device).tril(known - new)
            return fused_attention(query, key, value, attn_mask=seen)
        if mask is not None and mask.blocks is not None:
            # The block's graph compiles it, where there is one.
            attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            grouped = query.shape[1] > key.shape[1]
            return attend(query, key, value, block_mask=mask.blocks, enable_gqa=grouped)  # type: ignore[operator]
        if query.device.type == "cpu":
            return blockwise_attention(query, key, value, mask.documents if mask else None)
        return fused_attention(query, key, value, is_causal=True)

    @uncompiled  # as in Dropout: a compiled seed would be a constant
    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None) -> Tensor:
        # The kernel draws from the device's generator: seed it for this place, and restore it afterwards.
        devices = [query.device] if query.device.type == "cuda" else []
        dense = mask.dense() if mask else None
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.clock.seed_at(self.place))
            return fused_attention(
                query, key, value, attn_mask=dense, is_causal=dense is None, dropout_p=self.dropout_rate
            )


def fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    """torch's fused attention of query heads [B, N, T, D] to key/value heads [B, K, t, D].

    Flash attention on CUDA reads one key/value head for several query heads; every other kernel needs it repeated, and
    `enable_gqa` would take the formula that holds all scores at once.
    """
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and attn_mask is None and _has_flash_attention(query)
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=grouped, **how)


_LARGEST_FLASH_HEAD = 256


def _has_flash_attention(query: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= _LARGEST_FLASH_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled flex attention; the uncompiled form holds all scores at once."""
    return torch.compile(flex_attention, dynamic=False)


# Causal attention on a CPU uses plain matrix products, one block of queries at a time. Shapes: Q queries of a block,
# E end of a block, G query heads that share a key/value head.
#
# torch's own CPU kernel reaches a fifth of the machine's matrix-product peak in bf16. Products over a block of queries
# and the keys up to that block's end reach more than twice that, and compile into few passes over the scores
# (docs/performance.md has the figures). On a GPU the fused kernels are faster.


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the token itself and earlier ones, of the same document if `documents` is given.

    Args:
        query: [B, N, T, D], of any floating type.
        key, value: [B, K, T, D], the same type; N / K query heads in a row share each key/value head.
        documents: [B, T] document numbers, or None.

    Returns:
        [B, N, T, D]. In bf16 the probabilities are rounded to bf16 before the product with the values, as in the
        fused kernels; the gradients of keys and values are summed over blocks and sharing heads in fp32.
    """
    return _BlockwiseAttention.apply(query, key, value, documents)  # type: ignore[no-untyped-call]  # torch: untyped


class _BlockwiseAttention(torch.autograd.Function):
    """`blockwise_attention` with its own backward pass.

    The queries of the G heads that share a key/value head lie below each other, so that each product is of whole
    [G * Q, ...] matrices and no key is repeated.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        shared = batch * key.shape[1]
        query = query.reshape(shared, -1, length, width) * (1 / math.sqrt(width))  # [B * K, G, T, D]
        key, value = (x.reshape(shared, length, width) for x in (key, value))
        mixed = query.new_empty(batch, length, heads, width)  # the output projection reads this order without a copy
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
        batch, length, heads, width = mixed.shape
        query_grad = torch.empty_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        key_grad, value_grad = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        # The softmax subtracts this from each row's gradient: the sum of the gradient times the probabilities.
        row = (outer[0].transpose(1, 2).to(wide) * mixed.to(wide)).sum(-1).to(query.dtype)  # [B, T, N]
        row = row.transpose(1, 2).reshape(*query.shape[:3], 1)
        grad = outer[0].reshape(query.shape)
        for index, (start, end) in enumerate(query_blocks(length)):
            probabilities = kept[index] if kept else _probabilities(query, key, documents, start, end)
            upper = _rows(grad, start, end)
            value_grad[:, :end] += probabilities.transpose(1, 2) @ upper
            scores_grad = upper @ value[:, :end].transpose(1, 2)
            scores_grad.sub_(_rows(row, start, end)).mul_(probabilities)
            block_grad = (scores_grad @ key[:, :end]) * (1 / math.sqrt(width))
            query_grad[:, :, start:end] = block_grad.view(*query.shape[:2], -1, width)
            key_grad[:, :end] += scores_grad.transpose(1, 2) @ _rows(query, start, end)
        shapes = (heads, query_grad), (-1, key_grad), (-1, value_grad)
        return (*(x.view(batch, count, length, width).to(query.dtype) for count, x in shapes), None)


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """[B * K, G, T, ...] -> the rows [start, end) of all G heads, [B * K, G * Q, ...]."""
    return x[:, :, start:end].flatten(1, 2)


def _probabilities(query: Tensor, key: Tensor, documents: Tensor | None, start: int, end: int) -> Tensor:
    """[B * K, G * Q, E] attention of queries [start, end) to keys [0, end), in the queries' type."""
    scores = _rows(query, start, end) @ key[:, :end].transpose(1, 2)
    by_head = scores.view(*query.shape[:2], end - start, end)
    later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
    by_head[..., start:end].masked_fill_(later, -math.inf)
    if documents is not None:
        others = documents[:, start:end, None] != documents[:, None, :end]  # [B, Q, E]
        by_sample = scores.view(len(documents), -1, end - start, end).masked_fill_(others.unsqueeze(1), -math.inf)
        scores = by_sample.view(scores.shape)
    return scores.softmax(-1)
