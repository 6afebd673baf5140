"""What a document says of a run, judged: each claim beside what megalm computes for it. No torch.

Nothing here is an opinion: a verdict follows from the claim, the run and a stated tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megalm.config.schema import Claim, ClaimKind
from megalm.data.streams import whole_windows
from megalm.estimate.data_sheet import data_sheet_peak
from megalm.planning.plan import Plan
from megalm.planning.ranges import (
    Range,
    agree,
    both_ends,
    divided,
    in_full,
    in_hours,
    in_percent,
    in_short,
    times,
)

HOLDS = "holds"
EXPECTED = "to be seen in the run"
NO_VERDICT = "-"

# How far a claim may be from what is computed: a share of it, for a first loss nats.
EXACT = 0.001  # of what was counted
ROUNDED = 0.02  # of what people round
MEASURED = 0.1  # of what a clock or an allocator said
FIRST_LOSS_NATS = 0.5  # an untrained model knows nothing, but does not guess evenly

_SECONDS_AN_HOUR = 3600
_GIGABYTE = 1e9


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


def judge(plan: Plan) -> list[Judgement]:
    """A judgement of every claim of `documented.claims`, in their order."""
    book = _Book(plan)
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


class _Book:
    """A plan and the claims that other claims are judged by."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = plan.resolved.config
        self.documented = self.config.documented
        self.devices = self.documented.devices or plan.resolved.topology.world_size

    def claimed(self, kind: ClaimKind) -> Range | None:
        """What the document says of a thing, the first time that it does."""
        return next((_range(claim) for claim in self.documented.claims if claim.claim == kind), None)

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


def _parameters(book: _Book, claim: Claim) -> Judgement:
    count, claimed = book.plan.parameter_count, _range(claim)
    return Judgement(
        f"{in_short(claimed)} parameters",
        f"{count:,}: {in_short((book.block_parameters,) * 2)} in blocks, the rest embeddings",
        _verdict(claimed, count, ROUNDED, f"{book.model_words} is {in_short((count, count))}, not {in_short(claimed)}"),
    )


def _embedding_parameters(book: _Book, claim: Claim) -> Judgement:
    shape, claimed = book.plan.shape, _range(claim)
    count, product = shape.vocab_size * shape.hidden_size, f"{shape.vocab_size:,} x {shape.hidden_size:,}"
    return Judgement(
        f"{in_full(claimed)} embedding parameters",
        f"{product} = {count:,}",
        _verdict(claimed, count, EXACT, f"{product} is {count:,}, not {in_full(claimed)}"),
    )


def _tokens(book: _Book, claim: Claim) -> Judgement:
    total, claimed = book.plan.total_tokens, _range(claim)
    wrong = f"{book.tokens_words} is {in_short((total, total))} tokens, not {in_short(claimed)}"
    speed, hours = book.claimed("tokens_per_second"), book.claimed("hours")
    if speed is not None and hours is not None:
        done = times(speed, hours, _SECONDS_AN_HOUR)
        pace = f"{in_full(speed)} tokens/s for {in_hours(hours)} are"
        wrong += f", which {pace}" if agree(claimed, done, ROUNDED) else f"; {pace} {in_short(done)}"
    return Judgement(
        f"{in_short(claimed)} tokens",
        f"{book.tokens_words} = {in_short((total, total))}",
        _verdict(claimed, total, ROUNDED, wrong),
    )


def _tokens_per_step(book: _Book, claim: Claim) -> Judgement:
    count, claimed = book.plan.resolved.tokens_per_step, _range(claim)
    product = f"{book.plan.resolved.batch.global_batch} x {book.config.data.sequence_length:,}"
    return Judgement(
        f"{in_full(claimed)} tokens a step",
        f"{product} = {count:,}",
        _verdict(claimed, count, EXACT, f"{product} is {count:,}, not {in_full(claimed)}"),
    )


def _data_tokens(book: _Book, claim: Claim) -> Judgement:
    claimed, total = _range(claim), book.plan.total_tokens
    passes = divided((total, total), claimed)
    return Judgement(
        f"data of {in_full(claimed)} tokens",
        f"{in_short((total, total))} tokens are {both_ends(passes, '.3g')} passes over them",
        NO_VERDICT,
    )


def _samples(book: _Book, claim: Claim) -> Judgement:
    length, claimed = book.config.data.sequence_length, _range(claim)
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
        _verdict(claimed, count, EXACT, f"{in_full(tokens)} tokens have {count:,} samples, not {in_full(claimed)}"),
    )


def _epochs(book: _Book, claim: Claim) -> Judgement:
    claimed, total, tokens = _range(claim), book.plan.total_tokens, book.claimed("data_tokens")
    words = f"{both_ends(claimed, 'g')} epochs"
    if tokens is None:
        return Judgement(words, "the document does not say of how many tokens", NO_VERDICT)
    passes = total / tokens[0]
    what = f"{book.tokens_words} = {in_short((total, total))} tokens are {passes:.1f} passes over {in_short(tokens)}"
    wrong = f"{what}, not {both_ends(claimed, 'g')}"
    return Judgement(words, f"{passes:.2f} passes over {in_short(tokens)}", _verdict(claimed, passes, ROUNDED, wrong))


