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

# Numbers that a document gives as one or as two ends: arithmetic with them, and how people read them.

Range = tuple[float, float]

_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"))


def agree(claimed: Range, computed: Range, tolerance: float) -> bool:
    """Whether two ranges touch, the claimed one widened by the tolerance."""
    return claimed[0] * (1 - tolerance) <= computed[1] and computed[0] <= claimed[1] * (1 + tolerance)


def times(left: Range, right: Range, factor: float = 1.0) -> Range:
    return left[0] * right[0] * factor, left[1] * right[1] * factor


def divided(left: Range, right: Range) -> Range:
    return left[0] / right[1], left[1] / right[0]


def both_ends(value: Range, form: str) -> str:
    """ "7-8", or "3" where both ends read alike."""
    low, high = (format(end, form) for end in value)
    return low if low == high else f"{low}-{high}"


def in_full(value: Range) -> str:
    return both_ends((round(value[0]), round(value[1])), ",")


def in_short(value: Range) -> str:
    """32,800,000,000 -> "32.8 B"."""
    unit, letter = next(((unit, letter) for unit, letter in _PREFIXES if value[1] >= unit), (0.0, ""))
    if not unit:
        return in_full(value)
    ends = both_ends((value[0] / unit, value[1] / unit), ".4g" if value[1] / unit >= 100 else ".3g")
    return f"{ends}{letter}"


def in_hours(value: Range) -> str:
    return f"{both_ends(value, '.3g' if value[1] < 1000 else ',.0f')} h"


def in_percent(value: Range) -> str:
    return f"{both_ends((value[0] * 100, value[1] * 100), '.2g')}%"


# A claim of a document and what it is judged by: the plan, what else the document claims, and tolerances.

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


# What a document says of speed and time, judged: tokens a second, seconds a step, hours, MFU.


def tokens_per_second(book: Book, claim: Claim) -> Judgement:
    """How long the run takes at that speed, and which share of the devices' peak it is."""
    speed, total = range_of(claim), book.plan.total_tokens
    needed = divided((total / SECONDS_AN_HOUR,) * 2, speed)
    computed = f"{in_short((total, total))} tokens take {in_hours(needed)}"
    peak = book.peak
    if peak is not None:
        blocks, parameters = book.block_parameters, book.plan.parameter_count
        plain = (speed[0] * 6 * blocks / peak, speed[1] * 6 * parameters / peak)
        counted = times(speed, (book.plan.flops_per_token / peak,) * 2)
        computed += (
            f"; {in_percent(plain)} of the peak of {book.devices} x {book.documented.device} by 6 FLOPs a parameter "
            f"(of the blocks, of all), {in_percent(counted)} with attention's"
        )
    return Judgement(f"{in_full(speed)} tokens/s", computed, NO_VERDICT)


def step_seconds(book: Book, claim: Claim) -> Judgement:
    """How long the run takes, and the speed."""
    seconds, steps = range_of(claim), book.config.train.steps
    speed = divided((book.plan.resolved.tokens_per_step,) * 2, seconds)
    hours = times(seconds, (steps / SECONDS_AN_HOUR,) * 2)
    return Judgement(
        f"{both_ends(seconds, 'g')} s a step",
        f"{steps:,} steps take {in_hours(hours)}; {in_full(speed)} tokens/s",
        NO_VERDICT,
    )


def hours_in_all(book: Book, claim: Claim) -> Judgement:
    """Against the steps and the speed that the document gives."""
    claimed, steps = range_of(claim), book.config.train.steps
    found = []
    seconds, speed = book.claimed("step_seconds"), book.claimed("tokens_per_second")
    if seconds is not None:
        found.append(
            (times(seconds, (steps / SECONDS_AN_HOUR,) * 2), f"{steps:,} steps of {both_ends(seconds, 'g')} s")
        )
    if speed is not None:
        total = book.plan.total_tokens
        needed = divided((total / SECONDS_AN_HOUR,) * 2, speed)
        found.append((needed, f"{in_short((total, total))} tokens at {in_full(speed)} tokens/s"))
    if not found:
        return Judgement(in_hours(claimed), "the document gives no speed", NO_VERDICT)
    wrong = [f"{why} take {in_hours(hours)}" for hours, why in found if not agree(claimed, hours, MEASURED)]
    return Judgement(
        in_hours(claimed),
        "; ".join(f"{in_hours(hours)} for {why}" for hours, why in found),
        f"does not hold: {' and '.join(wrong)}, not {in_hours(claimed)}" if wrong else HOLDS,
    )


