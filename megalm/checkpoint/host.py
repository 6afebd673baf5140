"""Copies of a rank's fragments in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megalm.checkpoint.fragment import Fragment, HasFragment


class HostCopies:
    """One buffer, made at the first use and used again: fresh or newly pinned pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, fragments: Iterable[HasFragment]) -> list[Fragment]:
        """Copies of `fragments`, fp32; what an earlier call gave is overwritten."""
        sources = list(fragments)
        total = sum(fragment.tensor.numel() for fragment in sources)
        on_device = any(fragment.tensor.is_cuda for fragment in sources)
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total, pin_memory=on_device)
        copies: list[Fragment] = []
        offset = 0
        for fragment in sources:
            copy = self._buffer.narrow(0, offset, fragment.tensor.numel())
            copy.copy_(_flat(fragment.tensor), non_blocking=True)
            copies.append(Fragment(fragment.key, copy))
            offset += copy.numel()
        if on_device:
            torch.cuda.synchronize()
        return copies


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)
