"""What a document says of a run, judged: each claim beside what megalm computes for it. No torch.

Nothing here is an opinion: a verdict follows from the claim, the run and a stated tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megalm.config.schema import Claim, ClaimKind, DocumentedSection
from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.data.sampling.sample_order import whole_windows
from megalm.planning.run_plan import Plan

HOLDS = "holds"
EXPECTED = "to be seen in the run"
NO_VERDICT = "-"
_REFUTED = "does not hold: "

# How far a claim may be from what is computed: a share of it, for a first loss nats.
EXACT = 0.001  # of what was counted
ROUNDED = 0.02  # of what people round
MEASURED = 0.1  # of what a clock or an allocator said
FIRST_LOSS_NATS = 0.5  # an untrained model knows nothing, but does not guess evenly
# A loss read off another run's log is met by one that is so near; a range counts as it stands.
NEAR_NATS = 0.1

_NO_TOKENS = "the document does not say of how many tokens"
_NO_SPEED = "the document gives no speed"
_SECONDS_AN_HOUR = 3600
_GIGABYTE = 1e9
_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"))

Quantity = Literal["training_loss", "validation_loss"]


# --- numbers with two ends --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A number that a document gives as one or as two ends."""

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

    def within(self, other: Span, share: float = 0.0, nats: float = 0.0) -> bool:
        """Whether it touches the other one, widened by a share of it or by nats."""
        return other.low * (1 - share) - nats <= self.high and self.low <= other.high * (1 + share) + nats

    def __format__(self, form: str) -> str:
        """ "7-8", or "3" where both ends read alike."""
        low, high = format(self.low, form), format(self.high, form)
        return low if low == high else f"{low}-{high}"


def _plain(value: float | Span) -> str:
    return format(Span.of(value), "g")


def _in_full(value: float | Span) -> str:
    return format(Span.of(value), ",.0f")


def _in_short(value: float | Span) -> str:
    """32,800,000,000 -> "32.8 B"."""
    value = Span.of(value)
    for unit, letter in _PREFIXES:
        if value.high >= unit:
            return f"{value / unit:{'.4g' if value.high / unit >= 100 else '.3g'}}{letter}"
    return _in_full(value)


def _in_hours(value: float | Span) -> str:
    value = Span.of(value)
    return f"{value:{'.3g' if value.high < 1000 else ',.0f'}} h"


def _in_percent(value: float | Span) -> str:
    return f"{Span.of(value) * 100:.2g}%"


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """A claim in words, what megalm computes for it, and whether it holds."""

    claim: str
    computed: str
    verdict: str

    @property
    def refuted(self) -> bool:
        return self.verdict.startswith(_REFUTED)


@dataclass(frozen=True)
class Computed:
    """What megalm has for a claim.

    Attributes:
        found: each value that the claim is held against, and what is said where they differ: "WORDS, not THE CLAIM".
        more: follows that sentence.
        verdict: where there is no value.
    """

    text: str
    found: tuple[tuple[Span, str], ...] = ()
    more: str = ""
    verdict: str = NO_VERDICT


