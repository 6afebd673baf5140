"""Frozen weights keep what a checkpoint has in fp32, whatever the precision that a run computes in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.checkpoint.shard_spec import FragmentKey
from megalm.engine.optimizer.optimizer_state import FrozenWeights
from megalm.model.layer_factory import ShardedAxis
from megalm.parallel.process_groups import AxisGroup

SHAPE = (5, 3)
RANKS = 2
GROUP: Any = None  # nothing communicates


def loaded(values: Tensor, dtype: torch.dtype, divided: bool) -> list[tuple[FrozenWeights, nn.Parameter]]:
    """Each rank's weights after a restore from `values`; `divided`: as ZeRO 3 leaves a parameter."""
    ranks = []
    for index in range(RANKS):
        parameter = nn.Parameter(torch.zeros(SHAPE, dtype=dtype), requires_grad=False)
        if divided:
            parameter.ds_tensor = torch.zeros(math.ceil(values.numel() / RANKS), dtype=dtype)  # type: ignore[attr-defined]
        group = AxisGroup(tuple(range(RANKS)), index, GROUP)
        weights = FrozenWeights({"w": parameter}, {"w": ShardedAxis(SHAPE, None, is_owner=True)}, {"w": group})
        weights.load(lambda key: values.view(-1)[key.start : key.stop])
        ranks.append((weights, parameter))
    return ranks


def saved(ranks: list[tuple[FrozenWeights, nn.Parameter]]) -> Tensor:
    fragments = [fragment for weights, _ in ranks for fragment in weights.fragments()]
    assert [(it.key.start, it.key.stop) for it in fragments] == [(0, 8), (8, 15)]
    assert all(it.key == FragmentKey("w", "master", SHAPE, it.key.start, it.key.stop) for it in fragments)
    return torch.cat([it.tensor for it in fragments]).view(SHAPE)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_values_survive_a_restore_and_a_save(dtype: torch.dtype, divided: bool) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ranks = loaded(values, dtype, divided)
    assert torch.equal(saved(ranks), values)
    for index, (_, parameter) in enumerate(ranks):
        own = parameter.ds_tensor if divided else parameter.view(-1)  # type: ignore[attr-defined]
        expected = values.view(-1)[8 * index : 8 * index + 8] if divided else values.view(-1)
        assert torch.equal(own[: len(expected)], expected.to(dtype))


def test_values_of_16_bits_are_kept_once() -> None:
    """After a checkpoint with other numbers, too."""
    exact = torch.randn(SHAPE).bfloat16().float()
    ((weights, _), *_) = loaded(exact + 1e-4, torch.bfloat16, divided=False)
    assert weights._unrounded
    weights.load(lambda key: exact.view(-1)[key.start : key.stop])
    assert not weights._unrounded
