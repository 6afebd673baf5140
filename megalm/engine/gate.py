"""One joint decision before an update: may the optimizer apply it?

DeepSpeed calls the `step` of the optimizer that it was handed once for each parameter group (ZeRO 1, 2) or sub-group
(ZeRO 3), after the global gradient norm is known and before anything has moved. A gate in front of that `step` is asked
once a training step; refused, no group's weights, moments or step count change, and what DeepSpeed copies from masters
to low-precision weights afterwards is what was there.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from megalm.engine.protocol import Accept, Comm


class UpdateGate:
    """Stands before the optimizer's `step`.

    Args:
        comm: the world; a rank that refuses refuses for all.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._ask: Callable[[], bool] | None = None
        self._answer: bool | None = None
        # Tells the squares of the gradients being stepped, by parameter; known once DeepSpeed has made its wrapper.
        self.measure: Callable[[], dict[str, float]] = dict
        self.refused_squares: Counter[str] = Counter()

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on `optimizer.step` does nothing where the answer is no.

        The instance's method is replaced, and no subclass made: DeepSpeed compares exact types to know whether an
        optimizer works with ZeRO.
        """
        step = optimizer.step

        @functools.wraps(step)
        def guarded(*args: Any, **options: Any) -> Any:
            if self._admits():
                return step(*args, **options)
            self.refused_squares.update(self.measure())
            return None

        optimizer.step = guarded  # type: ignore[method-assign]

    def open(self, loss: float, norm: Callable[[], float], accept: Accept | None) -> None:
        """Before the update of one training step.

        Args:
            loss: of the global batch, the same on every rank.
            norm: tells the global gradient norm; called only once DeepSpeed has computed it.
            accept: a person's rule; None takes every update. What is no number is always refused.
        """

        def ask() -> bool:
            found = norm()
            return math.isfinite(loss) and math.isfinite(found) and (accept is None or accept(loss, found))

        self._ask, self._answer = ask, None
        self.refused_squares.clear()

    def close(self) -> bool | None:
        """After the update: the answer, None where DeepSpeed dropped the update itself and nobody was asked."""
        self._ask = None
        return self._answer

    def _admits(self) -> bool:
        if self._ask is None:  # DeepSpeed steps while it builds its engine, too
            return True
        if self._answer is None:
            refused = self._comm.max([0.0 if self._ask() else 1.0])[0]
            self._answer = refused == 0.0
        return self._answer
