"""Watches the load of the experts: one without tokens learns nothing, and one that gets most of them learns alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.engine.interface import RoutingStatistics

# Of the load at which all experts of a layer have equally many tokens.
_DEAD, _OVERLOADED = 0.02, 4.0
# An expert that every token is sent to has E/K times the equal load, which may be less than `_OVERLOADED`.
_OF_ALL_TOKENS = 0.95


@dataclass(frozen=True)
class LoadReport:
    """The load of the experts in some steps, 1 where a layer's experts have equally many tokens.

    Attributes:
        load: by layer, of each expert.
        dead, overloaded: (layer, expert).
        dropped: the share of choices beyond the experts' capacity; None: they have none.
        is_news: whether these are others than in the report before; the first report with none is no news.
    """

    first_step: int
    last_step: int
    load: dict[int, tuple[float, ...]]
    dead: tuple[tuple[int, int], ...]
    overloaded: tuple[tuple[int, int], ...]
    dropped: float | None
    is_news: bool

    def fields(self) -> dict[str, Any]:
        """Of the event `experts`."""
        return {
            "first_step": self.first_step,
            "last_step": self.last_step,
            "load": {str(layer): [round(load, 4) for load in loads] for layer, loads in self.load.items()},
            **({} if self.dropped is None else {"dropped_tokens": round(self.dropped, 4)}),
        }

    def news(self) -> dict[str, Any]:
        """Of the event `unbalanced_experts`."""
        return {
            "first_step": self.first_step,
            "last_step": self.last_step,
            "dead": [list(place) for place in self.dead],
            "overloaded": [list(place) for place in self.overloaded],
        }


class ExpertWatch:
    """Adds up the tokens of each expert, and reports them every `interval_steps`."""

    def __init__(self, interval_steps: int) -> None:
        self._interval = interval_steps
        self._counts: Any = None  # [L, E]
        self._steps = 0
        self._dropped = 0.0
        self._known: tuple[tuple[tuple[int, int], ...], ...] = ((), ())

    def add(self, step: int, routing: RoutingStatistics, top: int) -> LoadReport | None:
        """Add a step; return a report where one is due.

        Args:
            top: experts of a token.
        """
        counts = np.array(routing.counts, dtype=np.float64)
        self._counts = counts if self._counts is None else self._counts + counts
        self._steps += 1
        self._dropped += (routing.dropped or 0.0) * counts.sum()
        if self._steps < self._interval:
            return None
        loads = self._counts / self._counts.mean(axis=1, keepdims=True)
        limit = min(_OVERLOADED, _OF_ALL_TOKENS * loads.shape[1] / top)
        places = [np.argwhere(loads < _DEAD), np.argwhere(loads >= limit)]
        dead, overloaded = (tuple((routing.layers[row], int(expert)) for row, expert in found) for found in places)
        is_news, self._known = (dead, overloaded) != self._known, (dead, overloaded)
        load = dict(zip(routing.layers, map(tuple, loads.tolist()), strict=True))
        dropped = None if routing.dropped is None else float(self._dropped / self._counts.sum())
        first, self._counts, self._steps, self._dropped = step - self._steps + 1, None, 0, 0.0
        return LoadReport(first, step, load, dead, overloaded, dropped, is_news)