def _tokens_per_second(book: _Book, claim: Claim) -> Judgement:
    speed, total = _range(claim), book.plan.total_tokens
    needed = divided((total / _SECONDS_AN_HOUR,) * 2, speed)
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


def _step_seconds(book: _Book, claim: Claim) -> Judgement:
    seconds, steps = _range(claim), book.config.train.steps
    speed = divided((book.plan.resolved.tokens_per_step,) * 2, seconds)
    hours = times(seconds, (steps / _SECONDS_AN_HOUR,) * 2)
    return Judgement(
        f"{both_ends(seconds, 'g')} s a step",
        f"{steps:,} steps take {in_hours(hours)}; {in_full(speed)} tokens/s",
        NO_VERDICT,
    )


def _hours_in_all(book: _Book, claim: Claim) -> Judgement:
    claimed, steps = _range(claim), book.config.train.steps
    found = []
    seconds, speed = book.claimed("step_seconds"), book.claimed("tokens_per_second")
    if seconds is not None:
        found.append(
            (times(seconds, (steps / _SECONDS_AN_HOUR,) * 2), f"{steps:,} steps of {both_ends(seconds, 'g')} s")
        )
    if speed is not None:
        total = book.plan.total_tokens
        needed = divided((total / _SECONDS_AN_HOUR,) * 2, speed)
        found.append((needed, f"{in_short((total, total))} tokens at {in_full(speed)} tokens/s"))
    if not found:
        return Judgement(in_hours(claimed), "the document gives no speed", NO_VERDICT)
    wrong = [f"{why} take {in_hours(hours)}" for hours, why in found if not agree(claimed, hours, MEASURED)]
    return Judgement(
        in_hours(claimed),
        "; ".join(f"{in_hours(hours)} for {why}" for hours, why in found),
        f"does not hold: {' and '.join(wrong)}, not {in_hours(claimed)}" if wrong else HOLDS,
    )


def _mfu(book: _Book, claim: Claim) -> Judgement:
    claimed, peak = _range(claim), book.peak
    step, hours = book.claimed("step_seconds"), book.claimed("hours")
    of_a_step = book.plan.flops_per_token * book.plan.resolved.tokens_per_step
    done: list[tuple[Range, str]] = []  # FLOP/s of all devices
    if step is not None:
        done.append((divided((of_a_step,) * 2, step), f"{both_ends(step, 'g')} s a step"))
    if hours is not None:
        seconds = times(hours, (_SECONDS_AN_HOUR,) * 2)
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


def _memory(part: str) -> Callable[[_Book, Claim], Judgement]:
    def judged(book: _Book, claim: Claim) -> Judgement:
        memory, claimed = book.plan.memory, _range(claim)
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
            _verdict(claimed, size, MEASURED, wrong),
        )

    return judged


def _loss(words: str) -> Callable[[_Book, Claim], Judgement]:
    def judged(book: _Book, claim: Claim) -> Judgement:
        loss = _range(claim)
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


def _perplexity(book: _Book, claim: Claim) -> Judgement:
    claimed, loss = _range(claim), book.claimed("validation_loss")
    words = f"perplexity {both_ends(claimed, 'g')}"
    if loss is None:
        return Judgement(words, "the document gives no validation loss", NO_VERDICT)
    found = perplexity(loss[0])
    power = f"e^{loss[0]:g}"
    wrong = f"{power} is {found:.2f}, not {both_ends(claimed, 'g')}"
    return Judgement(words, f"{power} = {found:.2f}", _verdict(claimed, found, ROUNDED, wrong))


_JUDGES: dict[ClaimKind, Callable[[_Book, Claim], Judgement]] = {
    "parameters": _parameters,
    "embedding_parameters": _embedding_parameters,
    "tokens": _tokens,
    "tokens_per_step": _tokens_per_step,
    "data_tokens": _data_tokens,
    "samples": _samples,
    "epochs": _epochs,
    "tokens_per_second": _tokens_per_second,
    "step_seconds": _step_seconds,
    "hours": _hours_in_all,
    "mfu": _mfu,
    "weights_gb": _memory("weights"),
    "gradients_gb": _memory("gradients"),
    "optimizer_gb": _memory("optimizer"),
    "activations_gb": _memory("activations"),
    "training_loss": _loss("training loss"),
    "validation_loss": _loss("validation loss"),
    "perplexity": _perplexity,
}


def _verdict(claimed: Range, computed: float, tolerance: float, wrong: str) -> str:
    return HOLDS if agree(claimed, (computed, computed), tolerance) else f"does not hold: {wrong}"


def perplexity(loss: float) -> float:
    """Of a loss in nats; beyond 700 a float overflows."""
    return math.exp(min(loss, 700.0))


def _range(claim: Claim) -> Range:
    return claim.value if isinstance(claim.value, tuple) else (claim.value, claim.value)
