"""Validation: a weighted mean over a fixed set of tokens, the same for any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.data.loader import ValidationLoader
from megalm.engine.protocol import Comm, Engine


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per target; bits per byte of the text that the targets decode to, if the tokenizer tells."""

    dataset: str
    loss: float
    targets: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond that a float overflows

    def __str__(self) -> str:
        bits = f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits} ({self.targets:,} tokens)"


@dataclass(frozen=True)
class Evaluator:
    """Evaluates an engine on a validation set, whole or the fixed part that is used while training.

    Args:
        token_bytes: [V] UTF-8 bytes that each token decodes to.
    """

    dataset: str
    part: ValidationLoader | None
    whole: ValidationLoader | None
    token_bytes: npt.NDArray[np.int32]
    comm: Comm

    def evaluate(self, engine: Engine, whole: bool) -> Evaluation | None:
        """Collective; None without a validation set."""
        loader = self.whole if whole else self.part
        if loader is None:
            return None
        loss_sum, targets, local_bytes = 0.0, 0, 0
        for batch in loader:
            loss_sum += engine.evaluate(batch.micro_batches)
            targets += batch.target_count
            local_bytes += sum(self._bytes(micro_batch.labels) for micro_batch in batch.micro_batches)
        text_bytes = self.comm.sum([local_bytes])[0]
        bits = loss_sum / math.log(2) / text_bytes if text_bytes else None
        return Evaluation(self.dataset, loss_sum / targets, targets, bits)

    def rehearse(self, engine: Engine) -> None:
        """One batch, for what it needs of memory."""
        if self.whole is not None:
            engine.evaluate(self.whole.batch(0).micro_batches)

    def _bytes(self, labels: npt.NDArray[np.int64]) -> int:
        return int(self.token_bytes[labels[labels >= 0]].sum())
