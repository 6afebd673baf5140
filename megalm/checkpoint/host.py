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
        total = sum(fragment.key.stop - fragment.key.start for fragment in sources)
        # Others are read from a disk when they are asked for, so that each is asked for once.
        on_device = any(fragment.tensor.is_cuda for fragment in sources if isinstance(fragment, Fragment))
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total, pin_memory=on_device)
        copies: list[Fragment] = []
        offset = 0
        for fragment in sources:
            length = fragment.key.stop - fragment.key.start
            copy = self._buffer.narrow(0, offset, length)
            copy.copy_(_flat(fragment.tensor), non_blocking=True)
            copies.append(Fragment(fragment.key, copy))
            offset += length
        if on_device:
            torch.cuda.synchronize()
        return copies


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)
