"""The claims of a recipe's document, each compared with the value that megalm computes. No torch.

A verdict follows from the claim, the run and the tolerance in `_KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megalm.config.schema import Claim, ClaimKind, DocumentedSection
from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.data.sampling.sample_order import whole_windows
from megalm.planning.run_plan import Plan
from megalm.utils.formatting import perplexity_of

HOLDS = "holds"
EXPECTED = "the run will show"
NO_VERDICT = "-"
_REFUTED = "does not hold: "

# Tolerances: a share of the claim, or nats for a loss.
EXACT = 0.001  # counts
ROUNDED = 0.02  # rounded numbers
MEASURED = 0.1  # times and memory
FIRST_LOSS_NATS = 0.5  # an untrained model knows nothing, but does not guess evenly
NEAR_NATS = 0.1  # a single loss read off another run's log; a range has no tolerance

_SECONDS_AN_HOUR = 3600
_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"))

Quantity = Literal["training_loss", "validation_loss"]


# --- numbers with two ends --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A number, or a range of numbers."""

    low: float
    high: float

    @staticmethod
    def of(value: float | tuple[float, float] | Span) -> Span:
        if isinstance(value, Span):
            return value
        return Span(*value) if isinstance(value, tuple) else Span(value, value)

    def __mul__(self, other: float | Span) -> Span:
        other = Span.of(other)
        return Span(self.low * other.low, self.high * other.high)

    def __truediv__(self, other: float | Span) -> Span:
        other = Span.of(other)
        return Span(self.low / other.high, self.high / other.low)

    def __rtruediv__(self, other: float) -> Span:
        return Span.of(other) / self

    def within(self, other: Span, share: float = 0.0, nats: float = 0.0) -> bool:
        """Return whether it overlaps the other one, widened by a share of it or by nats."""
        return other.low * (1 - share) - nats <= self.high and self.low <= other.high * (1 + share) + nats

    def __format__(self, form: str) -> str:
        """ "7-8", or "3" if both ends read alike."""
        low, high = format(self.low, form), format(self.high, form)
        return low if low == high else f"{low}-{high}"


def _plain(value: float | Span, form: str = ".4g", unit: str = "") -> str:
    return f"{format(Span.of(value), form)}{unit}"


_in_full = partial(_plain, form=",.0f")
_in_gigabytes = partial(_plain, form=".3g", unit=" GB")


def _in_short(value: float | Span) -> str:
    """32,800,000,000 -> "32.8 B"."""
    value = Span.of(value)
    for size, unit in _PREFIXES:
        if value.high >= size:
            return _plain(value / size, ".4g" if value.high / size >= 100 else ".3g", unit)
    return _in_full(value)


def _in_hours(value: float | Span) -> str:
    return _plain(value, ".3g" if Span.of(value).high < 1000 else ",.0f", " h")


def _in_percent(value: float | Span) -> str:
    return _plain(Span.of(value) * 100, ".2g", "%")


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """A claim in words, the computed values, and whether it holds."""

    claim: str
    computed: str
    verdict: str

    @property
    def refuted(self) -> bool:
        return self.verdict.startswith(_REFUTED)


@dataclass(frozen=True)
class Computed:
    """The computed values of a claim.

    Attributes:
        values: a formula and its value, each of which the claim must match.
        note: further information for the table.
        reason: further information for the verdict, if the claim does not hold.
        verdict: without values.
    """

    values: tuple[tuple[str, Span], ...] = ()
    note: str = ""
    reason: str = ""
    verdict: str = NO_VERDICT


