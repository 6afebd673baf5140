"""Where the routers send tokens in a training step, added up over micro-batches and ranks, and the biases that follow.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from megalm.checkpoint.shard_spec import Fragment, FragmentKey
from megalm.engine.interface import RoutingStatistics
from megalm.model.model_config import ModelConfig
from megalm.model.moe import STATISTICS, MixtureOfExperts, routers


class ExpertLoads:
    """The routing of one step in the layers with experts, of which a pipeline rank holds some.

    Args:
        part: the modules on this rank, under their paths in the model.
        biases: of the same layers.
        counts: whether this rank counts its tokens: one rank of a tensor group, which all see the same.
        drops: whether experts have a capacity.
    """

    def __init__(
        self,
        part: nn.Module,
        shape: ModelConfig,
        device: torch.device,
        biases: ExpertBiases,
        counts: bool,
        drops: bool,
    ) -> None:
        self.biases = biases
        self._experts = shape.num_experts or 0
        self._top = shape.num_experts_per_token
        self._layers = shape.moe_layers
        self._held = {
            self._layers.index(int(name.split(".")[1])): module
            for name, module in part.named_modules()
            if isinstance(module, MixtureOfExperts)
        }
        self._device, self._counts, self._drops = device, counts, drops
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
        """This rank's addends, fp64, flat [L x width]."""
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

    def statistics(self, sums: Sequence[float]) -> RoutingStatistics:
        """The step's routing, given the sums over all ranks."""
        rows = [sums[start : start + self._width] for start in range(0, self.size, self._width)]
        counts = tuple(tuple(map(int, row[: self._experts])) for row in rows)
        dropped, entropy, balance, z = (
            sum(row[self._experts + place] for row in rows) for place in range(len(STATISTICS))
        )
        sequences = self._sequences * len(rows)
        choices = sum(map(sum, counts)) or 1  # a rehearsal has no numbers
        means = entropy * self._top / choices, balance / sequences, z / sequences
        return RoutingStatistics(self._layers, counts, *means, dropped / choices if self._drops else None)

    @property
    def _width(self) -> int:
        return self._experts + len(STATISTICS)


class ExpertBiases:
    """The biases of the experts of this rank's layers, which balance their load without a loss (DeepSeek-V3).

    Each rank that holds a layer has the same, for all know the load of the whole global batch.

    Args:
        part: the modules on this rank, under their paths in the model.
        rate: what a step changes a bias by.
        saves: whether this rank saves them: one of those that hold the same layers.
    """

    def __init__(
        self, part: nn.Module, shape: ModelConfig, device: torch.device, rate: float | None, saves: bool
    ) -> None:
        names, found = list(shape.expert_biases()), routers(part)
        self._names = [name for name in names if name in found]
        self._rows = [names.index(name) for name in self._names]
        self._rate = 1e-3 if rate is None else rate
        self._saves = saves
        self._values = torch.zeros(len(self._names), shape.num_experts or 0, device=device)  # fp32 [held layers, E]
        for name, values in zip(self._names, self._values, strict=True):
            found[name].expert_bias = values

    def follow(self, routing: RoutingStatistics) -> None:
        """After an update: raise the biases of experts that had less than their share of tokens, lower the others."""
        if self._names:
            counts = torch.tensor([routing.counts[row] for row in self._rows])
            signs = (counts.sum(1, keepdim=True) - counts * counts.shape[1]).sign().float()  # of integers, exact
            signs = signs.pin_memory() if self._values.is_cuda else signs  # a copy that the host does not wait for
            self._values.add_(signs.to(self._values.device, non_blocking=True), alpha=self._rate)

    def fragments(self) -> Iterator[Fragment]:
        for name, values in zip(self._names, self._values, strict=True) if self._saves else ():
            yield Fragment(self._key(name), values)

    def load(self, read: Callable[[FragmentKey], Tensor]) -> None:
        for name, values in zip(self._names, self._values, strict=True):
            values.copy_(read(self._key(name)))

    def _key(self, name: str) -> FragmentKey:
        count = self._values.shape[1]
        return FragmentKey(name, "master", (count,), 0, count)