class ClaimContext:
    """A plan and the claims that other claims are judged by."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = plan.resolved.config
        self.documented = self.config.documented
        self.devices = self.documented.devices or plan.resolved.topology.world_size
        self.steps, self.length = self.config.train.steps, self.config.data.sequence_length
        shape = plan.shape
        self.model = f"{shape.num_hidden_layers} x {shape.hidden_size} with {shape.vocab_size:,} pieces"
        self.batch = f"{plan.resolved.batch.global_batch} x {self.length:,}"

    def claimed(self, kind: ClaimKind) -> Span | None:
        """What the document says of a thing, the first time that it does."""
        return next((Span.of(claim.value) for claim in self.documented.claims if claim.claim == kind), None)

    def stride(self, claim: Claim) -> int:
        return claim.stride or self.config.data.stride or self.length

    @property
    def block_parameters(self) -> int:
        shapes = self.plan.shape.parameters()
        return sum(math.prod(dims) for name, dims in shapes.items() if name.startswith("layers."))

    @property
    def peak(self) -> float | None:
        """FLOP/s of all devices that the document names."""
        found = data_sheet_peak(self.documented.device or "", self.plan.resolved.precision != "fp32")
        return found[0] * self.devices if found else None


def judge(plan: Plan) -> list[Judgement]:
    """A judgement of every claim of `documented.claims`, in their order."""
    context = ClaimContext(plan)
    return [_judge(context, claim) for claim in context.documented.claims]


def _judge(context: ClaimContext, claim: Claim) -> Judgement:
    kind, claimed = _KINDS[claim.claim], Span.of(claim.value)
    said = kind.form(claimed)
    when = "in the end" if claim.step is None else f"at step {claim.step:,}"
    words = kind.words.format(said, when=when, stride=context.stride(claim))
    computed = kind.compute(context, claim)
    near = {"nats": FIRST_LOSS_NATS} if kind.tolerance is None else {"share": kind.tolerance}
    wrong = [why for found, why in computed.found if not found.within(claimed, **near)]
    if wrong:
        return Judgement(words, computed.text, f"{_REFUTED}{' and '.join(wrong)}, not {said}{computed.more}")
    return Judgement(words, computed.text, HOLDS if computed.found else computed.verdict)


def tolerances() -> str:
    """In words, for below a table of judgements."""
    return (
        f"A claim holds within {EXACT:.1%} where it counts samples, {ROUNDED:.0%} where it is a rounded number, "
        f"{MEASURED:.0%} where it was measured, {FIRST_LOSS_NATS:g} nats where it is the loss of step 0."
    )


def changed_keys(plan: Plan) -> list[str]:
    """The settings that claims are judged by and that are not the preset's."""
    decisive = ("model.", "data.sequence_length", "data.stride", "train.steps")
    sources = plan.resolved.sources
    return [
        key
        for key, source in sources.items()
        if key.startswith(decisive) and source != "default" and not source.startswith("preset ")
    ]


# --- what is computed for each kind -----------------------------------------------------------------------------------


def _equation(left: str, value: float, right: str, unit: str = "", more: str = "") -> Computed:
    return Computed(f"{left} = {right}", ((Span.of(value), f"{left} is {right}{unit}"),), more)


def _parameters(context: ClaimContext, claim: Claim) -> Computed:
    count = context.plan.parameter_count
    text = f"{count:,}: {_in_short(context.block_parameters)} in blocks, the rest embeddings"
    return Computed(text, ((Span.of(count), f"{context.model} is {_in_short(count)}"),))


def _embedding_parameters(context: ClaimContext, claim: Claim) -> Computed:
    entries, width = context.plan.shape.vocab_size, context.plan.shape.hidden_size
    return _equation(f"{entries:,} x {width:,}", entries * width, f"{entries * width:,}")


def _tokens(context: ClaimContext, claim: Claim) -> Computed:
    total, speed, hours = context.plan.total_tokens, context.claimed("tokens_per_second"), context.claimed("hours")
    more = ""
    if speed is not None and hours is not None:
        done = speed * hours * _SECONDS_AN_HOUR
        pace = f"{_in_full(speed)} tokens/s for {_in_hours(hours)} are"
        agrees = done.within(Span.of(claim.value), ROUNDED)
        more = f", which {pace}" if agrees else f"; {pace} {_in_short(done)}"
    return _equation(f"{context.steps:,} x {context.batch}", total, _in_short(total), " tokens", more)


def _tokens_per_step(context: ClaimContext, claim: Claim) -> Computed:
    count = context.plan.resolved.tokens_per_step
    return _equation(context.batch, count, f"{count:,}")


def _data_tokens(context: ClaimContext, claim: Claim) -> Computed:
    total = context.plan.total_tokens
    passes = Span.of(total) / Span.of(claim.value)
    return Computed(f"{_in_short(total)} tokens are {passes:.3g} passes over them")


