"""The seconds that this process spends in collectives: what is left of a step on a CPU is its own work.

For gloo alone: on a GPU a call returns before the device has come to it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megalm.engine.traffic_counter import wrap_collectives


class CollectiveClock:
    """Adds up `seconds` in torch.distributed's functions, and in waiting for those that run in the background."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = threading.local()

    def install(self) -> None:
        """Wrap torch.distributed's functions; call before DeepSpeed is imported."""
        wrap_collectives(lambda name, function: self._timed(function))
        dist.Work.wait = self._timed(dist.Work.wait)  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            if getattr(self._inside, "collective", False):  # one function may be made of others
                return function(*args, **options)
            self._inside.collective = True
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start
                self._inside.collective = False

        return timed
