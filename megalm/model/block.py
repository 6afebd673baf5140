"""One pre-norm transformer block. Shapes: B batch, T sequence, H hidden."""

from __future__ import annotations

from torch import Tensor, nn

from megalm.model.attention import Attention
from megalm.model.dropout import DropoutClock
from megalm.model.layers import LayerFactory
from megalm.model.mask import DocumentMask
from megalm.model.mlp import mlp
from megalm.model.norm import norm
from megalm.model.rope import RotaryEmbedding
from megalm.model.shape import ModelShape


class Block(nn.Module):
    def __init__(
        self, shape: ModelShape, layers: LayerFactory, rope: RotaryEmbedding | None, clock: DropoutClock, layer: int
    ) -> None:
        super().__init__()
        self.attention_norm = layers.replicated(norm(shape), sharded=False)
        self.attention = Attention(shape, layers, rope, clock, layer)
        self.attention_dropout = layers.dropout(shape.dropout, layer, "attention_output", sharded=False)
        self.mlp_norm = layers.replicated(norm(shape), sharded=False)
        self.mlp = mlp(shape, layers)
        self.mlp_dropout = layers.dropout(shape.dropout, layer, "mlp_output", sharded=False)

    def forward(self, hidden: Tensor, mask: DocumentMask | None) -> Tensor:  # [B, T, H] -> [B, T, H]
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), mask))
        return hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))
