"""Causal self-attention, multi-head or grouped-query.

Shapes: B batch, T sequence, H hidden, N heads held here, K key/value heads held here, D head dimension. N and K are
read off the projections' widths, so the same code runs on a shard of the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.dropout import DropoutClock
from megalm.model.layers import LayerFactory
from megalm.model.norm import RMSNorm
from megalm.model.rope import RotaryEmbedding
from megalm.model.shape import ModelShape


class Attention(nn.Module):
    def __init__(
        self, shape: ModelShape, layers: LayerFactory, rope: RotaryEmbedding | None, clock: DropoutClock, layer: int
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

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, H] -> [B, T, H]; `mask` [B, 1, T, T] is true where attention is allowed (None: causal)."""
        query, key, value = map(self._heads, self.project(hidden, self.query, self.key, self.value))
        query = self.rope(self.query_norm(query))  # [B, T, N, D]
        key = self.rope(self.key_norm(key))  # [B, T, K, D]
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        mixed = self._attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        return self.output(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _head_norm(shape: ModelShape, layers: LayerFactory) -> nn.Module:
        if not shape.qk_norm:
            return nn.Identity()
        return layers.replicated(RMSNorm(shape.head_dim, shape.norm_epsilon), sharded=True)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_dim)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.dropout_rate if self.training else 0.0
        causal = mask is None
        if rate == 0.0:
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        # The kernel draws from the device's generator: lend it one with the seed of this place.
        devices = [query.device] if query.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.clock.seed_at(self.place))
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, dropout_p=rate
            )
