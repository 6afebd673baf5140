"""Watch every operation of a rehearsal: copies and waits between host and device, and the memory of both.

Nothing is computed: tensors are fake, and the host's reads of their values get 1 (a number) or 0 (a count, a flag).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megalm
from megalm.rehearsal.rehearsal_report import EventKind, HostEvent

_ALLOCATED = {"cuda": 512, "cpu": 1}  # CUDA's allocator rounds each tensor up to this many bytes
_PACKAGE = str(Path(megalm.__file__).parent)
_DEEPSPEED = f"{Path('site-packages') / 'deepspeed'}/"
# Frames that only pass on what others ask for.
_PASSING = (
    f"{_PACKAGE}/rehearsal/",
    "/accelerator/",
    "/utils/nvtx.py",
    "/deepspeed/comm/",
    "/engine/traffic_counter.py",
)
_KINDS = {  # beginning of an operator's name -> how it is watched
    "aten._local_scalar_dense": "question",
    "aten.equal": "question",
    "aten.is_pinned": "question",
    "aten._pin_memory": "question",
    "aten.nonzero": "dynamic",
    "aten.masked_select": "dynamic",
    "aten._unique2": "dynamic",
    "aten._to_copy": "convert",
    "aten.copy_": "copy",
    "aten._scaled_dot_product_flash_attention_backward": "flash_backward",
    "c10d": "collective",
    "aten.lift_fresh": "lift",
    "prim": "other",
    "megalm.dropout_mask": "seeded",  # its seed is text in the CPU's memory, for the host
}


@functools.cache
def _kind_of(op: Any) -> str:
    name = str(op)
    known = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
    return known or ("view" if getattr(op, "is_view", False) else "other")


def place_of(frame: FrameType | None) -> str:
    """File and function of the innermost frame of megalm or DeepSpeed."""
    while frame is not None:
        file = frame.f_code.co_filename
        if (file.startswith(_PACKAGE) or _DEEPSPEED in file) and not any(part in file for part in _PASSING):
            root = file.rindex("/megalm/") if file.startswith(_PACKAGE) else file.rindex("/deepspeed/")
            return f"{file[root + 1 :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"  # whose thread for the device has no frames of ours


def _view(op: Any, args: Any, kwargs: Any) -> Any:
    """A view of a fake tensor, without the cache of FakeTensorMode: it costs more than the view.

    ZeRO 3 makes a view for each rank whenever it gathers a parameter.
    """
    base = args[0]
    if not isinstance(base, FakeTensor):
        return op(*args, **kwargs)
    with in_kernel_invocation_manager(base.fake_mode):
        out = op(*args, **kwargs)
    if isinstance(out, Tensor):
        return FakeTensor(base.fake_mode, out, base.fake_device)
    return [FakeTensor(base.fake_mode, part, base.fake_device) for part in out]


class DeviceMemory:
    """Bytes of the storages of one kind of device."""

    def __init__(self, device: str) -> None:
        self._unit = _ALLOCATED[device]
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self.live = 0
        self.peak = 0
        self.peak_place = ""

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self._unit) * self._unit
        known = self._known.get(key)
        if known is not None and known[1]() is not None:
            if known[0] == size:
                return
            self.live -= known[0]
            reference = known[1]
        else:
            reference = weakref.ref(storage, lambda gone: self._forget(key, gone))
        self._known[key] = size, reference
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_place = self.live, place_of(sys._getframe(1))

    def borrow(self, size: int) -> None:
        """Count bytes that an operation has allocated and freed again."""
        if self.live + size > self.peak:
            self.peak, self.peak_place = self.live + size, place_of(sys._getframe(1))

    def restart_peak(self) -> None:
        self.peak, self.peak_place = self.live, "before"

    def _forget(self, key: int, gone: weakref.ref[Any]) -> None:
        size, reference = self._known.get(key, (0, None))
        if reference is gone:
            self.live -= size
            del self._known[key]


class Watcher(TorchDispatchMode):
    """Use as a context inside a FakeTensorMode, so that it sees operations first."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap each call, to keep out a compiler that does not run here

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.memory = {"cuda": DeviceMemory("cuda"), "cpu": DeviceMemory("cpu")}
        self._events: Counter[tuple[EventKind, str]] = Counter()
        self._bytes: Counter[tuple[EventKind, str]] = Counter()
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pinned_addresses: set[int] = set()

    def begin(self) -> None:
        """Begin a phase: forget events and peaks, keep what is alive."""
        self._events.clear()
        self._bytes.clear()
        for memory in self.memory.values():
            memory.restart_peak()

    def events(self) -> Iterator[HostEvent]:
        for (kind, place), count in sorted(self._events.items()):
            yield HostEvent(kind, place, count, self._bytes[kind, place])

    def note(self, kind: EventKind, tensor: Tensor | None = None) -> None:
        where = kind, place_of(sys._getframe(1))
        self._events[where] += 1
        self._bytes[where] += 0 if tensor is None else tensor.numel() * tensor.element_size()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind_of(op)
        if kind == "view":
            return _view(op, args, kwargs)
        if kind == "question":
            return self._answer(str(op), op, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kind == "dynamic" and any(map(_is_on_gpu, inputs)):
            self.note("size")
        out = op(*args, **kwargs)
        outputs = [out] if isinstance(out, Tensor) else [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            memory = self.memory.get(tensor.device.type)
            if memory is not None:  # DeepSpeed makes meta tensors
                memory.see(tensor)
            if kwargs.get("pin_memory") or (kind == "lift" and self._is_pinned(args[0])):
                self._pinned.add(tensor.untyped_storage())
        if kind == "flash_backward":
            self.memory["cuda"].borrow(_flash_scratch(*args[1:3]))
        elif kind == "convert":
            self._copied(inputs[0], outputs[0], kwargs.get("non_blocking", False))
        elif kind == "copy":
            self._copied(args[1], args[0], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        elif kind not in ("collective", "seeded"):
            self._require_one_device(inputs)
        return out

    def _answer(self, name: str, op: Any, args: Any, kwargs: Any) -> Any:
        """Answer a question about a tensor's value or memory."""
        tensor = args[0]
        if name.startswith("aten.is_pinned"):
            return self._is_pinned(tensor)
        if name.startswith("aten._pin_memory"):
            pinned = torch.empty_like(tensor)
            self._pinned.add(pinned.untyped_storage())
            return pinned
        if _is_on_gpu(tensor):
            self.note("read", tensor)
        if name.startswith("aten.equal"):
            return True
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return op(*args, **kwargs)
        return 1.0 if tensor.dtype.is_floating_point else tensor.dtype != torch.bool and 0

    def pin(self, tensor: Tensor) -> Tensor:
        """Stand for `pin_memory` of a tensor with real values, in any thread: from now on its place is pinned."""
        self._pinned_addresses.add(tensor.data_ptr())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return tensor.untyped_storage() in self._pinned
        return tensor.data_ptr() in self._pinned_addresses

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type == target.device.type:
            return
        if _is_on_gpu(source):
            waits = not non_blocking or not self._is_pinned(target)
            self.note("to_host" if waits else "prefetch", source)
        else:
            waits = not non_blocking or not self._is_pinned(source)
            self.note("to_device" if waits else "prefetch", target)

    def _require_one_device(self, inputs: list[Tensor]) -> None:
        """Note tensors of both devices; single numbers on the CPU become arguments of the kernel."""
        kinds = {_is_on_gpu(tensor) for tensor in inputs if tensor.ndim or _is_on_gpu(tensor)}
        if len(kinds) > 1:
            self.note("mixed")


def _flash_scratch(query: Tensor, key: Tensor) -> int:
    """Bytes that torch's flash attention holds beside its gradients: the sum of the queries' gradients in fp32, and
    where query heads share keys, the keys' and values' gradients of each query head."""
    shares_keys = key.shape[1] != query.shape[1]
    return query.numel() * (4 + (2 * query.element_size() if shares_keys else 0))


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"
