"""A moving average of the weights: fp32, divided among the ranks as the masters that it follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EXCHANGED_AT_ONCE = 1 << 20  # elements, so that nothing as large as the weights is held beside them


class WeightEma:
    """average = decay * average + (1 - decay) * weights, after each applied update; it begins with the weights.

    Args:
        decay: between 0 and 1; null keeps no average.
        flats: the fp32 tensors that the optimizer steps.
    """

    def __init__(self, decay: float | None, flats: Sequence[nn.Parameter]) -> None:
        self._share = 0.0 if decay is None else 1 - decay
        self._flats = [] if decay is None else list(flats)
        self._averages = {id(flat): torch.empty_like(flat.data) for flat in self._flats}
        self.restart()

    @property
    def is_kept(self) -> bool:
        return self._share > 0

    def of(self, flat: nn.Parameter) -> Tensor:
        """Return the average of one of the tensors."""
        return self._averages[id(flat)]

    @torch.no_grad()
    def update(self) -> None:
        """Call after an update that was applied."""
        for flat in self._flats:
            self.of(flat).lerp_(flat.data, self._share)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average where the weights are, and the weights where it was; twice changes nothing."""
        for flat in self._flats:
            average = self.of(flat).view(-1).split(_EXCHANGED_AT_ONCE)
            for weights, averaged in zip(flat.data.view(-1).split(_EXCHANGED_AT_ONCE), average, strict=True):
                kept = weights.clone()
                weights.copy_(averaged)
                averaged.copy_(kept)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the weights."""
        for flat in self._flats:
            self.of(flat).copy_(flat.data)
