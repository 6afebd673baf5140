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
        inner = shape.intermediate_size
        self.project = layers.projection()
        self.up = layers.column(shape.hidden_size, inner, True, parts=inner)
        self.down = layers.row(inner, shape.hidden_size, True, parts=inner)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        (up,) = self.project(hidden, self.up)
        return self.down(functional.gelu(up, approximate="tanh"))


class SwiGluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (Shazeer, 2020)."""

    def __init__(self, shape: ModelShape, layers: LayerFactory) -> None:
        super().__init__()
        inner = shape.intermediate_size
        self.project = layers.projection()
        self.gate = layers.column(shape.hidden_size, inner, False, parts=inner)
        self.up = layers.column(shape.hidden_size, inner, False, parts=inner)
        self.down = layers.row(inner, shape.hidden_size, False, parts=inner)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        gate, up = self.project(hidden, self.gate, self.up)
        return self.down(functional.silu(gate) * up)


def mlp(shape: ModelShape, layers: LayerFactory) -> nn.Module:
    return GeluMLP(shape, layers) if shape.style == "gpt2" else SwiGluMLP(shape, layers)
