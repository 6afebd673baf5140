"""The inputs of recomputed blocks in the CPU's memory, from a block's forward pass to its backward pass.

Each input is copied out while its block computes, and comes back while the block behind it computes backward, on a
stream of its own. The two streams wait for each other; the host waits for neither.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor


class OffloadedInputs:
    """Keeps block inputs in page-locked buffers, which later micro-batches and steps use again.

    On a CPU inputs are copied too, within its memory: the same numbers, and nothing saved.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._newest: weakref.ref[_Kept] | None = None

    def instead_of(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Within it autograd keeps a copy on the host where it would keep `hidden`, the input of a block.

        Enter it for each block in the order of the forward pass. The backward pass reads an input once.
        """
        storage = hidden.untyped_storage()._cdata  # its address says nothing on "meta"

        def pack(tensor: Tensor) -> Tensor | _Kept:
            return self._keep(tensor) if tensor.untyped_storage()._cdata == storage else tensor

        def unpack(kept: Tensor | _Kept) -> Tensor:
            return self._read(kept) if isinstance(kept, _Kept) else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _keep(self, hidden: Tensor) -> _Kept:
        before = None if self._newest is None else self._newest()
        if before is not None and before.host is not None:
            # The block before has computed, so its input's copy is done or nearly so. Until now the input stayed: the
            # last one stays until the backward pass, which reads it first.
            self._wait(before.copied)
            before.device = None
        free = self._free[hidden.shape, hidden.dtype]
        pinned = self._stream is not None
        host = free.pop() if free else torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=pinned)
        kept = _Kept(host, hidden.detach(), self._copy(hidden.detach(), host), self._newest)
        self._newest = weakref.ref(kept)
        return kept

    def _read(self, kept: _Kept) -> Tensor:
        if kept.device is None:
            self._fetch(kept)
        if kept.host is None:
            self._wait(kept.copied)
        self._release(kept)
        before = None if kept.before is None else kept.before()
        if before is not None and before.device is None and before.host is not None:
            self._fetch(before)
        device, kept.device = kept.device, None
        assert device is not None
        return device

    def _fetch(self, kept: _Kept) -> None:
        """Begin to copy an input back."""
        if kept.host is None:
            raise RuntimeError("the backward pass reads an offloaded block input twice")
        kept.device = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self._device)
        kept.copied = self._copy(kept.host, kept.device)
        self._release(kept)

    def _release(self, kept: _Kept) -> None:
        """Let another input have the buffer: its copy follows this one's on the same stream."""
        if kept.host is not None:
            self._free[kept.host.shape, kept.host.dtype].append(kept.host)
            kept.host = None

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copy after what is queued by now, and beside what is queued later; return the mark of its end."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def _wait(self, copied: torch.cuda.Event | None) -> None:
        """Let what is queued from now on wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)


@dataclass(eq=False)
class _Kept:
    """One block's input; the graph holds it.

    Attributes:
        host: its buffer, until it is copied back or read.
        device: the input itself, until its copy is needed, and again when it has come back.
        copied: the end of the latest copy.
        before: the input of the block before.
    """

    host: Tensor | None
    device: Tensor | None
    copied: torch.cuda.Event | None
    before: weakref.ref[_Kept] | None
