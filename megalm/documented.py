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
from megalm.plan import Plan

Range = tuple[float, float]

HOLDS = "holds"
EXPECTED = "to be seen in the run"
NO_VERDICT = "-"

# How far a claim may be from what is computed: a share of it, for a first loss nats.
EXACT = 0.001  # of what was counted
ROUNDED = 0.02  # of what people round
MEASURED = 0.1  # of what a clock or an allocator said
FIRST_LOSS_NATS = 0.5  # an untrained model knows nothing, but does not guess evenly

_SECONDS_AN_HOUR = 3600
_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"))
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
        f"{_short(claimed)} parameters",
        f"{count:,}: {_short((book.block_parameters,) * 2)} in blocks, the rest embeddings",
        _verdict(claimed, count, ROUNDED, f"{book.model_words} is {_short((count, count))}, not {_short(claimed)}"),
    )


def _embedding_parameters(book: _Book, claim: Claim) -> Judgement:
    shape, claimed = book.plan.shape, _range(claim)
    count, product = shape.vocab_size * shape.hidden_size, f"{shape.vocab_size:,} x {shape.hidden_size:,}"
    return Judgement(
        f"{_whole(claimed)} embedding parameters",
        f"{product} = {count:,}",
        _verdict(claimed, count, EXACT, f"{product} is {count:,}, not {_whole(claimed)}"),
    )


def _tokens(book: _Book, claim: Claim) -> Judgement:
    total, claimed = book.plan.total_tokens, _range(claim)
    wrong = f"{book.tokens_words} is {_short((total, total))} tokens, not {_short(claimed)}"
    speed, hours = book.claimed("tokens_per_second"), book.claimed("hours")
    if speed is not None and hours is not None:
        done = _times(speed, hours, _SECONDS_AN_HOUR)
        pace = f"{_whole(speed)} tokens/s for {_hours(hours)} are"
        wrong += f", which {pace}" if _agree(claimed, done, ROUNDED) else f"; {pace} {_short(done)}"
    return Judgement(
        f"{_short(claimed)} tokens",
        f"{book.tokens_words} = {_short((total, total))}",
        _verdict(claimed, total, ROUNDED, wrong),
    )


def _tokens_per_step(book: _Book, claim: Claim) -> Judgement:
    count, claimed = book.plan.resolved.tokens_per_step, _range(claim)
    product = f"{book.plan.resolved.batch.global_batch} x {book.config.data.sequence_length:,}"
    return Judgement(
        f"{_whole(claimed)} tokens a step",
        f"{product} = {count:,}",
        _verdict(claimed, count, EXACT, f"{product} is {count:,}, not {_whole(claimed)}"),
    )


def _data_tokens(book: _Book, claim: Claim) -> Judgement:
    claimed, total = _range(claim), book.plan.total_tokens
    passes = _divided((total, total), claimed)
    return Judgement(
        f"data of {_whole(claimed)} tokens",
        f"{_short((total, total))} tokens are {_ends(passes, '.3g')} passes over them",
        NO_VERDICT,
    )


def _samples(book: _Book, claim: Claim) -> Judgement:
    length, claimed = book.config.data.sequence_length, _range(claim)
    stride = claim.stride or book.config.data.stride or length
    words = f"{_whole(claimed)} samples at a stride of {stride:,}"
    tokens = book.claimed("data_tokens")
    if tokens is None:
        return Judgement(words, "the document does not say of how many tokens", NO_VERDICT)
    count = whole_windows(int(tokens[0]), length, stride)
    seen = count * length / tokens[0]
    return Judgement(
        words,
        f"{count:,}; each token is seen {seen:,.0f} {'time' if round(seen) == 1 else 'times'} a pass",
        _verdict(claimed, count, EXACT, f"{_whole(tokens)} tokens have {count:,} samples, not {_whole(claimed)}"),
    )


