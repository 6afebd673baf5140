"""The handful of numbers that matter, each with what it has to be read against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megalm.tracking.compare import judging
from megalm.tracking.report.account import Account
from megalm.tracking.report.outcome import ago


@dataclass(frozen=True)
class Number:
    name: str
    value: str
    note: str = ""


def numbers(account: Account) -> list[Number]:
    """Only what is known."""
    found, evaluations = account.results, judging(account.history.evaluations)
    shown = []
    if evaluations:
        last = evaluations[-1]
        shown.append(Number("Validation loss", f"{last['loss']:.4f}", f"last, {_where(last)}"))
        if found.best_validation_loss is not None:
            like = f"step {found.best_validation_step:,}" if found.best_validation_step is not None else ""
            shown.append(Number("Best while training", f"{found.best_validation_loss:.4f}", like))
        perplexity = last.get("perplexity", math.exp(min(last["loss"], 700.0)))
        shown.append(Number("Perplexity", f"{perplexity:,.2f}", _counting_alone(account, math.exp)))
        if last.get("bits_per_byte") is not None:
            bits = last["bits_per_byte"]
            # The same text in the same tokens: bits follow the nats.
            baseline = _counting_alone(account, lambda nats: nats * bits / last["loss"]) if last["loss"] else ""
            shown.append(Number("Bits per byte", f"{bits:.3f}", baseline))
    if found.final_train_loss is not None:
        scatter = found.scatter.get("loss")
        note = f"last step; half of the steps of the last tenth are within ±{scatter:.3f}" if scatter else "last step"
        shown.append(Number("Training loss", f"{found.final_train_loss:.4f}", note))
    if found.tokens is not None:
        ratio = found.tokens_per_parameter
        shown.append(Number("Tokens", f"{found.tokens:,}", f"{ratio:.2f} a parameter" if ratio is not None else ""))
    if found.parameters is not None:
        shown.append(Number("Parameters", f"{found.parameters:,}"))
    if (epochs := _epochs(account)) is not None:
        shown.append(Number("Epochs", f"{epochs:.2f}", "of the training dataset"))
    if found.tokens_per_second is not None:
        seconds = f"{found.step_seconds:.3g} s a step, medians" if found.step_seconds is not None else "median"
        shown.append(Number("Tokens a second", f"{found.tokens_per_second:,.0f}", seconds))
    if found.mfu is not None:
        shown.append(Number("MFU", f"{found.mfu:.1%}", "median"))
    if found.wall_seconds is not None:
        times = "in 1 attempt" if found.attempts == 1 else f"in {found.attempts} attempts, without pauses"
        shown.append(Number("Wall time", ago(found.wall_seconds), times))
    return shown


def _where(row: dict[str, Any]) -> str:
    over = f" over {row['targets']:,} tokens" if isinstance(row.get("targets"), int) else ""
    return f"step {row.get('step', 0):,}{over}"


def _counting_alone(account: Account, turned: Any) -> str:
    """What a model reaches that knows how frequent each token is, and no more."""
    entropy = account.environment.get("unigram_entropy")
    if not isinstance(entropy, (int, float)):
        return ""
    return f"counting tokens alone: {turned(entropy):,.4g}"


def _epochs(account: Account) -> float | None:
    """Of the only training dataset."""
    datasets, planned = account.environment.get("datasets"), account.environment.get("planned_steps")
    steps = account.results.steps
    if (
        not isinstance(datasets, list)
        or len(datasets) != 1
        or not isinstance(planned, int)
        or not planned
        or steps is None
    ):
        return None
    epochs = datasets[0].get("epochs") if isinstance(datasets[0], dict) else None
    return epochs * steps / planned if isinstance(epochs, (int, float)) else None