def mfu(book: Book, claim: Claim) -> Judgement:
    """Against the FLOPs of a step, or of the run, in the time that the document gives."""
    claimed, peak = range_of(claim), book.peak
    step, hours = book.claimed("step_seconds"), book.claimed("hours")
    of_a_step = book.plan.flops_per_token * book.plan.resolved.tokens_per_step
    done: list[tuple[Range, str]] = []  # FLOP/s of all devices
    if step is not None:
        done.append((divided((of_a_step,) * 2, step), f"{both_ends(step, 'g')} s a step"))
    if hours is not None:
        seconds = times(hours, (SECONDS_AN_HOUR,) * 2)
        done.append((divided((book.plan.total_flops,) * 2, seconds), in_hours(hours)))
    words = f"MFU {in_percent(claimed)}"
    if not done:
        return Judgement(words, "the document gives no speed", NO_VERDICT)
    if peak is None:
        peaks = "; ".join(
            f"at {why} a peak of {both_ends(divided(it, times(claimed, (book.devices * 1e12,) * 2)), '.3g')} TFLOP/s"
            for it, why in done
        )
        return Judgement(words, f"{peaks} a device", "cannot be told: the document names no device")
    shares = [(divided(it, (peak, peak)), why) for it, why in done]
    wrong = [f"{why} is {in_percent(share)}" for share, why in shares if not agree(claimed, share, MEASURED)]
    return Judgement(
        words,
        "; ".join(f"{in_percent(share)} at {why}" for share, why in shares),
        f"does not hold: {' and '.join(wrong)}, not {in_percent(claimed)}" if wrong else HOLDS,
    )


# The losses that a document had, told beside those of the run that follows it; never a reason to stop.

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


_GIGABYTE = 1e9


def judge(plan: Plan) -> list[Judgement]:
    """A judgement of every claim of `documented.claims`, in their order."""
    book = Book(plan)
    return [_JUDGES[claim.claim](book, claim) for claim in plan.resolved.config.documented.claims]


def changed_keys(plan: Plan) -> list[str]:
    """The settings that claims are judged by and that are not the preset's."""
    decisive = ("model.", "data.sequence_length", "data.stride", "train.steps")
    sources = plan.resolved.sources
    return [
        key
        for key, source in sources.items()
        if key.startswith(decisive) and source != "default" and not source.startswith("preset ")
    ]


def _parameters(book: Book, claim: Claim) -> Judgement:
    count, claimed = book.plan.parameter_count, range_of(claim)
    wrong = f"{book.model_words} is {in_short((count, count))}, not {in_short(claimed)}"
    return Judgement(
        f"{in_short(claimed)} parameters",
        f"{count:,}: {in_short((book.block_parameters,) * 2)} in blocks, the rest embeddings",
        verdict_on(claimed, count, ROUNDED, wrong),
    )


def _embedding_parameters(book: Book, claim: Claim) -> Judgement:
    shape, claimed = book.plan.shape, range_of(claim)
    count, product = shape.vocab_size * shape.hidden_size, f"{shape.vocab_size:,} x {shape.hidden_size:,}"
    return Judgement(
        f"{in_full(claimed)} embedding parameters",
        f"{product} = {count:,}",
        verdict_on(claimed, count, EXACT, f"{product} is {count:,}, not {in_full(claimed)}"),
    )


def _tokens(book: Book, claim: Claim) -> Judgement:
    total, claimed = book.plan.total_tokens, range_of(claim)
    wrong = f"{book.tokens_words} is {in_short((total, total))} tokens, not {in_short(claimed)}"
    speed, hours = book.claimed("tokens_per_second"), book.claimed("hours")
    if speed is not None and hours is not None:
        done = times(speed, hours, SECONDS_AN_HOUR)
        pace = f"{in_full(speed)} tokens/s for {in_hours(hours)} are"
        wrong += f", which {pace}" if agree(claimed, done, ROUNDED) else f"; {pace} {in_short(done)}"
    return Judgement(
        f"{in_short(claimed)} tokens",
        f"{book.tokens_words} = {in_short((total, total))}",
        verdict_on(claimed, total, ROUNDED, wrong),
    )


def _tokens_per_step(book: Book, claim: Claim) -> Judgement:
    count, claimed = book.plan.resolved.tokens_per_step, range_of(claim)
    product = f"{book.plan.resolved.batch.global_batch} x {book.config.data.sequence_length:,}"
    return Judgement(
        f"{in_full(claimed)} tokens a step",
        f"{product} = {count:,}",
        verdict_on(claimed, count, EXACT, f"{product} is {count:,}, not {in_full(claimed)}"),
    )


def _data_tokens(book: Book, claim: Claim) -> Judgement:
    claimed, total = range_of(claim), book.plan.total_tokens
    passes = divided((total, total), claimed)
    return Judgement(
        f"data of {in_full(claimed)} tokens",
        f"{in_short((total, total))} tokens are {both_ends(passes, '.3g')} passes over them",
        NO_VERDICT,
    )


