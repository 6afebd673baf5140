"""Watches the load of the experts: one without tokens learns nothing, and one that gets most of them learns alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalm.engine.interface import RoutingStatistics

# Of the load at which all experts of a layer have equally many tokens.
_DEAD, _OVERLOADED = 0.02, 4.0
# An expert that every token is sent to has E/K times the equal load, which may be less than `_OVERLOADED`.
_OF_ALL_TOKENS = 0.95


class ExpertWatch:
    """Adds up the tokens of each expert, and reports them every `interval_steps`."""

    def __init__(self, interval_steps: int) -> None:
        self._interval = interval_steps
        self._counts: Any = None  # [L, E]
        self._steps = 0
        self._dropped = 0.0
        self._known: dict[str, list[list[int]]] = {"dead": [], "overloaded": []}

    def add(self, step: int, routing: RoutingStatistics, top: int) -> dict[str, dict[str, Any]]:
        """Add a step; where a report is due, return its events by name.

        These are `experts`, and `unbalanced_experts` where others than in the report before are dead or overloaded.

        Args:
            top: experts of a token.
        """
        counts = np.array(routing.counts, dtype=np.float64)
        self._counts = counts if self._counts is None else self._counts + counts
        self._steps += 1
        self._dropped += (routing.dropped or 0.0) * counts.sum()
        if self._steps < self._interval:
            return {}
        loads = self._counts / self._counts.mean(axis=1, keepdims=True)
        limit = min(_OVERLOADED, _OF_ALL_TOKENS * loads.shape[1] / top)
        before, self._known = (
            self._known,
            {
                name: [[routing.layers[row], int(expert)] for row, expert in np.argwhere(found)]
                for name, found in (("dead", loads < _DEAD), ("overloaded", loads >= limit))
            },
        )
        steps = {"first_step": step - self._steps + 1, "last_step": step}
        load = {str(layer): of_layer for layer, of_layer in zip(routing.layers, loads.round(4).tolist(), strict=True)}
        experts = {**steps, "load": load}
        if routing.dropped is not None:
            experts["dropped_tokens"] = round(float(self._dropped / self._counts.sum()), 4)
        self._counts, self._steps, self._dropped = None, 0, 0.0
        return {"experts": experts} | ({"unbalanced_experts": steps | self._known} if self._known != before else {})
