"""Validation: mean losses over fixed sets of tokens, the same for any parallel layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megalm.communicator import Communicator
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.runs.metrics_log import TOTAL
from megalm.utils.formatting import perplexity_of


class Evaluable(Protocol):
    """The part of `Engine` that evaluation needs."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float: ...


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per target, and bits per byte of the targets' text if the tokenizer knows its tokens' bytes.

    Attributes:
        parts: the single sets' evaluations, for a total over several sets.
        stderr: standard error of the loss by the sample that was drawn, from the scatter of the batches around it; None
            for a set of one batch.
        ema_loss: with the moving average of the weights, if that was evaluated too.
    """

    dataset: str
    loss: float
    targets: int
    bits_per_byte: float | None
    parts: tuple[Evaluation, ...] = ()
    stderr: float | None = None
    ema_loss: float | None = None

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def __str__(self) -> str:
        bits = f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else ""
        average = f", loss of the EMA {self.ema_loss:.4f}" if self.ema_loss is not None else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits} ({self.targets:,} tokens){average}"


@dataclass(frozen=True)
class _Sums:
    """Sums over a set: nats, targets, bytes of text, and the variance of the sum of nats (NaN: not known)."""

    loss: float
    targets: int
    text_bytes: float
    variance: float

    @staticmethod
    def of(batches: Sequence[tuple[float, int]], text_bytes: float) -> _Sums:
        """Return the sums over batches of (nats, targets).

        The mean is a ratio of sums, whose variance follows from the batches' residuals (Cochran, Sampling Techniques,
        1977, section 6.4).
        """
        loss, targets = 0.0, 0
        for nats, count in batches:  # not by sum(), which adds floats otherwise from Python 3.12 on
            loss, targets = loss + nats, targets + count
        residuals = [nats - loss / targets * count for nats, count in batches] if targets else []
        spread = len(batches) / (len(batches) - 1) if len(batches) > 1 else math.nan
        return _Sums(loss, targets, text_bytes, spread * sum(residual**2 for residual in residuals))

    def mean(self, dataset: str, parts: tuple[Evaluation, ...] = ()) -> Evaluation:
        bits = self.loss / math.log(2) / self.text_bytes if self.text_bytes else None
        stderr = math.sqrt(self.variance) / self.targets if math.isfinite(self.variance) else None
        return Evaluation(dataset, self.loss / self.targets, self.targets, bits, parts, stderr)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates an engine on validation sets, or on the fixed parts of them that are used during training.

    Args:
        sets: by name, loaders of the part and of the complete set. Several sets have a total, weighted by tokens.
        token_bytes: [V] UTF-8 bytes that each token decodes to.
        replicas: number of ranks that read the same samples (tensor, context and pipeline neighbors).
        heartbeat: called after every batch.
        averaged_weights: the engine's, where the moving average of the weights is evaluated too, in a second pass.
    """

    sets: Mapping[str, tuple[Iterable[GlobalBatch], Iterable[GlobalBatch]]]
    token_bytes: npt.NDArray[np.int32]
    comm: Communicator
    replicas: int = 1
    heartbeat: Callable[[], None] = lambda: None
    averaged_weights: Callable[[], AbstractContextManager[None]] | None = None

    def evaluate(self, engine: Evaluable, whole: bool) -> Evaluation | None:
        """Evaluate all sets, complete or in part. Collective; returns None without a validation set."""
        found = self._evaluate(engine, whole)
        if found is None or self.averaged_weights is None:
            return found
        with self.averaged_weights():
            average = self._evaluate(engine, whole)
        assert average is not None
        pairs = zip(found.parts, average.parts, strict=True)
        return replace(found, ema_loss=average.loss, parts=tuple(replace(one, ema_loss=it.loss) for one, it in pairs))

    def _evaluate(self, engine: Evaluable, whole: bool) -> Evaluation | None:
        sums = {name: self._sums(engine, loaders[whole]) for name, loaders in self.sets.items()}
        if not sums:
            return None
        parts = tuple(sum_of.mean(name) for name, sum_of in sums.items())
        if list(sums) == [TOTAL]:
            return parts[0]
        each = sums.values()
        total = _Sums(
            *(sum(getattr(one, name) for one in each) for name in ("loss", "targets", "text_bytes", "variance"))
        )
        return total.mean(TOTAL, parts)

    def preflight(self, engine: Evaluable) -> None:
        """Preflight: evaluate one batch, to find out whether memory suffices."""
        for _, whole in list(self.sets.values())[:1]:
            with self.averaged_weights() if self.averaged_weights is not None else nullcontext():
                engine.evaluate(next(iter(whole)).micro_batches)

    def _sums(self, engine: Evaluable, loader: Iterable[GlobalBatch]) -> _Sums:
        batches, local_bytes = [], 0
        for batch in loader:
            batches.append((engine.evaluate(batch.micro_batches), batch.target_count))
            self.heartbeat()
            local_bytes += sum(self._bytes(micro_batch.labels) for micro_batch in batch.micro_batches)
        return _Sums.of(batches, self.comm.sum([local_bytes])[0] / self.replicas)

    def _bytes(self, labels: npt.NDArray[np.int64]) -> int:
        return int(self.token_bytes[labels[labels >= 0]].sum())
