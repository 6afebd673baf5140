"""Blocks per pipeline stage: no other way of handing them out makes the costliest stage cheaper."""

from __future__ import annotations

import itertools
from dataclasses import replace
from operator import sub

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.schema import ModelSection
from megalm.cost_model.pipeline_balance import (
    StageCosts,
    balanced_blocks,
    balanced_by_parameters,
    micro_batches_for,
    parameter_costs,
)
from megalm.model.model_config import build_model_config
from megalm.parallel.pipeline_schedules import PipelineSchedule, stage_ranks

COSTS = st.floats(0, 20)


OWNERS = [
    *(stage_ranks("1f1b", ranks, 1) for ranks in range(1, 6)),
    stage_ranks("interleaved_1f1b", 2, 2),
    stage_ranks("interleaved_1f1b", 1, 3),
    stage_ranks("zb_v", 2, 2),
]


@given(st.sampled_from(OWNERS), st.integers(0, 6), COSTS, st.floats(0.1, 10), COSTS)
def test_no_other_way_is_better(
    owners: tuple[int, ...], more: int, embedding: float, block: float, head: float
) -> None:
    layers, costs = len(owners) + more, StageCosts(embedding, block, head)

    def costliest_rank(counts: tuple[int, ...]) -> float:
        ranks = [0.0] * len(owners)
        for load, owner in zip(costs.of_stages(counts), owners, strict=True):
            ranks[owner] += load
        return max(ranks)

    found = balanced_blocks(layers, owners, costs)
    assert sum(found) == layers
    assert min(found) >= 1
    cuts = itertools.combinations(range(1, layers), len(owners) - 1)
    every_way = (tuple(map(sub, (*ends, layers), (0, *ends))) for ends in cuts)
    best = min(map(costliest_rank, every_way))
    assert costliest_rank(found) == pytest.approx(best)


def test_embedding_and_head_are_weighed() -> None:
    assert balanced_blocks(12, range(4), StageCosts(0, 1, 0)) == (3, 3, 3, 3)
    assert balanced_blocks(12, range(4), StageCosts(2, 1, 2)) == (2, 4, 4, 2)
    assert balanced_blocks(11, (0, 1, 0, 1), StageCosts(0, 1, 5)) == (4, 2, 4, 1), "the second rank has the head"


def test_of_equal_stages_the_later_one_takes_the_odd_block() -> None:
    assert balanced_blocks(5, range(2), StageCosts(0, 1, 0)) == (2, 3)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_stages_are_the_models(style: str, tied: bool) -> None:
    section = ModelSection(style=style, tie_word_embeddings=tied, num_hidden_layers=6)  # type: ignore[arg-type]
    shape = build_model_config(section, vocab_size=101, sequence_length=32)
    stages = parameter_costs(shape).of_stages((2, 1, 3))
    copy = shape.vocab_size * shape.hidden_size if tied else 0  # the last stage holds the tied weight, too
    assert sum(stages) == shape.parameter_count() + copy


@pytest.mark.parametrize(("tied", "blocks"), [(True, (3, 3, 3, 3)), (False, (3, 3, 4, 2))])
def test_a_rank_with_both_ends_holds_a_tied_table_once(tied: bool, blocks: tuple[int, ...]) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 12}
    shape = build_model_config(ModelSection(tie_word_embeddings=tied, **sizes), vocab_size=640, sequence_length=32)
    assert balanced_by_parameters(shape, (0, 1, 1, 0)) == blocks


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_micro_batches_for_a_bubble(stages: int) -> None:
    schedule = PipelineSchedule("1f1b", stages, 1, 1)
    enough = micro_batches_for(schedule, 0.1)
    assert enough == 9 * (stages - 1)
    assert replace(schedule, micro_batches=enough).bubble_share <= 0.1
