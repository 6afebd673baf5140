"""Experts divided over ranks: what the parity matrix has no row of, and checkpoints from one layout to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.model.layer_factory import ALL_EXPERTS, AllExperts, LayerFactory
from megalm.model.modules import DropoutClock
from megalm.model.moe import Experts
from megalm.parallel.expert_parallel import DividedExperts
from megalm.parallel.process_groups import make_groups
from megalm.parity.state_comparison import (
    TOLERANCES,
    Outcome,
    Trace,
    difference,
    differing,
    relative,
    state_difference,
    whole_state,
)
from megalm.topology import Topology
from tests.distributed.parity import NO_CAPACITY, SEQUENCES, STEPS, Row, train, train_rows
from tests.distributed.training import Case, make_dataset, resolved, shape_of, snapshot, start, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

MODEL = "composed MQA untied"
HALF, END = 2, 4


def _with(row: Row, *overrides: str) -> tuple[Case, Case]:
    """The row, and one rank, with further settings."""
    own, alone = row.case(), row.reference_case()
    return replace(own, overrides=(*own.overrides, *overrides)), replace(
        alone, overrides=(*alone.overrides, *overrides)
    )


_EVERY_BLOCK = "train.checkpoint_activations_every=0"
_FROZEN = "train.parameter_groups=[{match: layers.1.mlp.experts.down, frozen: true}]"
_ALL_FROZEN = "train.parameter_groups=[{match: layers.*.mlp.experts.*, frozen: true}]"
_SLOWER = "train.parameter_groups=[{match: layers.*.mlp.experts.up, learning_rate_scale: 0.5, weight_decay: 0}]"
_FP16 = Row("ep2", MODEL, 2, "fp16", job=("train.router_aux_loss=2", *NO_CAPACITY))
_FP32 = replace(_FP16, precision="fp32").reference_case()  # with a smaller batch than fp16's
JOBS = {
    "one kind frozen, averaged": (Row("ep2", MODEL, 1), *_with(Row("ep2", MODEL, 1), _FROZEN, "train.ema_decay=0.6")),
    "all frozen, ZeRO 3": (Row("ep2", MODEL, 3), *_with(Row("ep2", MODEL, 3), _ALL_FROZEN)),
    "groups by name, reduced once, Muon": (
        Row("ep2", MODEL, 2, muon=True),
        *_with(Row("ep2", MODEL, 2, muon=True), _SLOWER, "train.reduce_gradients=step"),
    ),
    "fp16": (
        _FP16,
        _FP16.case(),
        replace(_FP32, settings={**_FP32.settings, "train_batch_size": SEQUENCES["fp16"]}),
    ),
    "8-bit states, recomputed": (
        Row("ep2", MODEL, 1, states="8bit"),
        *_with(Row("ep2", MODEL, 1, states="8bit"), "train.recompute=full", _EVERY_BLOCK, *NO_CAPACITY),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    make_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, tuple[list[Outcome], Outcome]]:
    (alone,) = run_ranks(1, train_rows, {name: job[2] for name, job in JOBS.items()}, data / "data", data)
    ranks = run_ranks(2, train_rows, {name: job[1] for name, job in JOBS.items()}, data / "data", data)
    return {name: ([rank[name] for rank in ranks], alone[name]) for name in JOBS}


def test_in_fp16_the_loss_scale_multiplies_the_losses_of_routers(
    found: dict[str, tuple[list[Outcome], Outcome]],
) -> None:
    """As near to fp32 as rounding leaves it; without the scale nothing would be left of the balance loss's gradient."""
    ranks, alone = found["fp16"]
    trained, expected = whole_state([rank.trained for rank in ranks]), whole_state([alone.trained])
    assert relative(ranks[0].trained.losses, alone.trained.losses[:STEPS]) < 1e-3
    key: Any = ("layers.1.mlp.router.weight", "exp_avg")
    assert np.linalg.norm(trained[key] - expected[key]) < 0.1 * np.linalg.norm(expected[key])


