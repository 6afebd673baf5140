"""The kernels of causal attention, and the mask that they share.

Shapes: B batch, T queries, t keys, N query heads, K key/value heads, D head dimension.

A token attends to itself and to earlier tokens: under a document mask of its own document, with a sliding window the
last ones. No [T, T] mask exists where memory counts: the CPU's attention works block by block, and flex attention on a
GPU gets a block mask, most of whose blocks are empty or full. Only attention dropout, which neither kernel supports,
builds the dense mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megalm.model.model_config import ModelConfig, first_key, keeps_probabilities, query_blocks

_BLOCK = 128  # tokens; flex attention's kernels are tuned for this size


@dataclass(frozen=True)
class ScoreRule:
    """How products of queries and keys become scores, and which of them count.

    Attributes:
        scale: of the products.
        softcap: scores become softcap x tanh(score / softcap), as in Gemma 2; None: they stay.
        window: tokens that a token attends to, itself included; None: all.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    def seen(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """[T, t], true where a query may look; the queries are the last of the tokens."""
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return seen if self.window is None else seen.triu(keys - queries - self.window + 1)


@dataclass(frozen=True)
class AttentionMask:
    """Made once per batch by `attention_mask`, then read by every block.

    Args:
        documents: [B, T] document numbers; None: a sample is one document.
        blocks: for flex attention, by window; none on a CPU.
    """

    documents: Tensor | None
    blocks: Mapping[int | None, BlockMask]

    def dense(self, rule: ScoreRule) -> Tensor | None:
        """[B, 1, T, T], true where attention is allowed; None without documents."""
        if self.documents is None:
            return None
        length = self.documents.shape[1]
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return (rule.seen(length, length, self.documents.device) & same).unsqueeze(1)


def attention_mask(
    shape: ModelConfig, length: int, device: torch.device, documents: Tensor | None
) -> AttentionMask | None:
    """Return what attention needs beside its inputs; None: no more than the order of tokens.

    Args:
        length: T, of whole sequences.
        documents: [B, T] document numbers, or None.
    """
    if device.type == "cpu":
        return None if documents is None else AttentionMask(documents, {})
    # torch's fused attention is causal, and knows nothing else.
    flex_only = documents is not None or shape.attn_logit_softcapping is not None or shape.attention_sinks
    windows = {shape.window(layer) for layer in range(shape.num_hidden_layers)}
    for_flex = [window for window in windows if window is not None or flex_only]
    if not for_flex:
        return None
    sequence = torch.empty(1, device=device).expand(1, length)
    return AttentionMask(documents, {window: flex_blocks(sequence, documents, window) for window in for_flex})


def flex_blocks(tokens: Tensor, documents: Tensor | None, window: int | None = None) -> BlockMask:
    """[B, T], [B, T] -> which blocks of queries see which blocks of keys, and the rule inside a block.

    It compares the lowest and highest document of each block; `create_block_mask` would compare every pair of tokens.
    """
    length, device = tokens.shape[1], tokens.device
    reach = length if window is None else window

    def near(_: Any, __: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < reach)

    blocks = -(-length // _BLOCK)
    place = torch.arange(blocks, device=device)
    distance = (place.unsqueeze(1) - place) * _BLOCK  # between their first tokens, [n, n]
    part = (distance >= 0) & (distance - _BLOCK + 1 < reach)
    whole = (distance > 0) & (distance + _BLOCK - 1 < reach)
    if documents is None:
        return _block_mask(part & ~whole, whole, near, length)

    def allowed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return near(batch, head, query, key) & (documents[batch, query] == documents[batch, key])

    last = documents[:, -1:].expand(-1, blocks * _BLOCK - length)
    by_block = torch.cat((documents, last), dim=1).unflatten(1, (blocks, _BLOCK))
    lowest, highest = by_block.amin(-1), by_block.amax(-1)  # [B, n]
    meet = (lowest.unsqueeze(2) <= highest.unsqueeze(1)) & (lowest.unsqueeze(1) <= highest.unsqueeze(2))
    one = lowest == highest
    whole = whole & one.unsqueeze(2) & one.unsqueeze(1) & (lowest.unsqueeze(2) == lowest.unsqueeze(1))
    return _block_mask(part & meet & ~whole, whole, allowed, length)


def _block_mask(part: Tensor, whole: Tensor, rule: Callable[..., Any], length: int) -> BlockMask:
    """[n, n] or [B, n, n] blocks that `rule` looks into, and blocks all of whose pairs it allows."""
    kinds = (*_ordered(part), *_ordered(whole))
    return BlockMask.from_kv_blocks(*kinds, BLOCK_SIZE=_BLOCK, mask_mod=rule, seq_lengths=(length, length))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, n] -> how many key blocks each query block meets [B, 1, n], and their numbers, first in [B, 1, n, n]."""
    blocks = blocks.view(-1, *blocks.shape[-2:])
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), numbers.int().unsqueeze(1)


def soft_capped(scores: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scores under a soft cap and its slope there; without one the scores and None."""
    if cap is None:
        return scores, None
    ratio = torch.tanh(scores / cap)
    return ratio * cap, 1 - ratio.square()


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule, mask: Tensor, sinks: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """The formula: [B, N, T, D] of query heads [B, N, T, D] to [B, K, t, D], with all scores at once.

    Args:
        mask: [T, t] or [B, 1, T, t], true where attention is allowed.
        sinks: [N] scores of no token.
        dropout: probability of leaving out each probability.
    """
    if rule.softcap is None and sinks is None:
        return fused_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=rule.scale)
    key, value = _repeated(query, key, value)
    scores, _ = soft_capped(query @ key.transpose(2, 3) * rule.scale, rule.softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]]
    return functional.dropout(probabilities, dropout) @ value


