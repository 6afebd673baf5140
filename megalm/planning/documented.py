"""What a document says of a run, judged: each claim beside what megalm computes for it. No torch.

Nothing here is an opinion: a verdict follows from the claim, the run and a stated tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megalm.config.documented_schema import Claim, ClaimKind
from megalm.data.streams import whole_windows
from megalm.planning import documented_times
from megalm.planning.claims import (
    EXACT,
    EXPECTED,
    FIRST_LOSS_NATS,
    HOLDS,
    MEASURED,
    NO_VERDICT,
    ROUNDED,
    SECONDS_AN_HOUR,
    Book,
    Judgement,
    perplexity,
    range_of,
    verdict_on,
)
from megalm.planning.plan import Plan
from megalm.planning.ranges import agree, both_ends, divided, in_full, in_hours, in_short, times

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
    "tokens_per_second": documented_times.tokens_per_second,
    "step_seconds": documented_times.step_seconds,
    "hours": documented_times.hours_in_all,
    "mfu": documented_times.mfu,
    "weights_gb": _memory("weights"),
    "gradients_gb": _memory("gradients"),
    "optimizer_gb": _memory("optimizer"),
    "activations_gb": _memory("activations"),
    "training_loss": _loss("training loss"),
    "validation_loss": _loss("validation loss"),
    "perplexity": _perplexity,
}
