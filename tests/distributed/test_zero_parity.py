"""Every ZeRO stage on 1, 2 and 4 ranks trains the same model as ZeRO 1 on one rank.

On every change four ranks train each stage once; their other cases are `slow`.

Tolerances: fp32, 1e-5 relative over 20 steps for losses and gradient norms: the layouts add the same numbers in
another order, which fp32 rounds at 6e-8, and Adam amplifies. Weights: 2e-4 absolute, a fifth of one step's largest
change at the peak rate of 1e-3 (Adam moves a weight by about the rate whatever its gradient, so a gradient that is
all rounding may move it differently); the mean difference must stay below 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.selection import selected
from tests.distributed.training import Case, Trace, assert_same_state, make_dataset, train_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 20
REFERENCE = Case("zero1.json")
GPT2 = ("model.style=gpt2", "data.document_mask=true")
CASES = {
    "zero0": Case("zero1.json", settings={"zero_optimization": {"stage": 0}}),
    "zero1": Case("zero1.json"),
    "zero2": Case("zero2.json"),
    "zero3": Case("zero3.json"),
    "zero3 persistent": Case(
        "zero3.json",
        overrides=("train.recompute=attention",),
        settings={"zero_optimization": {"stage3_param_persistence_threshold": 100_000}},
    ),
    "fp32.json": Case("fp32.json"),
    "zero2 accumulated": Case("zero2.json", settings={"train_micro_batch_size_per_gpu": 2}),
    "zero2 accumulated by micro-batch": Case(
        "zero2.json",
        overrides=("train.reduce_gradients=micro_batch",),
        settings={"train_micro_batch_size_per_gpu": 2},
    ),
    "zero2 recomputed": Case("zero2.json", overrides=("train.checkpoint_activations_every=1",)),
    "gpt2 zero1": Case("zero1.json", overrides=GPT2),
    "gpt2 zero3 accumulated": Case("zero3.json", overrides=GPT2, settings={"train_micro_batch_size_per_gpu": 2}),
    "gpt2 zero2": Case("zero2.json", overrides=GPT2),
}
ON_FOUR_RANKS = ("zero0", "zero1", "gpt2 zero2", "gpt2 zero3 accumulated")


@pytest.fixture(scope="module")
def traces(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Trace]]]:
    folder = tmp_path_factory.mktemp("parity")
    make_dataset(folder / "data")
    cases = {1: {name: CASES[name] for name in ("zero1", "gpt2 zero1")}}
    for name, world_size in selected(request, "name", "world_size"):
        cases.setdefault(world_size, {})[name] = CASES[name]
    for world_size in cases:
        (folder / str(world_size)).mkdir()
    return {
        size: run_ranks(size, train_cases, folder / "data", folder / str(size), cases[size], STEPS) for size in cases
    }


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, size, marks=[pytest.mark.slow] if size == 4 and name not in ON_FOUR_RANKS else [])
        for name in CASES
        for size in (1, 2, 4)
    ],
)
def test_equal_to_one_rank(traces: dict[int, list[dict[str, Trace]]], name: str, world_size: int) -> None:
    reference = traces[1][0]["gpt2 zero1" if name.startswith("gpt2") else "zero1"]
    ranks = [trace[name] for trace in traces[world_size]]
    for trace in ranks:
        np.testing.assert_allclose(trace.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(trace.norms, reference.norms, rtol=1e-4)
    assert_same_state(ranks, reference)


def test_it_learns(traces: dict[int, list[dict[str, Trace]]]) -> None:
    """Equal to a reference that stands still would prove nothing."""
    losses = traces[1][0]["zero1"].losses
    assert losses[-1] < losses[0] - 0.5
