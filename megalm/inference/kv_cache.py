"""Next tokens without computing the whole text again: keys and values of earlier tokens are kept.

For looking at checkpoints only: training samples through its engine, as it always did. A text that grew by a token
costs the forward pass of that token; what is not a continuation of the text before (another prompt, or a window that
has moved on) is computed anew, so any sequence of calls is right.

Shapes: m new tokens of one text, t all its tokens, N heads, K key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from megalm.errors import CheckpointError
from megalm.inference.inference_model import NOT_NUMBERS, InferenceModel
from megalm.model.attention import Attention
from megalm.model.modules import RotaryEmbedding
from megalm.model.transformer import Block, LanguageModel


@dataclass
class _Kept:
    """Of one text: its tokens, and each layer's keys and values [1, K, t, D]."""

    tokens: list[int] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def cut(self, length: int) -> None:
        self.tokens = self.tokens[:length]
        self.layers = [(key[:, :, :length], value[:, :, :length]) for key, value in self.layers] if length else []


class CachedModel:
    """A model that remembers the texts of its last call, row by row."""

    def __init__(self, model: InferenceModel) -> None:
        self._network: LanguageModel = model.network
        self._device, self._path = model.device, model.path
        self._kept: list[_Kept] = []

    @torch.inference_mode()
    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """[B, T] tokens, [B] positions -> fp32 logits [B, V] of what follows each position.

        Raises:
            CheckpointError: they are no numbers, though the weights are.
        """
        texts = [row[: position + 1].tolist() for row, position in zip(tokens, positions, strict=True)]
        self._kept = (self._kept + [_Kept() for _ in texts])[: len(texts)]
        rows = [self._logits(text, kept) for text, kept in zip(texts, self._kept, strict=True)]
        logits = torch.stack(rows).float().cpu().numpy()
        if np.isnan(logits).any():
            raise CheckpointError(f"{self._path}: {NOT_NUMBERS}")
        return logits

    def _logits(self, text: list[int], kept: _Kept) -> Tensor:
        """[V] of what follows the text."""
        same = next(
            (place for place, pair in enumerate(zip(text, kept.tokens, strict=False)) if pair[0] != pair[1]), None
        )
        same = min(len(text), len(kept.tokens)) if same is None else same
        kept.cut(min(same, len(text) - 1))  # something has to be computed
        start = len(kept.tokens)
        new = torch.tensor([text[start:]], device=self._device)
        hidden = self._embed(new, start)
        layers = []
        for index, block in enumerate(self._network.layers):
            assert isinstance(block, Block)
            before = kept.layers[index] if start else None
            mixed, now = _attend(block.attention, block.attention_norm(hidden), before)
            layers.append(now)
            hidden = hidden + mixed
            hidden = hidden + block.mlp(block.mlp_norm(hidden))
        # Ctrl-C may come at any moment: keys and values of more than the tokens do no harm, of fewer they would.
        kept.layers = layers
        kept.tokens = text
        logits = self._network.head(self._network.final_norm(hidden[:, -1:]))
        assert isinstance(logits, Tensor)
        return logits[0, 0]

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        """[1, m] -> [1, m, H]."""
        embedding = self._network.embedding
        assert embedding.tokens is not None
        hidden = embedding.tokens(tokens)
        if embedding.positions is not None:
            hidden = hidden + embedding.positions.weight[start : start + tokens.shape[1]]
        return hidden


def _attend(
    attention: Attention, hidden: Tensor, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """[1, m, H] new tokens after those `before` -> their attention's output [1, m, H], and all keys and values."""
    projected = attention.project(hidden, attention.query, attention.key, attention.value)
    query, key, value = (part.unflatten(-1, (-1, attention.head_dim)) for part in projected)  # [1, m, heads, D]
    query, key = attention.query_norm(query), attention.key_norm(key)
    start = 0 if before is None else before[0].shape[2]
    if isinstance(attention.rope, RotaryEmbedding):
        query, key = attention.rope(query, start), attention.rope(key, start)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if before is not None:
        key, value = torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)
    new = query.shape[2]
    seen = torch.ones(new, start + new, dtype=torch.bool, device=query.device).tril(start)
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attention.output(mixed.transpose(1, 2).flatten(2)), (key, value)