@pytest.mark.parametrize("name", [name for name in JOBS if name != "fp16"])
def test_equal_to_one_rank(name: str, found: dict[str, tuple[list[Outcome], Outcome]]) -> None:
    ranks, alone = found[name]
    tolerance = JOBS[name][0].tolerance
    if JOBS[name][0].states != "fp32":  # what is rounded sends a token elsewhere: losses without the routing
        alone.trained.losses = alone.trained.losses[:STEPS]
        tolerance = replace(tolerance, norm=TOLERANCES["bf16"].norm)
    assert not difference(ranks, alone).beyond(tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_states_are_equal_to_one_rank(stage: int, data: Path) -> None:
    row = Row("ep2", MODEL, stage, offloaded=True)
    (alone,) = run_ranks(1, train, row.reference_case(), data / "data", data)
    ranks = run_ranks(2, train, row.case(), data / "data", data)
    assert not difference(ranks, alone).beyond(row.tolerance)


def _continued(
    comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path, path: Path
) -> tuple[Trace, Trace]:
    """The state as restored, and after some further steps."""
    engine, run, loader = start(comm, device, case, prefix, folder, initial_weights=False)
    reader = CheckpointReader(path)
    engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
    restored = Trace([], [], snapshot(engine))
    return restored, steps(engine, run, loader, HALF + 1, END)


def _saved_and_continued(
    comm: Any, device: torch.device, prefix: Path, folder: Path
) -> tuple[Path, Trace, Trace, Trace]:
    engine, run, loader = start(comm, device, Row("ep4", MODEL, 2).case(), prefix, folder)
    trained = steps(engine, run, loader, 1, HALF)
    facts = {"step": HALF, "tokens": 0, "counters": engine.counters()}
    path = save_checkpoint(folder, HALF, engine.fragments(), facts, [], comm)
    return path, trained, *_continued(comm, device, Row("tp2 x ep2", MODEL, 3).case(), prefix, folder, path)


def test_a_checkpoint_goes_to_other_expert_groups_and_to_one_rank(data: Path) -> None:
    ranks = run_ranks(4, _saved_and_continued, data / "data", data)
    path = ranks[0][0]
    case = Row("ep4", MODEL, 2).reference_case()
    ((restored, alone),) = run_ranks(1, _continued, case, data / "data", data, path)
    saved = whole_state([trained for _, trained, _, _ in ranks])
    assert differing(whole_state([restored]), saved) == 0
    assert differing(whole_state([there for _, _, there, _ in ranks]), saved) == 0
    continued = whole_state([trained for _, _, _, trained in ranks])
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert state_difference(continued, whole_state([alone]), kind) < 1e-5
    for _, _, _, trained in ranks:
        assert relative(trained.losses, alone.losses) < 1e-5
        assert relative(trained.norms, alone.norms) < 1e-5


def _routed(comm: Any, device: torch.device, shape: Any, chosen: list[list[int]]) -> list[Any]:
    """What experts make of each rank's tokens, and gradients of tokens and of the experts held here."""
    group = make_groups(Topology(comm.size, expert=comm.size), comm.rank, comm.timeout).expert
    results: list[Tensor] = []
    for held in (DividedExperts(group), ALL_EXPERTS):
        layers = LayerFactory(DropoutClock(0))
        layers.experts = held
        experts = Experts(shape, layers)
        results += _product(experts, held, chosen[comm.rank], comm.rank)
    return [result.numpy() for result in results]


def _product(experts: Experts, held: AllExperts, chosen: list[int], rank: int) -> list[Tensor]:
    first, last = held.held(4)
    with torch.no_grad():
        for index, parameter in enumerate(experts.parameters()):
            generator = torch.Generator().manual_seed(index)
            whole = torch.randn(4, *parameter.shape[1:], generator=generator) / 8
            parameter.copy_(whole[first:last])
    tokens = torch.randn(len(chosen), 32, generator=torch.Generator().manual_seed(9 + rank)).requires_grad_()
    numbers = torch.tensor(chosen).unsqueeze(1)
    counts = torch.bincount(numbers.flatten(), minlength=4)
    outputs = experts(tokens, numbers, torch.ones(len(chosen), 1), counts)
    outputs.square().sum().backward()
    assert tokens.grad is not None
    gradients = []
    for parameter in experts.parameters():
        assert parameter.grad is not None, "an expert without tokens needs a gradient, which is zero"
        gradients.append(parameter.grad)
    return [outputs.detach(), tokens.grad, *gradients]


@pytest.mark.parametrize("chosen", [[[0, 1, 1], [1, 0]], [[3], [3, 3]], [[0, 3, 2], [1]]])
def test_ranks_whose_experts_get_no_tokens_have_gradients_of_zero(chosen: list[list[int]], tmp_path: Path) -> None:
    shape = shape_of_experts(tmp_path)
    ranks = run_ranks(2, _routed, shape, chosen)
    count = len(ranks[0]) // 2
    for rank, found in enumerate(ranks):
        for divided, whole in zip(found[:2], found[count : count + 2], strict=True):
            np.testing.assert_allclose(divided, whole, rtol=1e-5, atol=1e-5)
        for place in range(2, count):
            both = ranks[0][count + place] + ranks[1][count + place]
            np.testing.assert_allclose(found[place], both[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)


def shape_of_experts(folder: Path) -> Any:
    return shape_of(resolved(Row("ep2", MODEL, 1).case(), 2, folder))