def _samples(book: Book, claim: Claim) -> Judgement:
    length, claimed = book.config.data.sequence_length, range_of(claim)
    stride = claim.stride or book.config.data.stride or length
    words = f"{in_full(claimed)} samples at a stride of {stride:,}"
    tokens = book.claimed("data_tokens")
    if tokens is None:
        return Judgement(words, "the document does not say of how many tokens", NO_VERDICT)
    count = whole_windows(int(tokens[0]), length, stride)
    seen = count * length / tokens[0]
    return Judgement(
        words,
        f"{count:,}; each token is seen {seen:,.0f} {'time' if round(seen) == 1 else 'times'} a pass",
        verdict_on(claimed, count, EXACT, f"{in_full(tokens)} tokens have {count:,} samples, not {in_full(claimed)}"),
    )


def _epochs(book: Book, claim: Claim) -> Judgement:
    claimed, total, tokens = range_of(claim), book.plan.total_tokens, book.claimed("data_tokens")
    words = f"{both_ends(claimed, 'g')} epochs"
    if tokens is None:
        return Judgement(words, "the document does not say of how many tokens", NO_VERDICT)
    passes = total / tokens[0]
    what = f"{book.tokens_words} = {in_short((total, total))} tokens are {passes:.1f} passes over {in_short(tokens)}"
    wrong = f"{what}, not {both_ends(claimed, 'g')}"
    return Judgement(words, f"{passes:.2f} passes over {in_short(tokens)}", verdict_on(claimed, passes, ROUNDED, wrong))


def _memory(part: str) -> Callable[[Book, Claim], Judgement]:
    def judged(book: Book, claim: Claim) -> Judgement:
        memory, claimed = book.plan.memory, range_of(claim)
        size = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.master + memory.moments,
            "activations": memory.activations,
        }[part] / _GIGABYTE
        wrong = f"{size:.2g} GB by the estimate of this plan, not {both_ends(claimed, 'g')}"
        return Judgement(
            f"{both_ends(claimed, 'g')} GB of {part}",
            f"{size:.2f} GB on a rank",
            verdict_on(claimed, size, MEASURED, wrong),
        )

    return judged


def _loss(words: str) -> Callable[[Book, Claim], Judgement]:
    def judged(book: Book, claim: Claim) -> Judgement:
        loss = range_of(claim)
        when = "in the end" if claim.step is None else f"at step {claim.step:,}"
        said = f"{words} {both_ends(loss, 'g')} {when}"
        if claim.step == 0:
            vocabulary = book.plan.shape.vocab_size
            first = math.log(vocabulary)
            wrong = f"ln {vocabulary:,} is {first:.2f}; {both_ends(loss, 'g')} is of {perplexity(loss[0]):,.0f} pieces"
            holds = loss[0] - FIRST_LOSS_NATS <= first <= loss[1] + FIRST_LOSS_NATS
            return Judgement(said, f"ln {vocabulary:,} = {first:.2f}", HOLDS if holds else f"does not hold: {wrong}")
        step = book.config.train.steps if claim.step is None else claim.step
        seen = step * book.plan.resolved.tokens_per_step
        ends = both_ends((perplexity(loss[0]), perplexity(loss[1])), ",.4g")
        return Judgement(said, f"perplexity {ends}, after {in_short((seen, seen))} tokens", EXPECTED)

    return judged


def _perplexity(book: Book, claim: Claim) -> Judgement:
    claimed, loss = range_of(claim), book.claimed("validation_loss")
    words = f"perplexity {both_ends(claimed, 'g')}"
    if loss is None:
        return Judgement(words, "the document gives no validation loss", NO_VERDICT)
    found = perplexity(loss[0])
    power = f"e^{loss[0]:g}"
    wrong = f"{power} is {found:.2f}, not {both_ends(claimed, 'g')}"
    return Judgement(words, f"{power} = {found:.2f}", verdict_on(claimed, found, ROUNDED, wrong))


_JUDGES: dict[ClaimKind, Callable[[Book, Claim], Judgement]] = {
    "parameters": _parameters,
    "embedding_parameters": _embedding_parameters,
    "tokens": _tokens,
    "tokens_per_step": _tokens_per_step,
    "data_tokens": _data_tokens,
    "samples": _samples,
    "epochs": _epochs,
    "tokens_per_second": tokens_per_second,
    "step_seconds": step_seconds,
    "hours": hours_in_all,
    "mfu": mfu,
    "weights_gb": _memory("weights"),
    "gradients_gb": _memory("gradients"),
    "optimizer_gb": _memory("optimizer"),
    "activations_gb": _memory("activations"),
    "training_loss": _loss("training loss"),
    "validation_loss": _loss("validation loss"),
    "perplexity": _perplexity,
}