def _samples(context: ClaimContext, claim: Claim) -> Computed:
    tokens = context.claimed("data_tokens")
    if tokens is None:
        return Computed(_NO_TOKENS)
    count = whole_windows(int(tokens.low), context.length, context.stride(claim))
    seen = f"{count * context.length / tokens.low:,.0f}"
    text = f"{count:,}; each token is seen {seen} {'time' if seen == '1' else 'times'} a pass"
    return Computed(text, ((Span.of(count), f"{_in_full(tokens)} tokens have {count:,} samples"),))


def _epochs(context: ClaimContext, claim: Claim) -> Computed:
    total, tokens = context.plan.total_tokens, context.claimed("data_tokens")
    if tokens is None:
        return Computed(_NO_TOKENS)
    passes, over = total / tokens.low, f"passes over {_in_short(tokens)}"
    why = f"{context.steps:,} x {context.batch} = {_in_short(total)} tokens are {passes:.1f} {over}"
    return Computed(f"{passes:.2f} {over}", ((Span.of(passes), why),))


def _tokens_per_second(context: ClaimContext, claim: Claim) -> Computed:
    """How long the run takes at that speed, and which share of the devices' peak it is."""
    speed, plan, peak = Span.of(claim.value), context.plan, context.peak
    needed = Span.of(plan.total_tokens / _SECONDS_AN_HOUR) / speed
    text = f"{_in_short(plan.total_tokens)} tokens take {_in_hours(needed)}"
    if peak is not None:
        plain = speed * Span(6 * context.block_parameters / peak, 6 * plan.parameter_count / peak)
        text += (
            f"; {_in_percent(plain)} of the peak of {context.devices} x {context.documented.device} by 6 FLOPs a "
            f"parameter (of the blocks, of all), {_in_percent(speed * (plan.flops_per_token / peak))} with attention's"
        )
    return Computed(text)


def _step_seconds(context: ClaimContext, claim: Claim) -> Computed:
    seconds = Span.of(claim.value)
    speed = Span.of(context.plan.resolved.tokens_per_step) / seconds
    hours = seconds * (context.steps / _SECONDS_AN_HOUR)
    return Computed(f"{context.steps:,} steps take {_in_hours(hours)}; {_in_full(speed)} tokens/s")


def _hours(context: ClaimContext, claim: Claim) -> Computed:
    """Against the steps and the speed that the document gives."""
    found, total = [], context.plan.total_tokens
    if (seconds := context.claimed("step_seconds")) is not None:
        hours = seconds * (context.steps / _SECONDS_AN_HOUR)
        found.append((hours, f"{context.steps:,} steps of {_plain(seconds)} s"))
    if (speed := context.claimed("tokens_per_second")) is not None:
        hours = Span.of(total / _SECONDS_AN_HOUR) / speed
        found.append((hours, f"{_in_short(total)} tokens at {_in_full(speed)} tokens/s"))
    return Computed(
        "; ".join(f"{_in_hours(hours)} for {why}" for hours, why in found) or _NO_SPEED,
        tuple((hours, f"{why} take {_in_hours(hours)}") for hours, why in found),
    )


def _mfu(context: ClaimContext, claim: Claim) -> Computed:
    """Against the FLOPs of a step, or of the run, in the time that the document gives."""
    plan, peak = context.plan, context.peak
    done = []  # FLOP/s of all devices
    if (step := context.claimed("step_seconds")) is not None:
        flops = Span.of(plan.flops_per_token * plan.resolved.tokens_per_step)
        done.append((flops / step, f"{_plain(step)} s a step"))
    if (hours := context.claimed("hours")) is not None:
        done.append((Span.of(plan.total_flops) / (hours * _SECONDS_AN_HOUR), _in_hours(hours)))
    if not done:
        return Computed(_NO_SPEED)
    if peak is None:
        stated = Span.of(claim.value) * (context.devices * 1e12)
        peaks = "; ".join(f"at {why} a peak of {speed / stated:.3g} TFLOP/s" for speed, why in done)
        return Computed(f"{peaks} a device", verdict="cannot be told: the document names no device")
    shares = [(speed / peak, why) for speed, why in done]
    return Computed(
        "; ".join(f"{_in_percent(share)} at {why}" for share, why in shares),
        tuple((share, f"{why} is {_in_percent(share)}") for share, why in shares),
    )


