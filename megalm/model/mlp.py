"""The feed-forward part of a block: GELU (gpt2) or SwiGLU (llama). Shapes: H hidden, F intermediate."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from megalm.model.layers import LayerFactory
from megalm.model.shape import ModelShape


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases; the tanh form of GELU, as GPT-2 was trained."""

    def __init__(self, shape: ModelShape, layers: LayerFactory) -> None:
        super().__init__()
        self.up = layers.column(shape.hidden_size, shape.intermediate_size, True)
        self.down = layers.row(shape.intermediate_size, shape.hidden_size, True)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        return self.down(functional.gelu(self.up(hidden), approximate="tanh"))


class SwiGluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (Shazeer, 2020)."""

    def __init__(self, shape: ModelShape, layers: LayerFactory) -> None:
        super().__init__()
        self.gate = layers.column(shape.hidden_size, shape.intermediate_size, False)
        self.up = layers.column(shape.hidden_size, shape.intermediate_size, False)
        self.down = layers.row(shape.intermediate_size, shape.hidden_size, False)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


def mlp(shape: ModelShape, layers: LayerFactory) -> nn.Module:
    return GeluMLP(shape, layers) if shape.style == "gpt2" else SwiGluMLP(shape, layers)
