from __future__ import annotations

import re

import pytest
from config_cases import refused
from hypothesis import assume, given
from hypothesis import strategies as st

from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.planning.batch_size import BatchPlan, plan_batch

SMALL = st.integers(min_value=1, max_value=64)


def settings(total: int | None, micro: int | str | None, steps: int | None) -> DeepSpeedSettings:
    stated = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    return DeepSpeedSettings.model_validate({key: value for key, value in stated.items() if value is not None})


def plan(total: int | None, micro: int | str | None, steps: int | None, ranks: int, most: int = 10**9) -> BatchPlan:
    return plan_batch(settings(total, micro, steps), ranks, "ds.json", lambda batch: batch.micro_batch <= most)[0]


@given(micro=SMALL, steps=SMALL, ranks=SMALL)
def test_any_two_sizes_give_the_third(micro: int, steps: int, ranks: int) -> None:
    total = micro * steps * ranks
    wanted = BatchPlan(total, micro, steps, ranks)
    assert plan(total, micro, None, ranks) == wanted
    assert plan(total, micro, steps, ranks) == wanted
    assert plan(total, None, steps, ranks) == wanted
    assert plan(total, "auto", steps, ranks) == wanted
    assert plan(None, micro, steps, ranks) == wanted


@given(per_rank=st.integers(1, 2000), ranks=SMALL, most=SMALL)
def test_auto_is_the_largest_divisor_that_fits(per_rank: int, ranks: int, most: int) -> None:
    for micro in ("auto", None):
        chosen = plan(per_rank * ranks, micro, None, ranks, most)
        assert chosen.global_batch == per_rank * ranks
        assert chosen.micro_batch == max(size for size in range(1, most + 1) if per_rank % size == 0)


def test_auto_says_what_it_chose() -> None:
    def notices(total: int, micro: str | None, most: int) -> str:
        return plan_batch(settings(total, micro, None), 2, "ds.json", lambda batch: batch.micro_batch <= most)[1][0]

    assert notices(16, "auto", 4).startswith('train_micro_batch_size_per_gpu ("auto"): 4, the largest')
    assert notices(16, None, 4).startswith("train_micro_batch_size_per_gpu (not stated): 4")
    assert "1, which by the estimate does not fit" in notices(16, "auto", 0)


@given(total=SMALL, micro=SMALL, ranks=SMALL)
def test_the_values_that_are_proposed_work(total: int, micro: int, ranks: int) -> None:
    assume(total % (micro * ranks))
    said = refused(plan, total, micro, None, ranks)
    proposed = [int(size) for size in re.findall(r"\d+", said.split("use ")[1].split(", or")[0].split(" of ")[-1])]
    assert proposed
    if total % ranks:
        assert all(size % ranks == 0 for size in proposed)
        for count in re.findall(r"\d+", said.split(", or ")[1]):
            assert total % int(count) == 0
    else:
        assert all(plan(size, micro, None, ranks).micro_batch == micro for size in proposed)
        for size in re.findall(r"\d+", said.split("micro-batch of ")[1]):
            assert plan(total, int(size), None, ranks).global_batch == total


@pytest.mark.parametrize(
    ("total", "micro", "steps", "ranks", "message"),
    [
        (
            16,
            4,
            None,
            3,
            "16 does not divide over 3 data-parallel ranks; use 15 or 18, or 1, 2, 4, 8 or 16 ranks",
        ),
        (2, "auto", None, 4, "train_batch_size=2 does not divide over 4 data-parallel ranks; use 4, or 1 or 2 ranks"),
        (16, 3, None, 2, "= 6; use a batch of 12 or 18, or a micro-batch of 2 or 4"),
        (
            16,
            4,
            4,
            2,
            "16 is not train_micro_batch_size_per_gpu=4 x gradient_accumulation_steps=4 x 2",
        ),
        (16, None, 3, 2, "gradient_accumulation_steps=3"),
        (16, "auto", 100, 2, "gradient_accumulation_steps=100"),
        (None, None, None, 2, "train_batch_size is not stated; add the sequences of one optimizer step"),
        (None, "auto", 4, 2, "train_batch_size is not stated"),
    ],
)
def test_sizes_that_do_not_divide(
    total: int | None, micro: int | str | None, steps: int | None, ranks: int, message: str
) -> None:
    assert message in refused(plan, total, micro, steps, ranks)


def test_a_batch_that_follows_the_ranks_is_said() -> None:
    batch, notices = plan_batch(settings(None, 4, None), 2, "ds.json", lambda _: True)
    assert batch == BatchPlan(8, 4, 1, 2)
    assert notices == ["train_batch_size is not stated: 8, which changes with the number of ranks"]
