"""Blocks per pipeline stage: no other way of handing them out makes the costliest stage cheaper."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.schema import ModelSection
from megalm.cost_model.pipeline_balance import StageCosts, balanced_blocks, micro_batches_for, parameter_costs
from megalm.model.model_config import build_model_config
from megalm.topology import bubble_share

COSTS = st.floats(0, 20)


@given(st.integers(1, 5), st.integers(0, 6), COSTS, st.floats(0.1, 10), COSTS)
def test_no_other_way_is_better(stages: int, more: int, embedding: float, block: float, head: float) -> None:
    layers, costs = stages + more, StageCosts(embedding, block, head)
    found = balanced_blocks(layers, stages, costs)
    assert sum(found) == layers
    assert min(found) >= 1
    every_way = (counts for counts in itertools.product(range(1, layers + 1), repeat=stages) if sum(counts) == layers)
    best = min(max(costs.of_stages(counts)) for counts in every_way)
    assert max(costs.of_stages(found)) == pytest.approx(best)


def test_embedding_and_head_are_weighed() -> None:
    assert balanced_blocks(12, 4, StageCosts(0, 1, 0)) == (3, 3, 3, 3)
    assert balanced_blocks(12, 4, StageCosts(2, 1, 2)) == (2, 4, 4, 2)


def test_of_equal_stages_the_later_one_takes_the_odd_block() -> None:
    assert balanced_blocks(5, 2, StageCosts(0, 1, 0)) == (2, 3)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_stages_are_the_models(style: str, tied: bool) -> None:
    section = ModelSection(style=style, tie_word_embeddings=tied, num_hidden_layers=6)  # type: ignore[arg-type]
    shape = build_model_config(section, vocab_size=101, sequence_length=32)
    stages = parameter_costs(shape).of_stages((2, 1, 3))
    copy = shape.vocab_size * shape.hidden_size if tied else 0  # the last stage holds the tied weight, too
    assert sum(stages) == shape.parameter_count() + copy


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_micro_batches_for_a_bubble(stages: int) -> None:
    enough = micro_batches_for(stages, 0.1)
    assert bubble_share(stages, enough) <= 0.1 < bubble_share(stages, enough - 1)