def _memory(context: ClaimContext, claim: Claim) -> Computed:
    memory = context.plan.memory
    size = {
        "weights_gb": memory.weights,
        "gradients_gb": memory.gradients,
        "optimizer_gb": memory.master + memory.moments,
        "activations_gb": memory.activations,
    }[claim.claim] / _GIGABYTE
    return Computed(f"{size:.2f} GB on a rank", ((Span.of(size), f"{size:.2g} GB by the estimate of this plan"),))


def _loss(context: ClaimContext, claim: Claim) -> Computed:
    loss, entries = Span.of(claim.value), context.plan.shape.vocab_size
    if claim.step == 0:
        first = math.log(entries)
        more = f"; {_plain(loss)} is of {_perplexity_of(loss.low):,.0f} pieces"
        return _equation(f"ln {entries:,}", first, f"{first:.2f}", more=more)
    seen = (context.steps if claim.step is None else claim.step) * context.plan.resolved.tokens_per_step
    perplexity = Span(_perplexity_of(loss.low), _perplexity_of(loss.high))
    return Computed(f"perplexity {perplexity:,.4g}, after {_in_short(seen)} tokens", verdict=EXPECTED)


def _perplexity(context: ClaimContext, claim: Claim) -> Computed:
    loss = context.claimed("validation_loss")
    if loss is None:
        return Computed("the document gives no validation loss")
    found = _perplexity_of(loss.low)
    return _equation(f"e^{loss.low:g}", found, f"{found:.2f}")


def _perplexity_of(loss: float) -> float:
    """Of a loss in nats; beyond 700 a float overflows."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class _Kind:
    """How a claim is said (`{}` is its number), how its number is read, and what it is judged by.

    Attributes:
        tolerance: a share of the claim; None: nats.
    """

    words: str
    form: Callable[[Span], str]
    compute: Callable[[ClaimContext, Claim], Computed]
    tolerance: float | None = MEASURED


_KINDS: dict[ClaimKind, _Kind] = {
    "parameters": _Kind("{} parameters", _in_short, _parameters, ROUNDED),
    "embedding_parameters": _Kind("{} embedding parameters", _in_full, _embedding_parameters, EXACT),
    "tokens": _Kind("{} tokens", _in_short, _tokens, ROUNDED),
    "tokens_per_step": _Kind("{} tokens a step", _in_full, _tokens_per_step, EXACT),
    "data_tokens": _Kind("data of {} tokens", _in_full, _data_tokens),
    "samples": _Kind("{} samples at a stride of {stride:,}", _in_full, _samples, EXACT),
    "epochs": _Kind("{} epochs", _plain, _epochs, ROUNDED),
    "tokens_per_second": _Kind("{} tokens/s", _in_full, _tokens_per_second),
    "step_seconds": _Kind("{} s a step", _plain, _step_seconds),
    "hours": _Kind("{}", _in_hours, _hours),
    "mfu": _Kind("MFU {}", _in_percent, _mfu),
    "weights_gb": _Kind("{} GB of weights", _plain, _memory),
    "gradients_gb": _Kind("{} GB of gradients", _plain, _memory),
    "optimizer_gb": _Kind("{} GB of optimizer", _plain, _memory),
    "activations_gb": _Kind("{} GB of activations", _plain, _memory),
    "training_loss": _Kind("training loss {} {when}", _plain, _loss, None),
    "validation_loss": _Kind("validation loss {} {when}", _plain, _loss, None),
    "perplexity": _Kind("perplexity {}", _plain, _perplexity, ROUNDED),
}


# --- while the run trains ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """A loss of the run beside the document's; never a reason to stop."""

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


def documented_losses(documented: DocumentedSection) -> dict[tuple[Quantity, int], list[Span]]:
    """Return the losses that the document gives for single steps."""
    found: dict[tuple[Quantity, int], list[Span]] = {}
    for claim in documented.claims:
        if claim.step is not None and claim.claim in ("training_loss", "validation_loss"):
            found.setdefault((claim.claim, claim.step), []).append(Span.of(claim.value))
    return found
