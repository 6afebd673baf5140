"""A refused step leaves no trace: on every ZeRO stage, fp32 and bf16, offloaded too, on 1 and 2 ranks.

The property: steps 1..k-1, k refused, k+1..n end in the state of 1..k-1, k+1..n, bit for bit (masters, both moments,
average of the weights, step count), where every step keeps its own number and learning rate.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.engine.interface import Finding, UpdateVerdict
from megalm.planning.lr_schedule import learning_rate
from tests.distributed.training import Case, make_dataset, snapshot, start
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# Many sub-groups: each of them asks, and all must get the first one's answer.
SMALL_SUB_GROUPS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 2000}}
EXPERTS = ("model.num_experts=4", "model.moe_intermediate_size=24", "model.expert_bias=true")
AVERAGED = ("train.ema_decay=0.9",)
CASES = {
    "zero0": Case("zero1.json", overrides=AVERAGED, settings={"zero_optimization": {"stage": 0}}),
    "zero1": Case("zero1.json", overrides=EXPERTS, settings={"train_micro_batch_size_per_gpu": 4}),
    "zero2": Case("zero2.json", overrides=AVERAGED),
    "zero3": Case("zero3.json", overrides=AVERAGED, settings=SMALL_SUB_GROUPS),
    "zero1 bf16": Case("zero1.json", "bf16", AVERAGED),
    "zero2 bf16": Case("zero2.json", "bf16", settings={"train_micro_batch_size_per_gpu": 4}),  # whole gradients
    "zero3 bf16": Case("zero3.json", "bf16", AVERAGED, NO_PERSISTENCE),
    "zero2 offload": Case("zero2_offload.json", overrides=AVERAGED),
}
# One data-parallel rank of two tensor-parallel ones: what each owns is a part of every parameter.
TENSOR = {"zero1 tp2": Case("zero1.json", overrides=("parallel.tensor=2", *AVERAGED))}
CASES_ON = {1: CASES, 2: CASES | TENSOR}
EVERY = [(name, world_size) for world_size, cases in CASES_ON.items() for name in cases]
STEPS, REFUSED = 5, 3


def _work(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: refuse_and_leave_out(comm, device, case, prefix, folder) for name, case in CASES_ON[comm.size].items()
    }


def refuse_and_leave_out(comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path) -> dict[str, Any]:
    asked: list[tuple[float, float]] = []
    refuses = False

    def judge(loss: float, norm: float) -> UpdateVerdict:
        asked.append((loss, norm))
        finding = Finding("loss", loss) if refuses and comm.rank == 0 else None  # the others join in its refusal
        return UpdateVerdict(refuses=finding is not None, finding=finding)

    engine, run, loader = start(comm, device, case, prefix, folder, judge)
    results, around = [], {}

    def take(step: int) -> None:
        batch = loader.batch((step - 1) * run.batch.global_batch)
        results.append(engine.train_step(batch, step, learning_rate(run.schedule, step)))

    for step in range(1, STEPS + 1):
        if step == REFUSED:
            around["before"] = _everything(engine)
            if run.config.evaluates_ema:
                with engine.averaged_weights():
                    around["averaged"] = _everything(engine)
        refuses = step == REFUSED
        take(step)
        if step == REFUSED:
            around["after"] = _everything(engine)
    with_refusal, answers, asked_for = _everything(engine), list(results), list(asked)
    engine, run, loader = start(comm, device, case, prefix, folder, judge)
    # The first step is refused once, which the rest must not notice, and taken then.
    refuses = True
    take(1)
    gradients = engine.refused_gradients()
    refuses = False
    for step in range(1, STEPS + 1):
        if step != REFUSED:
            take(step)
        if step == 1:
            first_moments = [(key, values) for key, values in snapshot(engine) if key.kind == "exp_avg"]
    return {
        "gradients": gradients,
        "first norm": answers[0].grad_norm,
        "first moments": first_moments,
        "asked": asked_for,
        "answers": answers,
        **around,
        "averages": run.config.evaluates_ema,
        "with refusal": with_refusal,
        "never seen": _everything(engine),
        "not a number": _poisoned(comm, engine, loader),
    }


def _poisoned(comm: Any, engine: Any, loader: Any) -> dict[str, Any]:
    """A step whose loss is NaN because the first rank's weights are: nothing may move, whatever the judge says."""
    if comm.rank == 0:
        for parameter in engine._engine.module.parameters():
            getattr(parameter, "ds_tensor", parameter).data.fill_(math.nan)
    before = snapshot(engine)
    result = engine.train_step(loader.batch(0), 1, 1e-3)
    return {"result": result, "before": before, "after": snapshot(engine)}