class _Case:
    """A claim, and the facts of the run that it is compared with."""

    def __init__(self, plan: Plan, claim: Claim) -> None:
        self.plan, self.run, self.claim = plan, plan.resolved, claim
        self.value = Span.of(claim.value)
        self.documented = self.run.config.documented
        self.devices = self.documented.devices or self.run.topology.world_size
        self.steps, self.length = self.run.config.train.steps, self.run.config.data.sample_length
        self.stride = claim.stride or self.run.config.data.stride or self.length
        self.batch = f"{self.run.batch.global_batch} x {self.length:,}"
        self.tokens_per_step = self.run.batch.global_batch * self.length

    def claimed(self, kind: ClaimKind) -> Span | None:
        """Return the document's first claim of this kind."""
        return next((Span.of(claim.value) for claim in self.documented.claims if claim.claim == kind), None)

    @property
    def block_parameters(self) -> int:
        shapes = self.plan.shape.parameters()
        return sum(math.prod(dims) for name, dims in shapes.items() if name.startswith("layers."))

    @property
    def peak(self) -> float | None:
        """FLOP/s of all documented devices."""
        found = data_sheet_peak(self.documented.device or "", self.run.precision != "fp32", self.plan.float8_share)
        return found[0] * self.devices if found else None


def judge(plan: Plan) -> list[Judgement]:
    """Return a judgement of every claim of `documented.claims`, in their order."""
    return [_judge(_Case(plan, claim)) for claim in plan.resolved.config.documented.claims]


def _judge(case: _Case) -> Judgement:
    claim, kind = case.claim, _KINDS[case.claim.claim]
    computed, said = kind.compute(case), kind.form(case.value)
    when = "at the end" if claim.step is None else f"at step {claim.step:,}"
    words = kind.words.format(said, when=when, stride=case.stride)
    near = {"nats": FIRST_LOSS_NATS} if kind.tolerance is None else {"share": kind.tolerance}
    equations = [(f"{formula} = {kind.form(value)}", value) for formula, value in computed.values]
    wrong = [equation for equation, value in equations if not value.within(case.value, **near)]
    verdict = HOLDS if equations else computed.verdict
    if wrong:
        verdict = f"{_REFUTED}{' and '.join(wrong)}, not {said}{computed.reason}"
    return Judgement(words, "; ".join(filter(None, [*(it for it, _ in equations), computed.note])), verdict)


def tolerances() -> str:
    """Return the tolerances in words, for below a table of judgements."""
    return (
        f"Tolerances: {EXACT:.1%} for counts, {ROUNDED:.0%} for rounded numbers, {MEASURED:.0%} for measured ones, "
        f"{FIRST_LOSS_NATS:g} nats for the loss of step 0."
    )


def changed_keys(plan: Plan) -> list[str]:
    """Return the settings that decide verdicts and differ from the preset."""
    decisive = ("model.", "data.sequence_length", "data.stride", "schedule.batch", "train.steps")
    return [
        key
        for key, source in plan.resolved.sources.items()
        if key.startswith(decisive) and source != "default" and not source.startswith("preset ")
    ]


# --- the computed value of each kind ----------------------------------------------------------------------------------


def _equals(formula: str, value: float, note: str = "", reason: str = "") -> Computed:
    return Computed(((formula, Span.of(value)),), note, reason)


def _parameters(case: _Case) -> Computed:
    shape, count = case.plan.shape, case.plan.parameter_count
    formula = f"{shape.num_hidden_layers} x {shape.hidden_size} with {shape.vocab_size:,} entries"
    return _equals(formula, count, f"{count:,} in all, {_in_short(case.block_parameters)} in blocks")


def _embedding_parameters(case: _Case) -> Computed:
    entries, width = case.plan.shape.vocab_size, case.plan.shape.hidden_size
    return _equals(f"{entries:,} x {width:,}", entries * width)


def _tokens(case: _Case) -> Computed:
    speed, hours, reason = case.claimed("tokens_per_second"), case.claimed("hours"), ""
    if speed is not None and hours is not None:
        done = _in_short(speed * hours * _SECONDS_AN_HOUR)
        reason = f"; {_in_full(speed)} tokens/s for {_in_hours(hours)} are {done}"
    return _equals(f"{case.steps:,} x {case.batch}", case.plan.total_tokens, reason=reason)


def _tokens_per_step(case: _Case) -> Computed:
    return _equals(case.batch, case.tokens_per_step)


def _data_tokens(case: _Case) -> Computed:
    total = case.plan.total_tokens
    return Computed(note=f"{_in_short(total)} tokens are {total / case.value:.3g} passes")


