"""Where the routers send tokens in a training step, added up over micro-batches and ranks.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalm.engine.interface import RoutingStatistics
from megalm.model.model_config import ModelConfig
from megalm.model.moe import STATISTICS, MixtureOfExperts


class ExpertLoads:
    """The routing of one step in the layers with experts, of which a pipeline rank holds some.

    Args:
        part: the modules on this rank, under their paths in the model.
        counts: whether this rank counts its tokens: one rank of a tensor group, which all see the same.
    """

    def __init__(self, part: nn.Module, shape: ModelConfig, device: torch.device, counts: bool) -> None:
        self._experts = shape.num_experts or 0
        self._top = shape.num_experts_per_token
        self._layers = shape.moe_layers
        self._held = {
            self._layers.index(int(name.split(".")[1])): module
            for name, module in part.named_modules()
            if isinstance(module, MixtureOfExperts)
        }
        self._device, self._counts = device, counts
        self._sequences = 0

    def begin(self, sequences: int, losses_factor: float) -> None:
        """Begin a training step.

        Args:
            sequences: of the global batch.
            losses_factor: of the router's losses, whose sum over the sequences of all micro-batches and ranks then is
                a mean over the global batch.
        """
        self._sequences = sequences
        for module in self._held.values():
            module.losses_factor = losses_factor
            module.statistics = torch.zeros(self._width, dtype=torch.float64, device=self._device)

    def sums(self) -> Tensor:
        """This rank's addends, fp64 [L x width]."""
        found = torch.zeros(len(self._layers), self._width, dtype=torch.float64, device=self._device)
        for index, module in self._held.items() if self._counts else ():
            assert module.statistics is not None
            found[index] = module.statistics
        for module in self._held.values():  # validation and samples count nothing
            module.statistics = None
        return found.flatten()

    @property
    def size(self) -> int:
        """Of `sums`."""
        return len(self._layers) * self._width

    def statistics(self, sums: Sequence[float]) -> RoutingStatistics | None:
        """The step's routing, given the sums over all ranks; None for a model without experts."""
        if not self._layers:
            return None
        rows = [sums[start : start + self._width] for start in range(0, self.size, self._width)]
        counts = tuple(tuple(map(int, row[: self._experts])) for row in rows)
        entropy, balance, z = (sum(row[self._experts + place] for row in rows) for place in range(len(STATISTICS)))
        sequences = self._sequences * len(rows)
        tokens = sum(map(sum, counts)) / self._top
        return RoutingStatistics(self._layers, counts, entropy / tokens, balance / sequences, z / sequences)

    @property
    def _width(self) -> int:
        return self._experts + len(STATISTICS)
