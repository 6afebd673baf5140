"""What training showed, and how far two runs of the same job are apart. NumPy alone: fragments come as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.checkpoint.shard_spec import FragmentKey, FragmentKind
from megalm.data.sampling.batch_loader import MicroBatch
from megalm.data.sampling.samples import IGNORE_INDEX
from megalm.errors import TrainingError
from megalm.model.model_config import EXPERT_BIAS

Array = npt.NDArray[np.float32]
Fragments = list[tuple[FragmentKey, Array]]
# (canonical name, kind) -> the whole parameter, flat.
State = dict[tuple[str, FragmentKind], Array]


@dataclass
class Trace:
    """What training showed: one entry a step, and the final fp32 masters and moments (the rank's own fragments)."""

    losses: list[float]
    norms: list[float]
    fragments: Fragments


@dataclass
class Outcome:
    """What one rank shows of a layout: its first state, its steps, the next batch's validation losses, [B, V] logits.

    Attributes:
        validation: the loss, and where the run keeps an average of the weights, the loss with that.
        choices: [B] the losses of some rows, as of the choices of a question.
    """

    initial: Trace
    trained: Trace
    validation: list[float]
    logits: Array
    choices: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tolerance:
    """Largest differences to one rank: of losses and norms relative, of states relative to each parameter's L2 norm.

    Attributes:
        loaded_moments: of moments that another layout has saved; 0: they are equal bit for bit.
    """

    loss: float
    norm: float
    weights: float
    moments: float
    logits: float
    loaded_moments: float = 0.0


TOLERANCES = {
    "fp32": Tolerance(loss=1e-5, norm=1e-5, weights=1e-5, moments=1e-5, logits=1e-5),
    "fp16": Tolerance(loss=1e-5, norm=1e-3, weights=1e-2, moments=2e-2, logits=5e-3),
    # CPUs round bf16 products otherwise: the same rows have moments within 3e-2 on one and 9e-2 on another, where a
    # rank's part that is missing or counted twice makes a difference of 5e-1.
    "bf16": Tolerance(loss=1e-4, norm=5e-3, weights=1e-1, moments=1e-1, logits=3e-2),
}
# The same number added to all scores changes no softmax: in exact arithmetic a bias on keys has no gradient and no
# effect. What it has in floating point is rounding alone, which Adam turns into steps.
_WITHOUT_EFFECT = "attention.key.bias"


@dataclass(frozen=True)
class Difference:
    """The largest differences of a layout to one rank."""

    initial_weights: int
    loss: float
    norm: float
    weights: float
    moments: float
    logits: float

    def beyond(self, tolerance: Tolerance) -> list[str]:
        """What differs by more than it may, in words."""
        found = [
            f"{name} differ by {getattr(self, name):.1e}, allowed {getattr(tolerance, name):.0e}"
            for name in ("loss", "norm", "weights", "moments", "logits")
            if not getattr(self, name) <= getattr(tolerance, name)  # nan is beyond everything
        ]
        return found + ([f"{self.initial_weights} initial weights differ"] if self.initial_weights else [])


def difference(ranks: Sequence[Outcome], reference: Outcome) -> Difference:
    """How far the ranks of a layout are from the one-rank run, at most over ranks, steps and parameters."""
    initial, first = whole_state([rank.initial for rank in ranks]), whole_state([reference.initial])
    final, expected = whole_state([rank.trained for rank in ranks]), whole_state([reference.trained])
    _require_same_parameters(initial, first, final, expected)
    moments = {kind for _, kind in expected} - {"master"}
    return Difference(
        initial_weights=differing(initial, first),
        loss=max(
            relative([*rank.trained.losses, *rank.validation], [*reference.trained.losses, *reference.validation])
            for rank in ranks
        ),
        norm=max(relative(rank.trained.norms, reference.trained.norms) for rank in ranks),
        weights=state_difference(final, expected, "master"),
        moments=max(state_difference(final, expected, kind) for kind in sorted(moments)),
        logits=max(
            _l2(getattr(rank, name) - getattr(reference, name)) / _l2(getattr(reference, name))
            for rank in ranks
            for name in ("logits", "choices")
        ),
    )


def some_choices(vocab_size: int, length: int) -> MicroBatch:
    """Return three rows, which few numbers of ranks divide evenly, of which the last tokens are scored."""
    tokens = np.random.default_rng(4).integers(0, vocab_size, (3, length + 1))
    labels = tokens[:, 1:].copy()
    labels[:, : length // 2] = IGNORE_INDEX
    labels[1, -2:] = IGNORE_INDEX  # one ends before the others
    return MicroBatch(tokens[:, :-1].copy(), labels, None)


def whole_state(traces: Sequence[Trace]) -> State:
    """Put parameters together from all ranks.

    Raises:
        TrainingError: an element is not of exactly one rank.
    """
    state: State = {}
    counts: dict[tuple[str, FragmentKind], npt.NDArray[np.int64]] = {}
    for trace in traces:
        for key, values in trace.fragments:
            place = key.name, key.kind
            size = int(np.prod(key.shape))
            elements = np.arange(size).reshape(key.shape)
            if key.rectangle is not None:
                elements = elements[tuple(slice(*rows) for rows in key.rectangle)]
            elements = elements.reshape(-1)[key.start : key.stop]
            state.setdefault(place, np.full(size, np.nan, np.float32))[elements] = values
            counts.setdefault(place, np.zeros(size, np.int64))[elements] += 1
    for place, count in counts.items():
        if not (count == 1).all():
            raise TrainingError(f"{place}: elements are owned by {count.min()} to {count.max()} ranks, not by one")
    return state


def differing(state: State, expected: State) -> int:
    """The number of elements that are not the same bit for bit.

    Raises:
        TrainingError: other parameters.
    """
    _require_same_parameters(state, expected)
    return sum(int((state[place] != values).sum()) for place, values in expected.items())


def relative(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; nan where one is."""
    with np.errstate(divide="ignore", invalid="ignore"):  # not finite is an answer
        return float(np.max(np.abs(np.array(values) / np.array(expected) - 1)))


def state_difference(found: State, expected: State, kind: FragmentKind) -> float:
    """The largest L2 difference of one parameter, relative to its own L2 norm; nan where one is.

    Biases of experts are compared with scores of 1, to which they are added: a token that rounding sends elsewhere may
    turn a step of theirs.
    """
    shares = [
        _l2(found[place] - values) / (math.sqrt(len(values)) if place[0].endswith(EXPERT_BIAS) else _l2(values) or 1.0)
        for place, values in expected.items()
        if place[1] == kind and not place[0].endswith(_WITHOUT_EFFECT)
    ]
    return float(np.max(shares))


def _require_same_parameters(*states: State) -> None:
    if any(state.keys() != states[0].keys() for state in states):
        names = (
            set[tuple[str, FragmentKind]]()
            .union(*states)
            .difference(*(set(state) & set(states[0]) for state in states))
        )
        raise TrainingError(f"the layouts hold other parameters: {sorted(names)[:3]}")


def _l2(values: npt.NDArray[np.floating]) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))