def flex(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule, blocks: BlockMask, sinks: Tensor | None) -> Tensor:
    """Flex attention of query heads [B, N, T, D] to key/value heads [B, K, T, D]."""
    # The block's graph compiles it, where there is one.
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    options: dict[str, Any] = {"block_mask": blocks, "scale": rule.scale, "enable_gqa": query.shape[1] > key.shape[1]}
    if rule.softcap is not None:
        options["score_mod"] = functools.partial(_softcapped, rule.softcap)
    if sinks is None:
        return attend(query, key, value, **options)  # type: ignore[operator]
    from torch.nn.attention.flex_attention import AuxRequest

    mixed, found = attend(query, key, value, return_aux=AuxRequest(lse=True), **options)  # type: ignore[operator]
    # exp(lse) is the sum that the softmax divides by; the sink adds exp(sink) to it.
    return mixed * torch.sigmoid(found.lse - sinks.view(-1, 1).to(found.lse.dtype)).unsqueeze(-1).to(mixed.dtype)


def _softcapped(cap: float, score: Any, *_: Any) -> Any:
    return cap * torch.tanh(score / cap)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Compiled flex attention; the uncompiled form holds all scores at once."""
    return torch.compile(flex_attention, dynamic=False)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    """torch's fused attention of query heads [B, N, T, D] to key/value heads [B, K, t, D].

    Flash attention on CUDA reads one key/value head for several query heads; every other kernel needs it repeated, and
    `enable_gqa` would take the formula that holds all scores at once.
    """
    grouped = query.shape[1] > key.shape[1] and attn_mask is None and _has_flash_attention(query)
    if not grouped:
        key, value = _repeated(query, key, value)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=grouped, **how)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key/value heads [B, K, t, D] -> one for each query head, [B, N, t, D]."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


_LARGEST_FLASH_HEAD = 256


def _has_flash_attention(query: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= _LARGEST_FLASH_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


# Causal attention on a CPU uses plain matrix products, one block of queries at a time. Shapes: Q queries of a block,
# E keys that they may see, G query heads that share a key/value head.
#
# torch's own CPU kernel reaches a fifth of the machine's matrix-product peak in bf16. Products over a block of queries
# and the keys up to that block's end reach more than twice that, and compile into few passes over the scores
# (docs/performance.md has the figures). On a GPU the fused kernels are faster.


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, rule: ScoreRule, sinks: Tensor | None = None
) -> Tensor:
    """softmax(q k^T) v over the token itself and earlier ones, of the same document if `documents` is given.

    Args:
        query: [B, N, T, D], of any floating type.
        key, value: [B, K, T, D], the same type; N / K query heads in a row share each key/value head.
        documents: [B, T] document numbers, or None.
        sinks: [N] scores that take their share of each softmax and have no value, or None.

    Returns:
        [B, N, T, D]. In bf16 the probabilities are rounded to bf16 before the product with the values, as in the
        fused kernels; the gradients of keys and values are summed over blocks and sharing heads in fp32.
    """
    own = (documents, sinks, rule.scale, rule.softcap, rule.window)
    return _BlockwiseAttention.apply(query, key, value, *own)  # type: ignore[no-untyped-call]  # torch: untyped


class _BlockwiseAttention(torch.autograd.Function):
    """`blockwise_attention` with its own backward pass.

    The queries of the G heads that share a key/value head lie below each other, so that each product is of whole
    [G * Q, ...] matrices and no key is repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        batch, heads, length, width = query.shape
        shared = batch * key.shape[1]
        query = query.reshape(shared, -1, length, width) * scale  # [B * K, G, T, D]
        key, value = (x.reshape(shared, length, width) for x in (key, value))
        mixed = query.new_empty(batch, length, heads, width)  # the output projection reads this order without a copy
        kept, shares = [], []
        for start, end in query_blocks(length):
            block = _Block(start, end, softcap, window)
            probabilities, share, _ = block.probabilities(query, key, documents, sinks)
            values = probabilities @ value[:, block.keys]
            mixed[:, start:end] = values.view(batch, heads, -1, width).transpose(1, 2)
            if keeps_probabilities(length, softcap):
                kept.append(probabilities)
            if share is not None:
                shares.append(share)
        sink_share = torch.cat(shares, dim=-1) if shares else None  # [B * K, G, T]
        ctx.save_for_backward(query, key, value, mixed, documents, sinks, sink_share, *kept)
        ctx.scale, ctx.softcap, ctx.window = scale, softcap, window
        return mixed.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, documents, sinks, sink_share, *kept = ctx.saved_tensors
        batch, length, heads, width = mixed.shape
        query_grad = torch.empty_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        key_grad, value_grad = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        # The softmax subtracts this from each row's gradient: the sum of the gradient times the probabilities.
        row = (outer[0].transpose(1, 2).to(wide) * mixed.to(wide)).sum(-1)  # [B, T, N]
        row = row.transpose(1, 2).reshape(*query.shape[:3], 1)
        sinks_grad = None
        if sink_share is not None:  # a sink has no value, and so no other gradient than the softmax's
            sinks_grad = -(sink_share.to(wide) * row.squeeze(-1)).sum(-1).view(batch, heads).sum(0).to(sinks.dtype)
        row = row.to(query.dtype)
        grad = outer[0].reshape(query.shape)
        for index, (start, end) in enumerate(query_blocks(length)):
            block = _Block(start, end, ctx.softcap, ctx.window)
            slope = None
            if kept:
                probabilities = kept[index]
            else:
                probabilities, _, slope = block.probabilities(query, key, documents, sinks)
            upper, seen = _rows(grad, start, end), block.keys
            value_grad[:, seen] += probabilities.transpose(1, 2) @ upper
            scores_grad = upper @ value[:, seen].transpose(1, 2)
            scores_grad.sub_(_rows(row, start, end)).mul_(probabilities)
            if slope is not None:
                scores_grad.mul_(slope)
            block_grad = (scores_grad @ key[:, seen]) * ctx.scale
            query_grad[:, :, start:end] = block_grad.view(*query.shape[:2], -1, width)
            key_grad[:, seen] += scores_grad.transpose(1, 2) @ _rows(query, start, end)
        shapes = (heads, query_grad), (-1, key_grad), (-1, value_grad)
        inputs = (x.view(batch, count, length, width).to(query.dtype) for count, x in shapes)
        return (*inputs, None, sinks_grad, None, None, None)


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """[B * K, G, T, ...] -> the rows [start, end) of all G heads, [B * K, G * Q, ...]."""
    return x[:, :, start:end].flatten(1, 2)


