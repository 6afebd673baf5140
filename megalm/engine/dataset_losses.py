"""Training loss by dataset of a mixture, from the losses of the forward pass.

Shapes: b samples of a micro-batch, T sequence, D datasets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalm.data.sampling.batch_loader import GlobalBatch
from megalm.model.layer_factory import VocabularyOutput


class DatasetLosses:
    """Adds up losses by dataset in one training step.

    Args:
        output: of the model, where this rank computes the loss and reports it; None elsewhere: its sums are zeros.
    """

    def __init__(self, output: VocabularyOutput | None, device: torch.device) -> None:
        self._device, self._output = device, output
        self._targets: tuple[int, ...] = ()
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)  # [D]
        self._datasets: Tensor | None = None  # [b] of the micro-batch in work

    def begin(self, batch: GlobalBatch) -> None:
        """Begin a training step."""
        self._targets = batch.dataset_targets
        self._sums = torch.zeros(len(self._targets), dtype=torch.float64, device=self._device)
        self._datasets = None
        if self._output is not None:
            self._output.observe = self._add if self._targets else None

    def of(self, datasets: npt.NDArray[np.int64] | None) -> None:
        """Set the datasets [b] of the next forward pass; None: its losses are not added."""
        to = None if datasets is None else torch.from_numpy(datasets)
        self._datasets = None if to is None else to.to(self._device, non_blocking=True)

    def sums(self) -> list[Tensor]:
        """Return this rank's sum of losses in nats, by dataset."""
        return list(self._sums)

    def means(self, sums: Sequence[float]) -> tuple[float | None, ...]:
        """Return the losses per target, given the sums over all ranks, which come last in `sums`."""
        own = sums[len(sums) - len(self._targets) :]
        return tuple(nats / count if count else None for nats, count in zip(own, self._targets, strict=True))

    def _add(self, losses: Tensor) -> None:
        if self._datasets is not None:
            self._sums.index_add_(0, self._datasets, losses.view(len(self._datasets), -1).double().sum(1))
