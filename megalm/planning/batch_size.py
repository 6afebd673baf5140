"""Global batch, micro-batch and accumulation: the arithmetic of `train_batch_size`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.errors import ConfigError
from megalm.planning.memory_fit import USABLE_MEMORY

_CHOICE = f"the largest that divides the batch and fits into {USABLE_MEMORY:.0%} of the memory by the estimate"


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch` = `micro_batch` x `accumulation` x `data_parallel`, in sequences per step."""

    global_batch: int
    micro_batch: int
    accumulation: int
    data_parallel: int

    def __post_init__(self) -> None:
        assert self.global_batch == self.micro_batch * self.accumulation * self.data_parallel, self


def chooses_micro_batch(settings: DeepSpeedSettings) -> bool:
    """Return whether the micro-batch depends on the device's memory."""
    return not isinstance(settings.train_micro_batch_size_per_gpu, int) and settings.gradient_accumulation_steps is None


def plan_batch(
    settings: DeepSpeedSettings, data_parallel: int, where: str, fits: Callable[[BatchPlan], bool]
) -> tuple[BatchPlan, list[str]]:
    """Return the three batch sizes on `data_parallel` ranks, and a notice of each decision.

    Two of the three sizes give the third, as in DeepSpeed. With `train_batch_size` alone the device's memory decides
    the micro-batch, as with "auto"; DeepSpeed would take the whole batch at once.

    Args:
        where: the JSON's name, for messages.
        fits: whether a batch fits the device's memory.

    Raises:
        ConfigError: sizes that contradict each other or do not divide.
    """
    total, micro, steps = (
        settings.train_batch_size,
        settings.train_micro_batch_size_per_gpu,
        settings.gradient_accumulation_steps,
    )
    if total is None:
        if not isinstance(micro, int):
            raise ConfigError(f"{where}: train_batch_size is missing; add it: the sequences of one optimizer step")
        total = micro * (steps or 1) * data_parallel
        notice = f"train_batch_size is missing: {total}, which changes with the number of ranks"
        return BatchPlan(total, micro, steps or 1, data_parallel), [notice]
    if total % data_parallel:
        raise ConfigError(
            f"{where}: train_batch_size={total} does not divide over {data_parallel} data-parallel ranks; "
            f"use {_nearest_multiples(total, data_parallel)}, or {_words(_divisors(total))} ranks"
        )
    per_rank = total // data_parallel
    notices: list[str] = []
    if not isinstance(micro, int):
        if chooses_micro_batch(settings):
            micro, notices = _largest_that_fits(total, data_parallel, fits, "missing" if micro is None else '"auto"')
        else:
            micro = max(1, per_rank // (steps or 1))
    steps = steps or per_rank // micro or 1
    if micro * steps != per_rank:
        raise ConfigError(f"{where}: {_contradiction(settings, total, micro, steps, data_parallel)}")
    return BatchPlan(total, micro, steps, data_parallel), notices


def _largest_that_fits(total: int, ranks: int, fits: Callable[[BatchPlan], bool], given: str) -> tuple[int, list[str]]:
    per_rank = total // ranks
    plans = (BatchPlan(total, micro, per_rank // micro, ranks) for micro in reversed(_divisors(per_rank)))
    micro = next((plan.micro_batch for plan in plans if fits(plan)), None)
    if micro is None:
        return 1, [
            f"train_micro_batch_size_per_gpu ({given}): 1; even that needs more than {USABLE_MEMORY:.0%} of the memory"
        ]
    return micro, [f"train_micro_batch_size_per_gpu ({given}): {micro}, {_CHOICE}"]


def _contradiction(settings: DeepSpeedSettings, total: int, micro: int, steps: int, ranks: int) -> str:
    if settings.gradient_accumulation_steps is not None:
        return (
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={steps} x {ranks} data-parallel ranks = {micro * steps * ranks}; "
            "remove gradient_accumulation_steps"
        )
    near = sorted(sorted(_divisors(total // ranks), key=lambda size: abs(size - micro))[:2])
    return (
        f"train_batch_size={total} is not a multiple of train_micro_batch_size_per_gpu={micro} x {ranks} data-parallel "
        f"ranks = {micro * ranks}; use a batch of {_nearest_multiples(total, micro * ranks)}, "
        f"or a micro-batch of {_words(near)}"
    )


def _nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _divisors(value: int) -> list[int]:
    small = [size for size in range(1, int(value**0.5) + 1) if value % size == 0]
    return sorted({*small, *(value // size for size in small)})


def _words(values: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *rest, last = [str(value) for value in values]
    return f"{', '.join(rest)} or {last}" if rest else last
