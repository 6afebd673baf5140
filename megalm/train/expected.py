"""The losses that a document had, told beside those of the run that follows it; never a reason to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megalm.config.documented_schema import DocumentedSection

# A loss read off another run's log is met by one that is so near; a range counts as it stands.
NEAR_NATS = 0.1

Quantity = Literal["training_loss", "validation_loss"]


@dataclass(frozen=True)
class Expectation:
    """A loss of the run beside the document's, of which `low` and `high` are the ends or the same."""

    step: int
    quantity: Quantity
    loss: float
    low: float
    high: float

    @property
    def is_met(self) -> bool:
        near = NEAR_NATS if self.low == self.high else 0.0
        return self.low - near <= self.loss <= self.high + near

    def __str__(self) -> str:
        documented = f"{self.low:g}" if self.low == self.high else f"{self.low:g}-{self.high:g}"
        off = self.loss - (self.high if self.loss > self.high else self.low)
        verdict = "as documented" if self.is_met else f"{abs(off):.2f} nats {'above' if off > 0 else 'below'}"
        which = "median training loss" if self.quantity == "training_loss" else "validation loss"
        return f"step {self.step}: {which} {self.loss:.4f}, documented {documented}: {verdict}"


def expectations(
    documented: DocumentedSection, quantity: Quantity, step: int, loss: Callable[[], float]
) -> list[Expectation]:
    """What the document says of this step, one or more; mostly nothing.

    Args:
        loss: the run's own; asked for only where the document has one.
    """
    found = []
    for claim in documented.claims:
        if claim.claim == quantity and claim.step == step:
            low, high = claim.value if isinstance(claim.value, tuple) else (claim.value, claim.value)
            found.append(Expectation(step, quantity, loss(), low, high))
    return found
