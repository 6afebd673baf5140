"""Which part of the model a rank holds under tensor and pipeline parallelism, by shapes alone: no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megalm.cost_model.pipeline_balance import balanced_blocks, parameter_costs
from megalm.model.model_config import ModelConfig
from megalm.topology import Topology

# Column layers hold a part of their output features, row layers of their input features.
_COLUMNS = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")
_ROWS = ("attention.output.weight", "mlp.down.weight")
_VOCABULARY = ("embedding.tokens.weight", "head.weight")


@dataclass(frozen=True)
class Share:
    """What the fullest rank of a pipeline stage's tensor group holds.

    Attributes:
        first_block: the stage's blocks are [first_block, first_block + blocks).
        sequence: the residual stream is divided along the sequence over the tensor group.
    """

    shape: ModelConfig
    tensor: int
    sequence: bool
    stage: int
    stages: int
    first_block: int
    blocks: int

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def heads(self) -> int:
        return self.shape.num_attention_heads // self.tensor

    @property
    def key_value_heads(self) -> int:
        """With fewer of them than ranks each rank holds a copy of the one that its heads need."""
        return max(1, self.shape.num_key_value_heads // self.tensor)

    @property
    def slices(self) -> int:
        """How many ranks share what lies between the sharded layers: norms, residuals, dropout."""
        return self.tensor if self.sequence else 1

    def in_flight(self, micro_batches: int) -> int:
        """Micro-batches whose activations the stage keeps at one time, under one-forward-one-backward."""
        return min(micro_batches, self.stages - self.stage)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of what is held here, in the model's order."""
        return {name: self._local(name, size) for name, size in self.shape.parameters().items() if self._is_here(name)}

    def _is_here(self, name: str) -> bool:
        if name.startswith("layers."):
            return self.first_block <= int(name.split(".")[1]) < self.first_block + self.blocks
        if name == "embedding.tokens.weight":
            return self.is_first or (self.is_last and self.shape.tie_word_embeddings)
        return self.is_first if name.startswith("embedding.") else self.is_last

    def _local(self, name: str, size: tuple[int, ...]) -> tuple[int, ...]:
        if name in _VOCABULARY:
            return (math.ceil(size[0] / self.tensor), *size[1:])
        if name.endswith(_ROWS):
            return (size[0], size[1] // self.tensor)
        layer = next((column for column in _COLUMNS if f".{column}." in name), None)
        if layer is None:
            return size
        if layer in ("attention.key", "attention.value"):
            return (self.key_value_heads * self.shape.head_dim, *size[1:])
        return (size[0] // self.tensor, *size[1:])


def shares(shape: ModelConfig, topology: Topology, sequence: bool = False) -> Iterator[Share]:
    """The share of each pipeline stage, balanced by parameters."""
    stages = topology.pipeline
    first = 0
    for stage, blocks in enumerate(balanced_blocks(shape.num_hidden_layers, stages, parameter_costs(shape))):
        yield Share(shape, topology.tensor, sequence, stage, stages, first, blocks)
        first += blocks