class _Block:
    """Queries [start, end) and the keys that one of them may see."""

    def __init__(self, start: int, end: int, softcap: float | None, window: int | None) -> None:
        self._start, self._end = start, end
        self._softcap, self._window = softcap, window
        self._first = first_key(start, window)
        self.keys = slice(self._first, end)

    def probabilities(
        self, query: Tensor, key: Tensor, documents: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B * K, G, T, D] scaled queries, [B * K, T, D] -> the softmax of their scores, in the queries' type.

        Returns:
            [B * K, G * Q, E] probabilities; the sinks' share [B * K, G, Q] of each softmax; the soft cap's slope
            [B * K, G * Q, E].
        """
        start, end, first = self._start, self._end, self._first
        scores = _rows(query, start, end) @ key[:, self.keys].transpose(1, 2)
        scores, slope = soft_capped(scores, self._softcap)
        sizes = (*query.shape[:2], end - start, end - first)
        by_head = scores.view(sizes)
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
        by_head[..., start - first :].masked_fill_(later, -math.inf)
        if self._window is not None and (left := end - self._window - first) > 0:  # keys that some query is past
            past = torch.ones(end - start, left, dtype=torch.bool, device=query.device)
            by_head[..., :left].masked_fill_(past.tril_(start - first - self._window), -math.inf)
        if documents is not None:
            others = documents[:, start:end, None] != documents[:, None, self.keys]  # [B, Q, E]
            by_sample = scores.view(len(documents), -1, *sizes[2:]).masked_fill_(others.unsqueeze(1), -math.inf)
            scores = by_sample.view(scores.shape)
        if sinks is None:
            return scores.softmax(-1), None, slope
        per_head = sinks.to(scores.dtype).view(-1, sizes[1]).repeat(sizes[0] * sizes[1] // len(sinks), 1)
        column = per_head.view(*sizes[:2], 1, 1).expand(*sizes[:3], 1)
        with_sink = torch.cat((scores.view(sizes), column), dim=-1).softmax(-1)
        return with_sink[..., :-1].flatten(1, 2), with_sink[..., -1], slope