def _samples(case: _Case) -> Computed:
    tokens = case.claimed("data_tokens")
    if tokens is None:
        return Computed(note="the document does not give the number of tokens")
    count = whole_windows(int(tokens.low), case.length, case.stride)
    seen = f"{count * case.length / tokens.low:,.0f}"
    note = f"each token is seen {seen} {'time' if seen == '1' else 'times'} a pass"
    return _equals(f"samples of {_in_full(tokens)} tokens", count, note)


def _epochs(case: _Case) -> Computed:
    total, tokens = case.plan.total_tokens, case.claimed("data_tokens")
    if tokens is None:
        return Computed(note="the document does not give the number of tokens")
    formula = f"{case.steps:,} x {case.batch} = {_in_short(total)} tokens, over {_in_short(tokens)}"
    return _equals(formula, total / tokens.low)


def _tokens_per_second(case: _Case) -> Computed:
    """The time of the run at that speed, and the share of the devices' peak."""
    speed, plan, peak = case.value, case.plan, case.peak
    note = f"{_in_short(plan.total_tokens)} tokens take {_in_hours(plan.total_tokens / _SECONDS_AN_HOUR / speed)}"
    if peak is not None:
        plain = speed * Span(6 * case.block_parameters / peak, 6 * plan.parameter_count / peak)
        note += (
            f"; {_in_percent(plain)} of the peak of {case.devices} x {case.documented.device} with 6 FLOPs per "
            f"parameter (blocks, all), {_in_percent(speed * (plan.flops_per_token / peak))} with attention"
        )
    return Computed(note=note)


def _step_seconds(case: _Case) -> Computed:
    hours, speed = case.value * (case.steps / _SECONDS_AN_HOUR), case.tokens_per_step / case.value
    return Computed(note=f"{case.steps:,} steps take {_in_hours(hours)}; {_in_full(speed)} tokens/s")


def _hours(case: _Case) -> Computed:
    """By the documented steps and by the documented speed."""
    values, total = [], case.plan.total_tokens
    if (seconds := case.claimed("step_seconds")) is not None:
        values.append((f"{case.steps:,} steps of {_plain(seconds)} s", seconds * (case.steps / _SECONDS_AN_HOUR)))
    if (speed := case.claimed("tokens_per_second")) is not None:
        values.append((f"{_in_short(total)} tokens at {_in_full(speed)} tokens/s", total / _SECONDS_AN_HOUR / speed))
    return Computed(tuple(values), note="" if values else "the document gives no speed")


def _mfu(case: _Case) -> Computed:
    """By the FLOPs of a step or of the run, in the documented time."""
    plan, peak = case.plan, case.peak
    speeds = []  # FLOP/s of all devices
    if (step := case.claimed("step_seconds")) is not None:
        speeds.append((f"{_plain(step)} s a step", plan.flops_per_token * case.tokens_per_step / step))
    if (hours := case.claimed("hours")) is not None:
        speeds.append((_in_hours(hours), plan.total_flops / (hours * _SECONDS_AN_HOUR)))
    if not speeds:
        return Computed(note="the document gives no speed")
    if peak is not None:
        return Computed(tuple((formula, speed / peak) for formula, speed in speeds))
    per_device = case.value * (case.devices * 1e12)
    peaks = "; ".join(f"{formula}: a peak of {speed / per_device:.3g} TFLOP/s" for formula, speed in speeds)
    return Computed(note=f"{peaks} a device", verdict="unknown: the document names no device")


def _memory(case: _Case) -> Computed:
    memory = case.plan.memory
    size = {
        "weights_gb": memory.weights,
        "gradients_gb": memory.gradients,
        "optimizer_gb": memory.master + memory.moments,
        "activations_gb": memory.activations,
    }[case.claim.claim]
    return _equals("estimate for the fullest rank", size / 1e9)


