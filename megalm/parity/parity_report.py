"""The findings of all ranks as a table and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megalm.checkpoint.shard_spec import KINDS
from megalm.config.deepspeed.json_schema import Precision
from megalm.config.schema import OptimizerStateKind
from megalm.errors import TrainingError
from megalm.parity.state_comparison import (
    TOLERANCES,
    State,
    Tolerance,
    Trace,
    difference,
    differing,
    relative,
    state_difference,
)
from megalm.parity.state_comparison import whole_state as whole

if TYPE_CHECKING:  # the command imports no torch before it runs
    from megalm.parity.miniature_training import RankFindings

# In low precision the gradients of so few tokens are rounded more than those of the parity matrix. What is broken is
# off by a third and more.
_LOW = Tolerance(loss=1e-3, norm=2e-2, weights=0.2, moments=0.2, logits=0.1)
# The smallest moments of a block take its smallest levels, and layouts cut blocks elsewhere.
_EIGHT_BIT = replace(_LOW, loaded_moments=1e-2)


def allowed(precision: Precision, states: OptimizerStateKind) -> Tolerance:
    """How far a miniature may be from one rank.

    Moments in fewer bytes are rounded by random bits from gradients, which layouts add in another order.
    """
    if states == "8bit":
        return _EIGHT_BIT
    return TOLERANCES["fp32"] if precision == states == "fp32" else _LOW


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        against: what with.
        difference: the largest; of `unit` "elements", a number of elements that are not the same bit for bit.
        allowed: at most.
    """

    what: str
    against: str
    difference: float
    allowed: float
    unit: Literal["relative", "elements"] = "relative"

    @property
    def equal(self) -> bool:
        return self.difference <= self.allowed  # nan is beyond everything


@dataclass(frozen=True)
class ParityReport:
    """Attributes:
    losses, norms: of each step, of the miniature and of one rank.
    failure: why there is nothing to compare; None: there is.
    """

    lines: tuple[Line, ...] = ()
    losses: tuple[tuple[float, float], ...] = ()
    norms: tuple[tuple[float, float], ...] = ()
    failure: str | None = None

    @property
    def equal(self) -> bool:
        return self.failure is None and bool(self.lines) and all(line.equal for line in self.lines)


def compare(
    alone: RankFindings, ranks: Sequence[RankFindings], on_one: tuple[Trace, Trace], tolerance: Tolerance
) -> ParityReport:
    """Compare the miniature with one rank.

    Args:
        alone: of one rank.
        ranks: of the miniature.
        on_one: one rank that resumes the miniature's checkpoint: the state after loading, and the steps after that.
        tolerance: see `allowed`.
    """
    try:
        lines = tuple(_lines(alone, ranks, on_one, tolerance))
    except TrainingError as error:
        return ParityReport(failure=str(error))
    first, one = ranks[0].trained.trained, alone.trained.trained
    losses, norms = (tuple(zip(*pair, strict=True)) for pair in ((first.losses, one.losses), (first.norms, one.norms)))
    return ParityReport(lines, losses, norms)


def _lines(
    alone: RankFindings, ranks: Sequence[RankFindings], on_one: tuple[Trace, Trace], tolerance: Tolerance
) -> Iterator[Line]:
    found = difference([rank.trained for rank in ranks], alone.trained)
    one, here = "one rank", "the same steps without a stop"
    yield Line("weights before step 1", one, found.initial_weights, 0, "elements")
    yield Line("losses of steps and validation", one, found.loss, tolerance.loss)
    yield Line("gradient norms", one, found.norm, tolerance.norm)
    yield Line("weights after the steps", one, found.weights, tolerance.weights)
    yield Line("moments after the steps", one, found.moments, tolerance.moments)
    yield Line("scores of the next token", one, found.logits, tolerance.logits)
    resumed, undisturbed = [rank.resumed for rank in ranks], [rank.second_half for rank in ranks]
    yield Line("resumed: losses and norms", here, _numbers(resumed, undisturbed), 0)
    yield Line("resumed: weights and moments", here, differing(whole(resumed), whole(undisturbed)), 0, "elements")

    loaded, after = on_one
    saved = whole([rank.saved for rank in ranks])
    yield from _loaded("its checkpoint on one rank", whole([loaded]), saved, tolerance)
    yield from _followed("its checkpoint on one rank", [after], undisturbed, tolerance)
    moved, states = [rank.moved for rank in ranks], [rank.moved_state for rank in ranks]
    assert all(moved), "each rank of the miniature has loaded one rank's checkpoint"
    here_loaded = whole([each for each in states if each is not None])
    yield from _loaded("one rank's checkpoint here", here_loaded, whole([alone.saved]), tolerance)
    there = [each for each in moved if each is not None]
    yield from _followed("one rank's checkpoint here", there, [alone.second_half], tolerance)


def _loaded(what: str, found: State, saved: State, tolerance: Tolerance) -> Iterator[Line]:
    against = "the state saved"
    if not tolerance.loaded_moments:
        yield Line(f"{what}: state", against, differing(found, saved), 0, "elements")
        return
    masters, same = ({place: state[place] for place in state if place[1] == KINDS[0]} for state in (found, saved))
    yield Line(f"{what}: loaded weights", against, differing(masters, same), 0, "elements")
    moments = max(state_difference(found, saved, kind) for kind in KINDS[1:])
    yield Line(f"{what}: loaded moments", against, moments, tolerance.loaded_moments)


def _followed(what: str, found: Sequence[Trace], expected: Sequence[Trace], tolerance: Tolerance) -> Iterator[Line]:
    against = "the steps that it comes from"
    losses = max(relative(each.losses, expected[0].losses) for each in found)
    yield Line(f"{what}: losses", against, losses, tolerance.loss)
    weights = state_difference(whole(found), whole(expected), KINDS[0])
    yield Line(f"{what}: weights", against, weights, tolerance.weights)


def _numbers(found: Sequence[Trace], expected: Sequence[Trace]) -> float:
    return max(
        max(relative(each.losses, other.losses), relative(each.norms, other.norms))
        for each, other in zip(found, expected, strict=True)
    )