def _everything(engine: Any) -> dict[str, Any]:
    low = [
        (parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter).detach().float().numpy().copy()
        for parameter in engine._engine.module.parameters()
    ]
    return {"state": snapshot(engine), "low": low, "updates": engine.counters()["optimizer_step"]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("check")
    make_dataset(folder / "data")
    result = {}
    for world_size in (1, 2):
        (here := folder / str(world_size)).mkdir()
        result[world_size] = run_ranks(world_size, _work, folder / "data", here)
    return result


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["updates"] == second["updates"]
    for (key, values), (other_key, others) in zip(first["state"], second["state"], strict=True):
        assert key == other_key
        assert np.array_equal(values, others), (key.name, key.kind)
    for values, others in zip(first["low"], second["low"], strict=True):
        assert np.array_equal(values, others)


def assert_exchanged(before: dict[str, Any], inside: dict[str, Any]) -> None:
    """The average is where the weights were, and the model computes with it."""
    states = [{(key.name, key.kind): values for key, values in found["state"]} for found in (before, inside)]
    for name in {name for name, _ in states[0]}:
        for kind, other in (("master", "ema"), ("ema", "master"), ("exp_avg", "exp_avg")):
            assert np.array_equal(states[1][name, kind], states[0][name, other]), (name, kind)
    assert not all(np.array_equal(values, others) for values, others in zip(before["low"], inside["low"], strict=True))


@pytest.mark.parametrize(("name", "world_size"), EVERY)
def test_a_refused_step_leaves_no_trace(ranks: Any, name: str, world_size: int) -> None:
    """Nor does a validation of the average of the weights before it."""
    for found in (rank[name] for rank in ranks[world_size]):
        assert_same(found["before"], found["after"])
        assert_same(found["with refusal"], found["never seen"])
        assert found["with refusal"]["updates"] == STEPS - 1
        assert [answer.refused for answer in found["answers"]] == [step == REFUSED for step in range(1, STEPS + 1)]
        # Asked once a step, though the optimizer is stepped for every group, with what the step then reports.
        assert found["asked"] == [(answer.loss, answer.grad_norm) for answer in found["answers"]]
        if found["averages"]:
            assert_exchanged(found["before"], found["averaged"])
    # Each rank keeps what it found itself; the refusal is everybody's.
    findings = [rank[name]["answers"][REFUSED - 1].verdict.finding for rank in ranks[world_size]]
    assert [finding is not None for finding in findings] == [rank == 0 for rank in range(world_size)]


@pytest.mark.parametrize(("name", "world_size"), EVERY)
def test_what_is_no_number_is_never_applied(ranks: Any, name: str, world_size: int) -> None:
    for rank in ranks[world_size]:
        found = rank[name]["not a number"]
        assert found["result"].refused
        assert not found["result"].skipped
        assert math.isnan(found["result"].loss)
        for (key, values), (_, others) in zip(found["before"], found["after"], strict=True):
            assert np.array_equal(values, others, equal_nan=True), (key.name, key.kind)


@pytest.mark.parametrize(("name", "world_size"), EVERY)
def test_a_refused_gradient_is_reported_by_parameter(ranks: Any, name: str, world_size: int) -> None:
    """Adam's first moment after one step is a tenth of the clipped gradient: the shares must be the same.

    Tolerance: the squares are added up in another order, in fp64, from fp32 numbers.
    """
    squares: dict[str, float] = {}
    for rank in ranks[world_size]:
        for key, values in rank[name]["first moments"]:
            squares[key.name] = squares.get(key.name, 0.0) + float(np.square(values, dtype=np.float64).sum())
    whole = sum(squares.values())
    for found in (rank[name] for rank in ranks[world_size]):
        told = found["gradients"]
        assert told.keys() == squares.keys()
        for parameter, square in squares.items():
            expected = found["first norm"] * math.sqrt(square / whole)
            assert told[parameter] == pytest.approx(expected, rel=1e-5, abs=1e-9), parameter
