"""The control channel between ranks: the `Communicator` protocol and its single-process implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Communicator(Protocol):
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


T = TypeVar("T")


class SingleProcessCommunicator:
    """The `Communicator` of a process without other ranks: every collective returns at once."""

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
