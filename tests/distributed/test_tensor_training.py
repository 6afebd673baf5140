"""Training over a tensor or context group equals training on one rank: losses, norms, final masters and moments.

Tolerances, fp32, five steps: 1e-5 relative for losses and norms, since the layouts add the same numbers in another
order, which fp32 rounds at 6e-8. Weights: 2e-4 absolute at a peak rate of 3e-3, because Adam moves a weight by about
the rate whatever its gradient, so a gradient that is all rounding may move it differently; the mean difference must
stay below 1e-6. A bias on all keys changes no softmax: its gradient is rounding alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.selection import selected
from tests.distributed.training import Case, Trace, assert_same_state, make_dataset, train_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 5
MODELS = {
    "gpt2": ("model.style=gpt2", "model.tie_word_embeddings=true", "data.packing=best_fit"),
    "gpt2 untied": ("model.style=gpt2",),
    # and a batch and a sequence length that grow
    "llama gqa": (
        "model.num_key_value_heads=2",
        "schedule.batch=[{from_step: 3, sequences: 48}]",
        "data.sequence_length=12",
        "data.stages=[{from_step: 4, sequence_length: 24}]",
    ),
    "llama frozen": (
        "train.ema_decay=0.6",
        "train.parameter_groups=[{match: embedding.*, frozen: true}, {match: layers.0.*, frozen: true}, "
        "{match: layers.1.attention.*ey.*, frozen: true}, {match: '*.up.*', frozen: true}, {match: '*output*', "
        "frozen: true}, {match: '*.mlp_norm.*', frozen: true}]",
    ),
    "llama one kv head": ("model.num_key_value_heads=1", "model.tie_word_embeddings=true"),
}


def _zero(stage: int) -> Case:
    settings = {"zero_optimization": {"stage": 0}} if stage == 0 else {}
    if stage == 3:
        settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return Case(f"zero{max(stage, 1)}.json", settings=settings)


def _with(case: Case, *overrides: str) -> Case:
    return Case(case.json, case.precision, (*case.overrides, *overrides), case.settings)


TENSOR, SEQUENCE = ("parallel.tensor=2",), ("parallel.tensor=2", "parallel.sequence=true")
CONTEXT, RING = ("parallel.context=2",), ("parallel.context=2", "parallel.context_method=ring")
NAMES = {TENSOR: "", SEQUENCE: ", sequence", CONTEXT: ", context", RING: ", ring"}
CASES = {
    f"{model}, ZeRO {stage}{NAMES[layout]}": (
        model,
        _with(_zero(stage), *MODELS[model], *layout),
    )
    for model, stage, layout in (
        ("gpt2", 0, TENSOR),
        ("gpt2", 1, TENSOR),
        ("gpt2", 1, SEQUENCE),
        ("gpt2 untied", 2, SEQUENCE),
        ("gpt2", 3, SEQUENCE),
        ("llama gqa", 0, SEQUENCE),
        ("llama gqa", 2, TENSOR),
        ("llama gqa", 3, TENSOR),
        ("llama frozen", 0, SEQUENCE),
        ("llama frozen", 2, TENSOR),
        ("llama frozen", 3, SEQUENCE),
        ("llama one kv head", 0, TENSOR),
        ("llama one kv head", 1, SEQUENCE),
        ("llama one kv head", 3, TENSOR),
        ("gpt2", 1, CONTEXT),
        ("gpt2", 2, RING),
        ("llama gqa", 3, CONTEXT),
        ("llama gqa", 1, RING),
        ("llama frozen", 2, CONTEXT),
    )
}


# test_parity_matrix.py has the other stages and models on tensor and data parallelism together.
ON_FOUR_RANKS = (
    "gpt2, ZeRO 1",
    "gpt2 untied, ZeRO 2, sequence",
    "llama gqa, ZeRO 0, sequence",
    "llama one kv head, ZeRO 3",
)


@pytest.fixture(scope="module")
def traces(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Trace]]]:
    folder = tmp_path_factory.mktemp("tensor")
    make_dataset(folder / "data", marked=True)
    cases: dict[int, dict[str, Case]] = {1: {name: _with(_zero(1), *words) for name, words in MODELS.items()}}
    for name, world_size in selected(request, "name", "world_size"):
        cases.setdefault(world_size, {})[name] = CASES[name][1]
    return {size: run_ranks(size, train_cases, folder / "data", folder, cases[size], STEPS) for size in cases}


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, size, marks=[pytest.mark.slow] if size == 4 and name not in ON_FOUR_RANKS else [])
        for name in CASES
        for size in (2, 4)
    ],
)
def test_equal_to_one_rank(traces: dict[int, list[dict[str, Trace]]], name: str, world_size: int) -> None:
    reference = traces[1][0][CASES[name][0]]
    ranks = [trace[name] for trace in traces[world_size]]
    for trace in ranks:
        np.testing.assert_allclose(trace.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(trace.norms, reference.norms, rtol=1e-5)
    assert_same_state(ranks, reference)