def _epochs(book: _Book, claim: Claim) -> Judgement:
    claimed, total, tokens = _range(claim), book.plan.total_tokens, book.claimed("data_tokens")
    words = f"{_ends(claimed, 'g')} epochs"
    if tokens is None:
        return Judgement(words, "the document does not say of how many tokens", NO_VERDICT)
    passes = total / tokens[0]
    what = f"{book.tokens_words} = {_short((total, total))} tokens are {passes:.1f} passes over {_short(tokens)}"
    wrong = f"{what}, not {_ends(claimed, 'g')}"
    return Judgement(words, f"{passes:.2f} passes over {_short(tokens)}", _verdict(claimed, passes, ROUNDED, wrong))


def _tokens_per_second(book: _Book, claim: Claim) -> Judgement:
    speed, total = _range(claim), book.plan.total_tokens
    needed = _divided((total / _SECONDS_AN_HOUR,) * 2, speed)
    computed = f"{_short((total, total))} tokens take {_hours(needed)}"
    peak = book.peak
    if peak is not None:
        blocks, parameters = book.block_parameters, book.plan.parameter_count
        plain = (speed[0] * 6 * blocks / peak, speed[1] * 6 * parameters / peak)
        counted = _times(speed, (book.plan.flops_per_token / peak,) * 2)
        computed += (
            f"; {_share(plain)} of the peak of {book.devices} x {book.documented.device} by 6 FLOPs a parameter "
            f"(of the blocks, of all), {_share(counted)} with attention's"
        )
    return Judgement(f"{_whole(speed)} tokens/s", computed, NO_VERDICT)


def _step_seconds(book: _Book, claim: Claim) -> Judgement:
    seconds, steps = _range(claim), book.config.train.steps
    speed = _divided((book.plan.resolved.tokens_per_step,) * 2, seconds)
    hours = _times(seconds, (steps / _SECONDS_AN_HOUR,) * 2)
    return Judgement(
        f"{_ends(seconds, 'g')} s a step",
        f"{steps:,} steps take {_hours(hours)}; {_whole(speed)} tokens/s",
        NO_VERDICT,
    )


def _hours_in_all(book: _Book, claim: Claim) -> Judgement:
    claimed, steps = _range(claim), book.config.train.steps
    found = []
    seconds, speed = book.claimed("step_seconds"), book.claimed("tokens_per_second")
    if seconds is not None:
        found.append((_times(seconds, (steps / _SECONDS_AN_HOUR,) * 2), f"{steps:,} steps of {_ends(seconds, 'g')} s"))
    if speed is not None:
        total = book.plan.total_tokens
        needed = _divided((total / _SECONDS_AN_HOUR,) * 2, speed)
        found.append((needed, f"{_short((total, total))} tokens at {_whole(speed)} tokens/s"))
    if not found:
        return Judgement(_hours(claimed), "the document gives no speed", NO_VERDICT)
    wrong = [f"{why} take {_hours(hours)}" for hours, why in found if not _agree(claimed, hours, MEASURED)]
    return Judgement(
        _hours(claimed),
        "; ".join(f"{_hours(hours)} for {why}" for hours, why in found),
        f"does not hold: {' and '.join(wrong)}, not {_hours(claimed)}" if wrong else HOLDS,
    )


