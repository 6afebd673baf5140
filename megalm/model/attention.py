"""Causal self-attention, multi-head or grouped-query.

Shapes: B batch, T sequence, H hidden, N heads held here, K key/value heads held here, D head dimension. N and K follow
from the projections' widths, so the same code runs on a shard of the heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megalm.model.attention_kernels import (
    AttentionMask,
    ScoreRule,
    blockwise_attention,
    dense_attention,
    flex,
    fused_attention,
)
from megalm.model.layer_factory import AttentionInputs, LayerFactory
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock, RMSNorm, RotaryEmbedding, uncompiled


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
    """Projections, position rotation and attention of one block, over the heads held here.

    Args:
        rope: None: queries and keys do not rotate.
        layer: counted from 1.
    """

    def __init__(
        self, shape: ModelConfig, layers: LayerFactory, rope: RotaryEmbedding | None, clock: DropoutClock, layer: int
    ) -> None:
        super().__init__()
        heads, groups = shape.num_attention_heads, shape.num_key_value_heads
        queries, keys = heads * shape.head_dim, groups * shape.head_dim
        scale = 1 / math.sqrt(shape.head_dim) if shape.attention_scale is None else shape.attention_scale
        self.rule = ScoreRule(scale, shape.attn_logit_softcapping, shape.window(layer - 1))
        self.head_dim = shape.head_dim
        self.dropout_rate = shape.attention_dropout
        self.clock = clock
        self.place = layers.place(layer, "attention", sharded=True)
        self.sequence = layers.sequence
        self.project = layers.projection()
        self.sinks = layers.of_heads(heads) if shape.attention_sinks else None
        self.query = layers.column(shape.hidden_size, queries, shape.qkv_bias, parts=heads)
        self.key = layers.column(shape.hidden_size, keys, shape.qkv_bias, parts=groups)
        self.value = layers.column(shape.hidden_size, keys, shape.qkv_bias, parts=groups)
        self.output = layers.row(queries, shape.hidden_size, shape.attention_output_bias, parts=heads)
        self.normalizes_heads_together = shape.qk_norm == "whole"
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if shape.qk_norm:
            self.query_norm = _query_or_key_norm(shape, layers, heads)
            self.key_norm = _query_or_key_norm(shape, layers, groups)
        self.rope = rope

    def forward(self, hidden: Tensor, mask: AttentionMask | None, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, H] -> [B, T, H]; without a mask every token sees all before it, including those in the cache."""
        query, key, value = self.project(hidden, self.query, self.key, self.value)
        if self.normalizes_heads_together:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = map(self._heads, (query, key, value))  # [B, T, N, D], [B, T, K, D]
        if not self.normalizes_heads_together:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope is not None:
            new = query.shape[1]
            places = self.sequence.positions(new, query.device)
            if cache is not None:
                places = slice(len(cache), len(cache) + new)
            query, key = self.rope(query, places), self.rope(key, places)
        if cache is not None:
            key, value = cache.extend(key, value)
        by_head = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mixed = self.sequence.attend(self._attend, AttentionInputs(*by_head, mask, self.sinks), self.rule)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_dim)

    def _attend(self, inputs: AttentionInputs) -> Tensor:
        if self.training and self.dropout_rate:
            return self._attend_with_dropout(inputs)
        query, key, value, mask, sinks = inputs
        new, known = query.shape[2], key.shape[2]
        if new < known:  # the keys of a cache come first
            seen = self.rule.seen(new, known, query.device)
            return dense_attention(query, key, value, self.rule, seen, sinks)
        if mask is not None and self.rule.window in mask.blocks:
            return flex(query, key, value, self.rule, mask.blocks[self.rule.window], sinks)
        if query.device.type == "cpu":
            return blockwise_attention(query, key, value, mask.documents if mask else None, self.rule, sinks)
        return fused_attention(query, key, value, is_causal=True, scale=self.rule.scale)

    @uncompiled  # as in Dropout: a compiled seed would be a constant
    def _attend_with_dropout(self, inputs: AttentionInputs) -> Tensor:
        query, key, value, mask, sinks = inputs
        # The kernel draws from the device's generator: seed it for this place, and restore it afterwards.
        devices = [query.device] if query.device.type == "cuda" else []
        rate, length = self.dropout_rate, query.shape[2]
        dense = mask.dense(self.rule) if mask else None
        with torch.random.fork_rng(devices=devices):
            _seed_generator(query.device, self.clock.seed_at(self.place))
            if dense is None and self.rule == ScoreRule(self.rule.scale) and sinks is None:
                return fused_attention(query, key, value, is_causal=True, dropout_p=rate, scale=self.rule.scale)
            allowed = self.rule.seen(length, length, query.device) if dense is None else dense
            return dense_attention(query, key, value, self.rule, allowed, sinks, rate)


def _seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that a kernel on this device draws from.

    `torch.manual_seed` also notes a stack trace for each kind of device that has not been used: milliseconds each time.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _query_or_key_norm(shape: ModelConfig, layers: LayerFactory, heads: int) -> nn.Module:
    options = shape.norm_epsilon, shape.norm_zero_centered
    if shape.qk_norm == "whole":
        return layers.norm_over_heads(heads * shape.head_dim, heads, *options)
    return layers.replicated(RMSNorm(shape.head_dim, *options), sharded=True)
