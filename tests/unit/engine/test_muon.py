"""Muon's arithmetic against torch's, bit by bit, and how its work is shared out."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch

from megalm.engine.optimizer import muon
from megalm.engine.optimizer.muon import Muon, orthogonalize, rate_factor, share_out
from megalm.engine.optimizer.optimizer_state import OwnedRange
from megalm.model.layer_factory import ShardedAxis
from megalm.model.parameter_groups import MOMENTS
from megalm.parallel.process_groups import AxisGroup, ParallelGroups
from megalm.planning.resolve import MuonFacts, OptimizerFacts
from megalm.topology import Topology

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = {"layers.0.wide": (12, 40), "layers.0.tall": (40, 12), "layers.1.square": (16, 16)}


def _matrices() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_on_one_rank_it_is_torch_s_bit_by_bit(adjust: Any, nesterov: bool) -> None:
    """In bf16: weights and momentum after several steps, and AdamW's beside them. Each expert is a matrix."""
    ours = _matrices()
    ours["layers.1.mlp.experts.up"] = torch.nn.Parameter(
        torch.stack([ours["layers.0.tall"].detach() * i for i in (1, 2)])
    )
    alike = {name: weight.detach().view(-1, *weight.shape[-2:]).unbind() for name, weight in ours.items()}
    theirs = {name: [torch.nn.Parameter(matrix.clone()) for matrix in matrices] for name, matrices in alike.items()}
    norms = [torch.nn.Parameter(torch.ones(7)) for _ in range(2)]
    facts = MuonFacts(0.95, nesterov, COEFFICIENTS, 5, adjust)
    groups: list[dict[str, Any]] = [
        {"params": list(ours.values()), "moments": MOMENTS["muon"], "weight_decay": 0.1, "lr": 0.02},
        {"params": [norms[0]], "moments": MOMENTS["adam"], "weight_decay": 0.0, "lr": 0.003},
    ]
    optimizer = Muon(groups, OptimizerFacts("muon", (0.9, 0.95), 1e-8, 0.1, facts), torch.bfloat16)
    shards = {name: ShardedAxis(tuple(weight.shape), None, is_owner=True) for name, weight in ours.items()}
    owned = [OwnedRange(name, shards[name], 0, weight.numel(), weight, 0) for name, weight in ours.items()]
    alone = AxisGroup((0,), 0, None)  # type: ignore[arg-type]  # one rank sends nothing
    layout = ParallelGroups(Topology(1), Topology(1).coordinate(0), *[alone] * 8)
    optimizer.lay_out([(list(ours.values()), [owned])], layout, is_copied=True)
    expected = torch.optim.Muon(
        chain(*theirs.values()),
        lr=0.02,
        weight_decay=0.1,
        nesterov=nesterov,
        ns_coefficients=COEFFICIENTS,
        adjust_lr_fn=adjust,
    )
    adamw = torch.optim.AdamW([norms[1]], lr=0.003, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        for mine, its in zip([*ours.values(), norms[0]], [*theirs.values(), [norms[1]]], strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            for matrix, gradient in zip(its, mine.grad.clone().view(-1, *its[0].shape), strict=True):
                matrix.grad = gradient
        optimizer.step()
        expected.step()
        adamw.step()
    for name, its in theirs.items():
        mine = ours[name]
        assert torch.equal(mine, torch.stack([*its]).view_as(mine)), name
        buffers = torch.stack([expected.state[matrix]["momentum_buffer"] for matrix in its])
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], buffers.view_as(mine)), name
    assert torch.equal(*norms)


def test_until_it_is_laid_out_a_matrix_stays() -> None:
    """DeepSpeed also steps while it builds its engine."""
    matrices = _matrices()
    groups = [{"params": list(matrices.values()), "moments": MOMENTS["muon"], "weight_decay": 0.1}]
    facts = MuonFacts(0.95, True, COEFFICIENTS, 5, "original")
    optimizer = Muon(groups, OptimizerFacts("muon", (0.9, 0.95), 1e-8, 0.1, facts), torch.float32)
    for matrix in matrices.values():
        matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert all(torch.equal(matrix, its) for matrix, its in zip(matrices.values(), _matrices().values(), strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("shape", SHAPES.values())
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(matrix, COEFFICIENTS, 5)
    left, values, right = torch.linalg.svd(result, full_matrices=False)
    assert 0.6 < values.min() <= values.max() < 1.3
    # The same singular vectors: with all values equal to one it would be the polar factor.
    vectors = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.linalg.norm(left @ right - vectors.U @ vectors.Vh) < 0.05 * math.sqrt(min(shape))
    assert orthogonalize(torch.zeros(shape), COEFFICIENTS, 5).abs().max() == 0


def test_the_work_is_shared_out() -> None:
    """Each matrix has one rank; no rank has more than one matrix above the mean; rounds are small."""
    shapes = {f"layers.{layer}.{name}": shape for layer in range(6) for name, shape in SHAPES.items()}
    for ranks in (1, 4, 50):
        rounds = share_out(shapes, ranks)
        owners = {name: rank for each in rounds for name, rank in each.items()}
        assert owners.keys() == shapes.keys()
        work = [0] * ranks
        for name, rank in owners.items():
            work[rank] += math.prod(shapes[name]) * min(shapes[name])
        assert max(work) - min(work) <= max(math.prod(shape) * min(shape) for shape in shapes.values())
        assert len(rounds) == 1


def test_a_rank_holds_few_matrices_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "MUON_ROUND", 500)
    shapes = {f"layers.{layer}.up": (12, 40) for layer in range(5)}
    rounds = share_out(shapes, 2)
    assert [sorted(each.values()) for each in rounds] == [[0, 1], [0, 1], [0]]


def test_the_rate_follows_the_shape() -> None:
    assert rate_factor("original", 400, 100) == 2.0
    assert rate_factor("original", 100, 400) == 1.0
    assert rate_factor("match_rms_adamw", 100, 400) == rate_factor("match_rms_adamw", 400, 100) == 4.0
