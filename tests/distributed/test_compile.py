"""`compile=true` trains the same model, really compiles, and renames nothing.

A graph break is where compiled code ends and Python goes on. ZeRO 1 and 2 have none; ZeRO 3 gathers and releases each
block's weights around it, in the forward and the backward pass: four a block. Dropout's seeds are an input of the
graph, so that the next step's compile nothing anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.selection import selected
from tests.distributed.training import Case, make_dataset, start, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
MOST_BREAKS = {
    "zero1": 0,
    "zero2 recomputed": 0,
    "zero2 recomputed mlp": 0,
    "zero3": 4 * 2,
    "zero1 dropout": 0,
    "zero1 float8": 0,
    "zero1 growing": 0,
}
# Over four steps; torch 2.11 makes one more than 2.13 under ZeRO 3.
MOST_GRAPHS = {
    "zero1": 3,
    "zero2 recomputed": 3,
    "zero2 recomputed mlp": 5,
    "zero3": 5,
    "zero1 dropout": 3,
    "zero1 float8": 3,
    "zero1 growing": 2 * 3,
}
CASES = {
    "zero1": Case("zero1.json"),
    "zero2 recomputed": Case("zero2.json", overrides=("train.checkpoint_activations_every=1",)),
    "zero2 recomputed mlp": Case("zero2.json", overrides=("train.recompute=mlp",)),
    "zero3": Case("zero3.json", settings=NO_PERSISTENCE),
    "zero1 dropout": Case("zero1.json", overrides=("model.dropout=0.1",)),
    "zero1 float8": Case(
        "zero1.json", overrides=("precision.float8=true", "model.intermediate_size=96", "data.sequence_length=32")
    ),
}
CASES["zero1 growing"] = Case(
    "zero1.json",
    overrides=(
        *("data.sequence_length=12", "data.stages=[{from_step: 3, sequence_length: 24}]"),
        "schedule.batch=[{from_step: 2, sequences: 32}]",
    ),
    settings={"train_micro_batch_size_per_gpu": 16},
)
# A number between two of float8 may round the other way, by 2^-4 of it, where fp32 rounds otherwise.
TOLERANCES = {"zero1 float8": 1e-3}
# On every change; g++ takes seconds for each graph. A tensor group's compiled blocks are in test_tensor_parts.py.
FAST = "zero1"


def _compare(comm: Any, device: torch.device, names: list[str], prefix: Path, folder: Path) -> dict[str, Any]:
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    inductor.cpp.simdlen = None  # vectors, as a run has; other tests' ranks compile without (ranks_preload.py)
    found = {}
    for name in names:
        case = CASES[name]
        results = []
        for compiled in (False, True):
            torch._dynamo.reset()
            counters.clear()
            overrides = (*case.overrides, f"compile={str(compiled).lower()}")
            engine, run, loader = start(comm, device, Case(case.json, "fp32", overrides, case.settings), prefix, folder)
            trace = steps(engine, run, loader, 1, 4)
            loader.close()
            parameters = sorted(key.name for key, _ in trace.fragments)
            results.append(
                (trace.losses, parameters, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
            )
        found[name] = results
    return found


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compile")
    make_dataset(folder / "data")
    return run_ranks(1, _compare, selected(request, "name"), folder / "data", folder, timeout_seconds=560)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == FAST else [pytest.mark.slow]) for name in CASES]
)
def test_compiled_equals_eager(results: dict[str, Any], name: str) -> None:
    (eager, names, none, _), (compiled, same_names, graphs, breaks) = results[name]
    np.testing.assert_allclose(compiled, eager, rtol=TOLERANCES.get(name, 1e-5))
    assert same_names == names
    assert none == 0
    assert 2 <= graphs <= MOST_GRAPHS[name], "at least a block and the loss of a chunk; none anew with each step"
    assert breaks <= MOST_BREAKS[name]
