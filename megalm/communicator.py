"""The control channels between ranks: protocols of a communicator and a store, and the one of a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Communicator(Protocol):
    """Collectives of all ranks, on Python values.

    `broadcast` returns rank 0's value. `sum` and `max` reduce element by element. `once` and `once_per_node` run `work`
    on one rank, of all or of each node, and return its result on every rank.
    """

    rank: int
    size: int
    is_main: bool

    def barrier(self) -> None: ...
    def broadcast(self, value: T) -> T: ...
    def gather(self, value: T) -> list[T]: ...
    def sum(self, values: Sequence[float]) -> list[float]: ...
    def max(self, values: Sequence[float]) -> list[float]: ...
    def once(self, work: Callable[[], T]) -> T: ...
    def once_per_node(self, work: Callable[[], T]) -> T: ...


class SharedStore(Protocol):
    """Small values of a job by key, which any rank sets and reads, also while others are in a collective."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


class SingleProcessCommunicator:
    """The `Communicator` of a single process: every collective returns at once."""

    rank, size, is_main = 0, 1, True

    def barrier(self) -> None:
        return None

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def once(self, work: Callable[[], T]) -> T:
        return work()

    def once_per_node(self, work: Callable[[], T]) -> T:
        return work()
