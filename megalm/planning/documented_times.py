"""What a document says of speed and time, judged: tokens a second, seconds a step, hours, MFU."""

from __future__ import annotations

from megalm.config.documented_schema import Claim
from megalm.planning.claims import HOLDS, MEASURED, NO_VERDICT, SECONDS_AN_HOUR, Book, Judgement, range_of
from megalm.planning.ranges import Range, agree, both_ends, divided, in_full, in_hours, in_percent, in_short, times


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
