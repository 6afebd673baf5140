"""Every element of a split dimension is held, and by exactly the ranks that need it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.model.layer_factory import ShardedAxis, annotate_shard, shard_of
from megalm.topology import vocabulary_rows, whole_parts

DEGREES = st.integers(1, 16)


@given(DEGREES, st.integers(1, 8), st.integers(1, 8))
def test_heads_are_divided_in_order(ranks: int, parts_of_each: int, size: int) -> None:
    parts = ranks * parts_of_each
    held = [whole_parts(parts * size, parts, ranks, index) for index in range(ranks)]
    assert [part.first for part in held] == [index * parts_of_each * size for index in range(ranks)]
    assert held[-1].last == parts * size
    assert all((part.sharer, part.sharers) == (0, 1) for part in held)


@given(DEGREES, st.integers(1, 8), st.integers(1, 6), st.integers(1, 8))
def test_each_rank_holds_the_key_value_head_that_its_queries_need(
    key_value_heads: int, sharers: int, queries_of_each: int, size: int
) -> None:
    """A query head h of the whole model reads key/value head h // (query heads / key/value heads)."""
    ranks, heads = key_value_heads * sharers, key_value_heads * sharers * queries_of_each
    for index in range(ranks):
        queries = whole_parts(heads, heads, ranks, index)
        keys = whole_parts(key_value_heads * size, key_value_heads, ranks, index)
        needed = {query // (heads // key_value_heads) for query in range(queries.first, queries.last)}
        assert needed == {keys.first // size}
        assert keys.size == size
        assert (keys.sharer, keys.sharers) == (index % sharers, sharers)


@given(st.integers(1, 64), st.integers(0, 1000))
def test_rows_of_a_vocabulary_are_held_once_and_nearly_equally(ranks: int, more: int) -> None:
    total = ranks + more
    held = [vocabulary_rows(total, ranks, index) for index in range(ranks)]
    assert [row for part in held for row in range(part.first, part.last)] == list(range(total))
    assert {part.size for part in held} <= {total // ranks, math.ceil(total / ranks)}
    assert held[0].size == max(part.size for part in held)  # what gathering pads to


def test_a_head_is_never_cut() -> None:
    with pytest.raises(AssertionError):
        whole_parts(6 * 8, 6, 4, 0)


def test_a_shard_is_cut_out_of_the_whole() -> None:
    whole = torch.arange(12.0).view(4, 3)
    part = torch.nn.Parameter(torch.empty(2, 3))
    annotate_shard(part, ShardedAxis((4, 3), ((1, 3), (0, 3)), is_owner=False))
    assert torch.equal(shard_of(part).cut(whole), whole[1:3])
    assert shard_of(part).sizes == (2, 3)


def test_without_a_mark_a_parameter_is_whole() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    assert shard_of(parameter) == ShardedAxis((4, 3), None, is_owner=True)
    assert shard_of(parameter).cut(parameter) is parameter
