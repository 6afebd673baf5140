"""Causal self-attention, multi-head or grouped-query.

Shapes: B batch, T sequence, H hidden, N heads held here, K key/value heads held here, D head dimension. N and K are
read off the projections' widths, so the same code runs on a shard of the heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from megalm.model.attention_mask import DocumentMask
from megalm.model.cpu_attention import blockwise_attention
from megalm.model.layer_factory import LayerFactory
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock, RMSNorm, RotaryEmbedding, uncompiled


class Attention(nn.Module):
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
        self.project = layers.projection()
        self.query = layers.column(shape.hidden_size, queries, bias, parts=shape.num_attention_heads)
        self.key = layers.column(shape.hidden_size, keys, bias, parts=shape.num_key_value_heads)
        self.value = layers.column(shape.hidden_size, keys, bias, parts=shape.num_key_value_heads)
        self.output = layers.row(queries, shape.hidden_size, bias, parts=shape.num_attention_heads)
        self.query_norm = self._head_norm(shape, layers)
        self.key_norm = self._head_norm(shape, layers)
        self.rope = rope if rope is not None else nn.Identity()

    def forward(self, hidden: Tensor, mask: DocumentMask | None) -> Tensor:
        """[B, T, H] -> [B, T, H]; without a mask every token sees all before it."""
        query, key, value = map(self._heads, self.project(hidden, self.query, self.key, self.value))
        query = self.rope(self.query_norm(query))  # [B, T, N, D]
        key = self.rope(self.key_norm(key))  # [B, T, K, D]
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        mixed = self._attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
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
        if mask is not None and mask.blocks is not None:
            if torch.compiler.is_compiling():  # it is compiled with the block
                return flex_attention(query, key, value, block_mask=mask.blocks)
            return _compiled_flex_attention()(query, key, value, block_mask=mask.blocks)
        if query.device.type == "cpu":
            return blockwise_attention(query, key, value, mask.documents if mask else None)
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    @uncompiled  # as in dropout.py: seeds are no constants
    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None) -> Tensor:
        # The kernel draws from the device's generator: lend it one with the seed of this place.
        devices = [query.device] if query.device.type == "cuda" else []
        dense = mask.dense() if mask else None
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.clock.seed_at(self.place))
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=dense, is_causal=dense is None, dropout_p=self.dropout_rate
            )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Uncompiled, flex attention would hold all scores."""
    return torch.compile(flex_attention, dynamic=False)
