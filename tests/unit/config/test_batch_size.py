from __future__ import annotations

import re

import pytest
from config_cases import refused
from hypothesis import assume, given
from hypothesis import strategies as st

from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.planning.batch_size import BatchPlan, plan_batch
from megalm.topology import Topology
from tests.messages import assert_names

SMALL = st.integers(min_value=1, max_value=64)


def settings(total: int | None, micro: int | str | None, steps: int | None) -> DeepSpeedSettings:
    values = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    return DeepSpeedSettings.model_validate({key: value for key, value in values.items() if value is not None})


def plan(total: int | None, micro: int | str | None, steps: int | None, ranks: int, most: int = 10**9) -> BatchPlan:
    return plan_batch(
        settings(total, micro, steps), Topology(ranks, 1, 1), "ds.json", lambda batch: batch.micro_batch <= most
    )[0]


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


def test_auto_reports_what_it_chose() -> None:
    def notice(total: int, micro: str | None, most: int) -> str:
        (only,) = plan_batch(
            settings(total, micro, None), Topology(2, 1, 1), "ds.json", lambda batch: batch.micro_batch <= most
        )[1]
        return only

    assert_names(notice(16, "auto", 4), "train_micro_batch_size_per_gpu", '"auto"', 4)
    assert_names(notice(16, None, 4), "train_micro_batch_size_per_gpu", 4)
    assert '"auto"' not in notice(16, None, 4)
    assert_names(notice(16, "auto", 0), "train_micro_batch_size_per_gpu", 1)
    assert notice(16, "auto", 0) != notice(16, "auto", 1), "1 does not fit, and is taken all the same"


@given(total=SMALL, micro=SMALL, ranks=SMALL)
def test_the_values_that_are_proposed_work(total: int, micro: int, ranks: int) -> None:
    assume(total % (micro * ranks))
    message = refused(plan, total, micro, None, ranks)
    step = ranks if total % ranks else micro * ranks
    below = total // step * step
    batches = {below, below + step} if below else {step}
    assert_names(message, *batches)
    others = {int(size) for size in re.findall(r"(?<!=)\b\d+", message)} - batches - {ranks, step}
    if total % ranks:
        assert others, "numbers of ranks"
        assert all(total % count == 0 for count in others)
    else:
        assert all(plan(size, micro, None, ranks).micro_batch == micro for size in batches)
        sizes, _, counts = message.partition("micro-batch of ")[2].partition("data-parallel")[0].partition(", or ")
        assert all(plan(total, int(size), None, ranks).global_batch == total for size in re.findall(r"\d+", sizes))
        assert all(plan(total, micro, None, int(count)).micro_batch == micro for count in re.findall(r"\d+", counts))


@pytest.mark.parametrize(
    ("total", "micro", "steps", "ranks", "names"),
    [
        (16, 4, None, 3, ["train_batch_size=16", 3, 15, 18, 1, 2, 4, 8, 16]),
        (2, "auto", None, 4, ["train_batch_size=2", 4, 1, 2]),
        (16, 3, None, 2, ["train_batch_size=16", "train_micro_batch_size_per_gpu=3", 2, 6, 12, 18, 4]),
        (
            16,
            4,
            4,
            2,
            ["train_batch_size=16", "train_micro_batch_size_per_gpu=4", "gradient_accumulation_steps=4", 2, 32],
        ),
        (256, 8, 4, 2, ["train_batch_size=256", "8 ranks", 64]),
        (256, 4, None, 3, ["train_batch_size=256", 255, 258, 64]),
        (16, None, 3, 2, ["gradient_accumulation_steps=3"]),
        (16, "auto", 100, 2, ["gradient_accumulation_steps=100"]),
        (None, None, None, 2, ["train_batch_size"]),
        (None, "auto", 4, 2, ["train_batch_size"]),
    ],
)
def test_sizes_that_do_not_divide(
    total: int | None, micro: int | str | None, steps: int | None, ranks: int, names: list[object]
) -> None:
    assert_names(refused(plan, total, micro, steps, ranks), "ds.json", *names)


def test_a_batch_that_follows_the_ranks_is_reported() -> None:
    batch, notices = plan_batch(settings(None, 4, None), Topology(2, 1, 1), "ds.json", lambda _: True)
    assert batch == BatchPlan(8, 4, 1, 2)
    assert len(notices) == 1
    assert_names(notices[0], "train_batch_size", 8)