def _loss(case: _Case) -> Computed:
    loss, entries = case.value, case.plan.shape.vocab_size
    perplexity = Span(perplexity_of(loss.low), perplexity_of(loss.high))
    if case.claim.step == 0:
        reason = f"; {_plain(loss)} is the loss of {perplexity.low:,.0f} entries"
        return _equals(f"ln {entries:,}", math.log(entries), reason=reason)
    seen = case.run.stages.tokens(case.steps if case.claim.step is None else case.claim.step)
    return Computed(note=f"perplexity {perplexity:,.4g}, after {_in_short(seen)} tokens", verdict=EXPECTED)


def _perplexity(case: _Case) -> Computed:
    loss = case.claimed("validation_loss")
    if loss is None:
        return Computed(note="the document gives no validation loss")
    return _equals(f"e^{loss.low:g}", perplexity_of(loss.low))


@dataclass(frozen=True)
class _Kind:
    """How to write a claim (`{}` is its number) and the number itself, and how to compute the number.

    Attributes:
        tolerance: a share of the claim; None: nats.
    """

    words: str
    form: Callable[[Span], str]
    compute: Callable[[_Case], Computed]
    tolerance: float | None = MEASURED


_KINDS: dict[ClaimKind, _Kind] = {
    "parameters": _Kind("{} parameters", _in_short, _parameters, ROUNDED),
    "embedding_parameters": _Kind("{} embedding parameters", _in_full, _embedding_parameters, EXACT),
    "tokens": _Kind("{} tokens", _in_short, _tokens, ROUNDED),
    "tokens_per_step": _Kind("{} tokens a step", _in_full, _tokens_per_step, EXACT),
    "data_tokens": _Kind("data of {} tokens", _in_full, _data_tokens),
    "samples": _Kind("{} samples at a stride of {stride:,}", _in_full, _samples, EXACT),
    "epochs": _Kind("{} epochs", partial(_plain, form=".3g"), _epochs, ROUNDED),
    "tokens_per_second": _Kind("{} tokens/s", _in_full, _tokens_per_second),
    "step_seconds": _Kind("{} s a step", _plain, _step_seconds),
    "hours": _Kind("{}", _in_hours, _hours),
    "mfu": _Kind("MFU {}", _in_percent, _mfu),
    "weights_gb": _Kind("{} of weights", _in_gigabytes, _memory),
    "gradients_gb": _Kind("{} of gradients", _in_gigabytes, _memory),
    "optimizer_gb": _Kind("{} of optimizer", _in_gigabytes, _memory),
    "activations_gb": _Kind("{} of activations", _in_gigabytes, _memory),
    "training_loss": _Kind("training loss {} {when}", _plain, _loss, None),
    "validation_loss": _Kind("validation loss {} {when}", _plain, _loss, None),
    "perplexity": _Kind("perplexity {}", _plain, _perplexity, ROUNDED),
}


# --- while the run trains ---------------------------------------------------------------------------------------------


def documented_losses(documented: DocumentedSection) -> dict[tuple[Quantity, int], list[Span]]:
    """Return the losses that the document gives for single steps."""
    found: dict[tuple[Quantity, int], list[Span]] = {}
    for claim in documented.claims:
        if claim.step is not None and claim.claim in ("training_loss", "validation_loss"):
            found.setdefault((claim.claim, claim.step), []).append(Span.of(claim.value))
    return found


@dataclass(frozen=True)
class Expectation:
    """A loss of the run, and the documented one; a difference never stops the run."""

    step: int
    quantity: Quantity
    loss: float
    documented: Span

    @property
    def is_met(self) -> bool:
        near = NEAR_NATS if self.documented.low == self.documented.high else 0.0
        return Span.of(self.loss).within(self.documented, nats=near)

    def __str__(self) -> str:
        off = self.loss - min(max(self.loss, self.documented.low), self.documented.high)
        verdict = "as documented" if self.is_met else f"{abs(off):.2f} nats {'above' if off > 0 else 'below'}"
        which = "median training loss" if self.quantity == "training_loss" else "validation loss"
        return f"step {self.step}: {which} {self.loss:.4f}, documented {self.documented:g}: {verdict}"
