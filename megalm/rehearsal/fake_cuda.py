"""The Python side of torch.cuda, on devices that do not exist; its C++ side is in fake_cuda.cpp.

Each function gives what a process of a node of such GPUs would see. A wait for the device is an event of the watcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalm.rehearsal.watcher import Watcher


@dataclass(frozen=True)
class GpuProperties:
    """`torch.cuda.get_device_properties` of every device of the node."""

    name: str
    total_memory: int
    major: int
    minor: int
    shared_memory_per_block_optin: int = 166_912
    multi_processor_count: int = 108
    warp_size: int = 32
    regs_per_multiprocessor: int = 65_536
    max_threads_per_multi_processor: int = 2_048
    L2_cache_size: int = 40 << 20
    gcnArchName: str = ""


class FakeCuda:
    """Stands in for torch.cuda from `install` on, for the rest of the process.

    Args:
        devices: of the node.
    """

    def __init__(self, properties: GpuProperties, devices: int, watcher: Watcher) -> None:
        self._properties = properties
        self._devices = devices
        self._watcher = watcher
        self._library = ctypes.CDLL(None)  # the C++ side, which this process has loaded
        self._stream = _stream_class(watcher)()

    def install(self) -> None:
        self._library.fake_cuda_register_guard()
        for name, function in self._functions().items():
            setattr(torch.cuda, name, function)
        torch.cuda.nccl.version = lambda: (2, 29, 3)  # DeepSpeed asks whether it sends bf16
        for name in ("range_push", "range_pop"):
            setattr(torch.cuda.nvtx, name, lambda *_: None)
        torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
        # Of a fake tensor: its own, where a CPU build of torch says False.
        torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == "cuda")  # type: ignore[assignment]
        warnings.filterwarnings("ignore")

    def _functions(self) -> dict[str, Any]:
        memory = self._watcher.memory["cuda"]
        properties = self._properties

        def constant(value: Any) -> Callable[..., Any]:
            return lambda *_, **__: value

        def of(dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:  # torch.cuda.FloatTensor and its like
            return lambda data: torch.tensor(data, dtype=dtype, device="cuda")

        here = constant(self._stream)
        return {
            **dict.fromkeys(("is_available", "is_initialized"), constant(True)),
            **dict.fromkeys(("_is_in_bad_fork", "is_current_stream_capturing"), constant(False)),
            **dict.fromkeys(("_lazy_init", "init", "empty_cache", "manual_seed", "manual_seed_all"), constant(None)),
            **dict.fromkeys(("set_rng_state", "set_stream", "ipc_collect"), constant(None)),
            "is_bf16_supported": lambda including_emulation=True: including_emulation or properties.major >= 8,
            "device_count": constant(self._devices),
            "current_device": self._library.fake_cuda_current_device,
            "set_device": self._set_device,
            "_exchange_device": self._set_device,
            "_maybe_exchange_device": self._set_device,
            "get_device_properties": constant(properties),
            "get_device_name": constant(properties.name),
            "get_device_capability": constant((properties.major, properties.minor)),
            "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
            "synchronize": lambda *_: self._watcher.note("synchronize"),
            "Stream": type(self._stream),
            "Event": _event_class(self._watcher),
            "current_stream": here,
            "default_stream": here,
            "stream": lambda _: contextlib.nullcontext(),
            "memory_allocated": lambda *_: memory.live,
            "memory_reserved": lambda *_: memory.live,
            "max_memory_allocated": lambda *_: memory.peak,
            "max_memory_reserved": lambda *_: memory.peak,
            "mem_get_info": lambda *_: (properties.total_memory - memory.live, properties.total_memory),
            "memory_stats": constant({}),
            "reset_peak_memory_stats": constant(None),
            "FloatTensor": of(torch.float32),
            "HalfTensor": of(torch.float16),
            "BFloat16Tensor": of(torch.bfloat16),
            "ByteTensor": of(torch.uint8),
            "IntTensor": of(torch.int32),
            "LongTensor": of(torch.int64),
        }

    def _set_device(self, device: Any) -> int:
        before: int = self._library.fake_cuda_current_device()
        index = device if isinstance(device, int) else torch.device(device).index
        if index is not None and index >= 0:  # torch restores a device of -1 where there was none
            self._library.fake_cuda_set_device(index)
        return before


def _stream_class(watcher: Watcher) -> type:
    class Stream:
        """A queue of work of the device, none of which is done."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.cuda_stream = id(self)
            self.device = torch.device("cuda", 0)

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None:
            return None

        def wait_stream(self, stream: Any) -> None:
            """The device waits, the host does not."""

        wait_event = wait_stream

        def record_event(self, event: Any = None) -> Any:
            return event or torch.cuda.Event()

        def synchronize(self) -> None:
            watcher.note("synchronize")

        def query(self) -> bool:
            return True

    return Stream


def _event_class(watcher: Watcher) -> type:
    class Event:
        """A mark in a stream."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, *_: Any) -> None:
            pass

        wait = record

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            watcher.note("synchronize")

        def elapsed_time(self, _: Any) -> float:
            return 0.0

    return Event
