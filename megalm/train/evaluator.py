"""Validation: weighted means over fixed sets of tokens, the same for any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch

TOTAL = "validation"  # the only set, or all sets together


class Batches(Protocol):
    """A set, in whole global batches."""

    def __iter__(self) -> Iterator[GlobalBatch]: ...

    def batch(self, index: int) -> GlobalBatch: ...


class Evaluable(Protocol):
    """What evaluating needs of an engine."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float: ...


class Summing(Protocol):
    """What evaluating needs of the other ranks."""

    def sum(self, values: Sequence[float]) -> list[float]: ...


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per target; bits per byte of the text that the targets decode to, if the tokenizer tells.

    Attributes:
        parts: of a total of several sets, each of them.
    """

    dataset: str
    loss: float
    targets: int
    bits_per_byte: float | None
    parts: tuple[Evaluation, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond that a float overflows

    def __str__(self) -> str:
        bits = f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits} ({self.targets:,} tokens)"


@dataclass(frozen=True)
class _Sums:
    """Over a set: nats, targets, and bytes of text."""

    loss: float
    targets: int
    text_bytes: float

    def mean(self, dataset: str, parts: tuple[Evaluation, ...] = ()) -> Evaluation:
        bits = self.loss / math.log(2) / self.text_bytes if self.text_bytes else None
        return Evaluation(dataset, self.loss / self.targets, self.targets, bits, parts)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates an engine on validation sets, whole or the fixed parts that are used while training.

    Args:
        sets: by name, the part and the whole; several sets have a total, in which every token counts alike.
        token_bytes: [V] UTF-8 bytes that each token decodes to.
        replicas: ranks that read the same samples (tensor and pipeline neighbours).
        heartbeat: told of every batch.
    """

    sets: Mapping[str, tuple[Batches, Batches]]
    token_bytes: npt.NDArray[np.int32]
    comm: Summing
    replicas: int = 1
    heartbeat: Callable[[], None] = lambda: None

    def evaluate(self, engine: Evaluable, whole: bool) -> Evaluation | None:
        """Collective; None without a validation set."""
        sums = {name: self._sums(engine, loaders[whole]) for name, loaders in self.sets.items()}
        if not sums:
            return None
        parts = tuple(sum_of.mean(name) for name, sum_of in sums.items())
        if list(sums) == [TOTAL]:
            return parts[0]
        each = sums.values()
        total = _Sums(*(sum(getattr(one, name) for one in each) for name in ("loss", "targets", "text_bytes")))
        return total.mean(TOTAL, parts)

    def rehearse(self, engine: Evaluable) -> None:
        """One batch, for what it needs of memory."""
        for _, whole in list(self.sets.values())[:1]:
            engine.evaluate(whole.batch(0).micro_batches)

    def _sums(self, engine: Evaluable, loader: Batches) -> _Sums:
        loss_sum, targets, local_bytes = 0.0, 0, 0
        for batch in loader:
            loss_sum += engine.evaluate(batch.micro_batches)
            self.heartbeat()
            targets += batch.target_count
            local_bytes += sum(self._bytes(micro_batch.labels) for micro_batch in batch.micro_batches)
        return _Sums(loss_sum, targets, self.comm.sum([local_bytes])[0] / self.replicas)

    def _bytes(self, labels: npt.NDArray[np.int64]) -> int:
        return int(self.token_bytes[labels[labels >= 0]].sum())
