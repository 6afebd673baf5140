"""A claim of a document and what it is judged by: the plan, what else the document claims, and tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalm.config.documented_schema import Claim, ClaimKind
from megalm.estimate.data_sheet import data_sheet_peak
from megalm.planning.plan import Plan
from megalm.planning.ranges import Range, agree

HOLDS = "holds"
EXPECTED = "to be seen in the run"
NO_VERDICT = "-"

# How far a claim may be from what is computed: a share of it, for a first loss nats.
EXACT = 0.001  # of what was counted
ROUNDED = 0.02  # of what people round
MEASURED = 0.1  # of what a clock or an allocator said
FIRST_LOSS_NATS = 0.5  # an untrained model knows nothing, but does not guess evenly

SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Judgement:
    """A claim in words, what megalm computes for it, and whether it holds."""

    claim: str
    computed: str
    verdict: str

    @property
    def refuted(self) -> bool:
        return self.verdict.startswith("does not hold")


def tolerances() -> str:
    """In words, for below a table of judgements."""
    return (
        f"A claim holds within {EXACT:.1%} where it counts samples, {ROUNDED:.0%} where it is a rounded number, "
        f"{MEASURED:.0%} where it was measured, {FIRST_LOSS_NATS:g} nats where it is the loss of step 0."
    )


class Book:
    """A plan and the claims that other claims are judged by."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = plan.resolved.config
        self.documented = self.config.documented
        self.devices = self.documented.devices or plan.resolved.topology.world_size

    def claimed(self, kind: ClaimKind) -> Range | None:
        """What the document says of a thing, the first time that it does."""
        return next((range_of(claim) for claim in self.documented.claims if claim.claim == kind), None)

    @property
    def block_parameters(self) -> int:
        shapes = self.plan.shape.parameters()
        return sum(math.prod(dims) for name, dims in shapes.items() if name.startswith("layers."))

    @property
    def model_words(self) -> str:
        shape = self.plan.shape
        return f"{shape.num_hidden_layers} x {shape.hidden_size} with {shape.vocab_size:,} pieces"

    @property
    def tokens_words(self) -> str:
        batch, steps = self.plan.resolved.batch.global_batch, self.config.train.steps
        return f"{steps:,} x {batch} x {self.config.data.sequence_length:,}"

    @property
    def peak(self) -> float | None:
        """FLOP/s of all devices that the document names."""
        precision = self.plan.resolved.precision
        found = data_sheet_peak(self.documented.device or "", precision != "fp32")
        return found[0] * self.devices if found else None


def verdict_on(claimed: Range, computed: float, tolerance: float, wrong: str) -> str:
    """That the claim holds, or that it does not and why."""
    return HOLDS if agree(claimed, (computed, computed), tolerance) else f"does not hold: {wrong}"


def perplexity(loss: float) -> float:
    """Of a loss in nats; beyond 700 a float overflows."""
    return math.exp(min(loss, 700.0))


def range_of(claim: Claim) -> Range:
    """Both ends; of a single number the same one twice."""
    return claim.value if isinstance(claim.value, tuple) else (claim.value, claim.value)
