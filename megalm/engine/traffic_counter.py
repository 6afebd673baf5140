"""Counts the collectives of a process: megalm's and DeepSpeed's, which all go through torch.distributed's functions.

Those functions are wrapped before DeepSpeed takes them over. A wrapper passes everything on; it counts only between
`start` and `stop`, where a profiler that records sees it under its axis. Without a counter nothing is wrapped.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.profiler import record_function

from megalm.engine.interface import PROFILED_COMMUNICATION, Traffic
from megalm.parallel.process_groups import ParallelGroups

# Function -> its name here, and the argument that is the whole message.
_COLLECTIVES = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_reduce_coalesced": ("all_reduce", "tensors"),
    "broadcast": ("broadcast", "tensor"),
    "reduce": ("reduce", "tensor"),
    "all_gather": ("all_gather", "tensor_list"),
    "all_gather_into_tensor": ("all_gather", "output_tensor"),
    "all_gather_single": ("all_gather", "output_tensor"),
    "reduce_scatter": ("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_single": ("reduce_scatter", "input"),
    "all_to_all": ("all_to_all", "input_tensor_list"),
    "all_to_all_single": ("all_to_all", "input"),
    "gather": ("gather", "tensor"),
    "scatter": ("scatter", "tensor"),
    "send": ("send", "tensor"),
    "isend": ("send", "tensor"),
    "recv": ("recv", "tensor"),
    "irecv": ("recv", "tensor"),
}
_PEER_TO_PEER = ("send", "recv")


def wrap_collectives(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace each of torch.distributed's functions by `wrap(name, function)`."""
    for name in _COLLECTIVES:
        function = getattr(dist, name, None)
        if function is not None:  # not in every version of torch
            wrapper = wrap(name, function)
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, wrapper)


class TrafficCounter:
    """Counts calls and bytes by axis and collective; groups of a single rank move nothing and are left out."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._axes: dict[tuple[int, ...], str] = {}
        self._pipeline: frozenset[int] = frozenset()
        self._control: dist.ProcessGroup | None = None
        self._counts = False
        self._lock = threading.Lock()  # on a GPU the backward pass has threads of its own
        self._inside = threading.local()
        self._axis_of_work: WeakKeyDictionary[dist.Work, str] = WeakKeyDictionary()

    def install(self) -> None:
        """Wrap torch.distributed's functions; call before DeepSpeed's `init_distributed`."""
        wrap_collectives(lambda name, function: self._wrapped(function, *_COLLECTIVES[name]))
        dist.Work.wait = self._marked(dist.Work.wait)  # type: ignore[method-assign]

    def name_groups(self, groups: ParallelGroups, control: dist.ProcessGroup) -> None:
        """Tell axes from each other: by their ranks, since DeepSpeed makes groups of its own.

        "data" is data x context, over which gradients are summed; without data parallelism that is "context" too.
        "expert" has the tokens that travel, and where it has the ranks of another axis that one has them.
        """
        axes = {
            "expert_data": groups.expert_data,
            "expert": groups.expert,
            **({} if groups.node is None else {"node": groups.node}),
            **({} if groups.stage is None else {"stage": groups.stage}),
            "model": groups.model,
            "pipeline": groups.pipeline,
            "data": groups.data_context,
            "context": groups.context,
            "tensor": groups.tensor,
        }
        self._axes = {group.ranks: axis for axis, group in axes.items()}
        self._pipeline, self._control = frozenset(groups.pipeline.ranks), control

    def start(self) -> None:
        self._calls.clear()
        self._bytes.clear()
        self._counts = True

    def stop(self) -> list[Traffic]:
        self._counts = False
        return [Traffic(*place, calls, self._bytes[place]) for place, calls in sorted(self._calls.items())]

    def _wrapped(self, function: Callable[..., Any], collective: str, message: str) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            # One function may be made of others: the outermost is the one that counts.
            if not self._counts or getattr(self._inside, "collective", False):
                return function(*args, **options)
            arguments = signature.bind(*args, **options).arguments
            axis = self._axis(collective, arguments)
            if axis is None:
                return function(*args, **options)
            self._inside.collective = True
            try:
                with record_function(f"{PROFILED_COMMUNICATION}{axis} {collective}"):
                    result = function(*args, **options)
            finally:
                self._inside.collective = False
            with self._lock:
                self._calls[axis, collective] += 1
                self._bytes[axis, collective] += _size(arguments[message])
                if isinstance(result, dist.Work):
                    self._axis_of_work[result] = axis
            return result

        return counted

    def _marked(self, wait: Callable[..., bool]) -> Callable[..., bool]:
        """Mark the wait for a collective that the caller has let run: only there is seen what it costs."""

        @functools.wraps(wait)
        def marked(work: dist.Work, *args: Any, **options: Any) -> bool:
            if not self._counts or getattr(self._inside, "collective", False):
                return wait(work, *args, **options)
            with record_function(f"{PROFILED_COMMUNICATION}{self._axis_of_work.get(work, 'other')} wait"):
                return wait(work, *args, **options)

        return marked

    def _axis(self, collective: str, arguments: dict[str, Any]) -> str | None:
        """Return the axis that a collective runs along; None for a group of a single rank."""
        group = arguments.get("group") or dist.group.WORLD
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) < 2:
            return None
        if group is self._control:
            return "control"
        peer = arguments.get("dst", arguments.get("src"))
        if collective in _PEER_TO_PEER and peer in self._pipeline:  # between stages, over the group of all ranks
            return "pipeline"
        return self._axes.get(ranks, "other")


def _size(message: torch.Tensor | Iterable[torch.Tensor]) -> int:
    tensors = (message,) if isinstance(message, torch.Tensor) else message
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