def _mfu(book: _Book, claim: Claim) -> Judgement:
    claimed, peak = _range(claim), book.peak
    step, hours = book.claimed("step_seconds"), book.claimed("hours")
    of_a_step = book.plan.flops_per_token * book.plan.resolved.tokens_per_step
    done: list[tuple[Range, str]] = []  # FLOP/s of all devices
    if step is not None:
        done.append((_divided((of_a_step,) * 2, step), f"{_ends(step, 'g')} s a step"))
    if hours is not None:
        seconds = _times(hours, (_SECONDS_AN_HOUR,) * 2)
        done.append((_divided((book.plan.total_flops,) * 2, seconds), _hours(hours)))
    words = f"MFU {_share(claimed)}"
    if not done:
        return Judgement(words, "the document gives no speed", NO_VERDICT)
    if peak is None:
        peaks = "; ".join(
            f"at {why} a peak of {_ends(_divided(it, _times(claimed, (book.devices * 1e12,) * 2)), '.3g')} TFLOP/s"
            for it, why in done
        )
        return Judgement(words, f"{peaks} a device", "cannot be told: the document names no device")
    shares = [(_divided(it, (peak, peak)), why) for it, why in done]
    wrong = [f"{why} is {_share(share)}" for share, why in shares if not _agree(claimed, share, MEASURED)]
    return Judgement(
        words,
        "; ".join(f"{_share(share)} at {why}" for share, why in shares),
        f"does not hold: {' and '.join(wrong)}, not {_share(claimed)}" if wrong else HOLDS,
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
        wrong = f"{size:.2g} GB by the estimate of this plan, not {_ends(claimed, 'g')}"
        return Judgement(
            f"{_ends(claimed, 'g')} GB of {part}", f"{size:.2f} GB on a rank", _verdict(claimed, size, MEASURED, wrong)
        )

    return judged


def _loss(words: str) -> Callable[[_Book, Claim], Judgement]:
    def judged(book: _Book, claim: Claim) -> Judgement:
        loss = _range(claim)
        when = "in the end" if claim.step is None else f"at step {claim.step:,}"
        said = f"{words} {_ends(loss, 'g')} {when}"
        if claim.step == 0:
            vocabulary = book.plan.shape.vocab_size
            first = math.log(vocabulary)
            wrong = f"ln {vocabulary:,} is {first:.2f}; {_ends(loss, 'g')} is of {math.exp(loss[0]):,.0f} pieces"
            holds = loss[0] - FIRST_LOSS_NATS <= first <= loss[1] + FIRST_LOSS_NATS
            return Judgement(said, f"ln {vocabulary:,} = {first:.2f}", HOLDS if holds else f"does not hold: {wrong}")
        step = book.config.train.steps if claim.step is None else claim.step
        seen = step * book.plan.resolved.tokens_per_step
        perplexity = _ends((math.exp(loss[0]), math.exp(loss[1])), ",.4g")
        return Judgement(said, f"perplexity {perplexity}, after {_short((seen, seen))} tokens", EXPECTED)

    return judged


def _perplexity(book: _Book, claim: Claim) -> Judgement:
    claimed, loss = _range(claim), book.claimed("validation_loss")
    words = f"perplexity {_ends(claimed, 'g')}"
    if loss is None:
        return Judgement(words, "the document gives no validation loss", NO_VERDICT)
    found = math.exp(loss[0])
    power = f"e^{loss[0]:g}"
    wrong = f"{power} is {found:.2f}, not {_ends(claimed, 'g')}"
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
    return HOLDS if _agree(claimed, (computed, computed), tolerance) else f"does not hold: {wrong}"


def _agree(claimed: Range, computed: Range, tolerance: float) -> bool:
    """Whether two ranges touch, the claimed one widened by the tolerance."""
    return claimed[0] * (1 - tolerance) <= computed[1] and computed[0] <= claimed[1] * (1 + tolerance)


def _range(claim: Claim) -> Range:
    return claim.value if isinstance(claim.value, tuple) else (claim.value, claim.value)


def _times(left: Range, right: Range, factor: float = 1.0) -> Range:
    return left[0] * right[0] * factor, left[1] * right[1] * factor


def _divided(left: Range, right: Range) -> Range:
    return left[0] / right[1], left[1] / right[0]


def _ends(value: Range, form: str) -> str:
    """ "7-8", or "3" where both ends read alike."""
    low, high = (format(end, form) for end in value)
    return low if low == high else f"{low}-{high}"


def _whole(value: Range) -> str:
    return _ends((round(value[0]), round(value[1])), ",")


def _short(value: Range) -> str:
    """32,800,000,000 -> "32.8 B"."""
    unit, letter = next(((unit, letter) for unit, letter in _PREFIXES if value[1] >= unit), (0.0, ""))
    if not unit:
        return _whole(value)
    ends = _ends((value[0] / unit, value[1] / unit), ".4g" if value[1] / unit >= 100 else ".3g")
    return f"{ends}{letter}"


def _hours(value: Range) -> str:
    return f"{_ends(value, '.3g' if value[1] < 1000 else ',.0f')} h"


def _share(value: Range) -> str:
    return f"{_ends((value[0] * 100, value[1] * 100), '.2g')}%"
