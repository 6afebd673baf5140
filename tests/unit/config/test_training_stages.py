"""The arithmetic of steps, samples and tokens where batch and sequence length change, against one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any

import pytest
from config_cases import notice_of, refused, section_of
from hypothesis import given
from hypothesis import strategies as st

from megalm.cli.plan_text import plan_text
from megalm.config.loading import load_run_config
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.model.model_config import flops_per_token
from megalm.planning.batch_size import TrainingStage, TrainingStages
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_plan import make_plan
from tests.messages import assert_names

STEPS = 40
Start = Callable[..., ResolvedRun]


@st.composite
def training_stages(draw: st.DrawFn) -> TrainingStages:
    firsts = sorted({1, *draw(st.lists(st.integers(2, STEPS + 5), max_size=4))})
    longest, found = 12, []
    for first in firsts:
        parts = draw(st.sampled_from((1, 2, 3, 4, 6, 12)))
        found.append(TrainingStage(first, parts * draw(st.integers(1, 9)), longest // parts, parts))
    return TrainingStages(tuple(found))


@given(stages=training_stages(), after=st.integers(0, STEPS), steps=st.integers(0, STEPS))
def test_sums_are_those_of_each_step(stages: TrainingStages, after: int, steps: int) -> None:
    each = [stages.at(step) for step in range(after + 1, steps + 1)]
    assert stages.tokens(steps, after) == sum(stage.sequences * stage.sequence_length for stage in each)
    assert 12 * stages.samples(steps, after) == stages.tokens(steps, after)
    assert list(stages.spans(steps, after)) == [(stage, len(list(of))) for stage, of in groupby(each)]
    assert stages.samples(steps) == stages.samples(min(after, steps)) + stages.samples(steps, min(after, steps))


@given(stages=training_stages(), tokens=st.integers(1, 3000))
def test_steps_for_tokens_are_the_least(stages: TrainingStages, tokens: int) -> None:
    reached = accumulate(stages.at(step).tokens for step in range(1, 300))
    assert stages.steps_for(tokens) == next(step for step, sum_ in enumerate(reached, 1) if sum_ >= tokens)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("schedule.batch=[]", [(1, 16, 256)]),
        (
            "schedule.batch=[{from_step: 0, sequences: 16}, {from_step: 5, sequences: 64}]",
            [(1, 16, 256), (5, 64, 256)],
        ),
        ("schedule.batch=[{from_step: 5, sequences: 64}]", [(1, 16, 256), (5, 64, 256)]),
        ("schedule.batch=[{from_step: 5, sequences: 16}]", [(1, 16, 256)]),
        ("data.stages=[{from_step: 5, sequence_length: 512}]", [(1, 16, 256), (5, 16, 512)]),
        (
            "schedule.batch=[{from_step: 5, sequences: 8}, {from_step: 9, sequences: 4}]; data.sequence_length=128; "
            "data.stages=[{from_step: 5, sequence_length: 256}, {from_step: 7, sequence_length: 512}]",
            [(1, 16, 128), (5, 8, 256), (7, 8, 512), (9, 4, 512)],
        ),
    ],
)
def test_stages_of_a_configuration(words: str, expected: list[tuple[int, int, int]]) -> None:
    found = TrainingStages.of(load_run_config(None, words.split("; ")).config, 16)
    assert [(stage.first_step, stage.sequences, stage.sequence_length) for stage in found.stages] == expected
    longest = max(length for _, _, length in expected)
    assert {stage.parts * stage.sequence_length for stage in found.stages} == {longest}
    assert found.longest.sequence_length == longest
    assert found.largest_batch == max(sequences for _, sequences, _ in expected)
    assert (found.at(0), found.grow) == (found.at(1), len(expected) > 1)


@given(stages=training_stages())
def test_a_record_of_stages(stages: TrainingStages) -> None:
    assert TrainingStages.from_json(stages.as_json()) == stages
    for other in (None, 3, [], [[1, 2]], [[1, 0, 4, 1]], [["one", 2, 3, 1]]):
        assert TrainingStages.from_json(other) is None


LONGER = "data.stages=[{from_step: 9, sequence_length: 512}]"
GROWS = "schedule.batch=[{from_step: 11, sequences: 32}, {from_step: 31, sequences: 48}]"


@pytest.mark.parametrize(
    ("words", "changes", "names"),
    [
        ([GROWS], {}, None),
        (["schedule.batch=[{from_step: 0, sequences: 16}, {from_step: 2, sequences: 32}]"], {}, None),
        (["schedule.batch=[{from_step: 5, sequences: 32}, {from_step: 4, sequences: 64}]"], {}, ["from_step=4", 5]),
        (["schedule.batch=[{from_step: 0, sequences: 16}, {from_step: 1, sequences: 32}]"], {}, ["from_step=1", 1]),
        (["schedule.batch=[{from_step: 1, sequences: 8}]"], {}, ["schedule.batch", 8, "train_batch_size=16"]),
        (["schedule.batch=[{from_step: 1, sequences: 8}]"], {"train_batch_size": None}, None),
        (
            ["schedule.batch=[{from_step: 1, sequences: 8}]", "batch.global_sequences=16"],
            {"train_batch_size": None},
            ["schedule.batch", 8, "batch.global_sequences=16"],
        ),
        (["schedule.batch=[{from_step: 9, sequences: 33}]"], {}, ["from_step", 9, "sequences=33", 32, 34, 3, 11]),
        (
            ["schedule.batch=[{from_step: 9, sequences: 20}]"],
            {"train_micro_batch_size_per_gpu": 4},
            ["from_step", 9, "sequences=20", "train_micro_batch_size_per_gpu=4", 16, 24, 1, 2],
        ),
        (["schedule.batch=[{from_step: 9, sequences: 24}]"], {"train_micro_batch_size_per_gpu": 4}, None),
        ([LONGER], {}, None),
        (["data.sequence_length=192", LONGER], {}, ["data.stages", 192, 512, 128, 256]),
        (["data.sequence_length=32", LONGER, "schedule.batch=[{from_step: 3, sequences: 24}]"], {}, [3, 24, 16, 32]),
        ([LONGER, "model.max_position_embeddings=256"], {}, ["data.sequence_length=512"]),
        ([LONGER, "model.max_position_embeddings=512"], {}, None),
        (["data.stages=[{from_step: 9}]"], {}, ["data.stages", 9, "blend", "sequence_length"]),
        (
            [LONGER, "data.sequence_length=1", "parallel.tensor=2", "parallel.sequence=true"],
            {},
            ["data.sequence_length=1"],
        ),
    ],
)
def test_what_grows_is_checked(start: Start, words: list[str], changes: dict[str, Any], names: Any) -> None:
    if names is None:
        start(*words, **changes)
        return
    assert_names(refused(start, *words, **changes), *names)


def test_a_sequence_length_that_grows_in_a_plan(start: Start) -> None:
    words = ("train.steps=40", "data.sequence_length=256", "schedule.batch=[{from_step: 31, sequences: 8}]")
    run = start("data.stages=[{from_step: 31, sequence_length: 512}]", *words, device=gpu_by_name("H100"), ranks=4)
    plan, shape = make_plan(run, 99), make_plan(run, 99).shape
    assert (shape.max_position_embeddings, plan.case.sequence_length) == (512, 512), "the memory is of the longest"
    assert plan.total_tokens == 40 * 16 * 256
    short, long = (flops_per_token(shape, length) for length in (256, 512))
    assert plan.total_flops == 16 * 256 * (30 * short + 10 * long)
    assert short < plan.flops_per_token < long
    text = section_of(plan_text(plan, 8), "Stages of the run")
    assert all(words in text for words in ("16 x 256", "8 x 512"))


def test_a_batch_that_grows_in_a_plan(start: Start) -> None:
    run = start(GROWS, "train.steps=40", "data.sequence_length=64", device=gpu_by_name("H100"), ranks=4)
    assert [run.batch.of(stage.sequences).accumulation for stage in run.stages.stages] == [1, 2, 3]
    assert (run.batch.global_batch, run.deepspeed["train_batch_size"]) == (48, 16)
    plan = make_plan(run, 99)
    assert plan.total_tokens == 64 * (10 * 16 + 20 * 32 + 10 * 48)
    assert plan.case.accumulation == 3, "the memory is that of the largest batch"
    hours = [plan.hours_of(stage, steps) for stage, steps in run.stages.spans(40)]
    assert plan.hours == pytest.approx(sum(filter(None, hours)))
    text = section_of(plan_text(plan, 8), "Stages of the run")
    for words in ("16 x 64", "32 x 64", "48 x 64", "4 x 1 x 4", "4 x 2 x 4", "4 x 3 x 4", "10,240", "40,960", "30,720"):
        assert words in text
    assert "Stages of the run" not in plan_text(make_plan(start(), 99), 8)


def test_a_bubble_is_of_each_stages_micro_batches(start: Start) -> None:
    words = ("parallel.pipeline=2", "train.steps=2", "schedule.batch=[{from_step: 2, sequences: 64}]")
    sizes = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 1}}
    plan = make_plan(start(*words, device=gpu_by_name("H100"), **sizes), 99)
    small, large = (plan.mfu_of(stage) for stage in plan.resolved.stages.stages)
    assert small / large == pytest.approx((1 / 2) / (4 / 5))
    assert all(words in section_of(plan_text(plan, 8), "Stages of the run") for words in ("50%", "20%"))
    assert plan.mfu == pytest.approx((16 + 64) / (16 / small + 64 / large))


def test_steps_follow_from_tokens_of_all_stages(start: Start) -> None:
    run = start(GROWS, "train.tokens=100000", "data.sequence_length=64")
    assert run.config.train.steps == 30 + -(-(100000 - 64 * (10 * 16 + 20 * 32)) // (64 * 48))
    assert_names(notice_of(run, "(train.tokens"), "1,024", "3,072")
