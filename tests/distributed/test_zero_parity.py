"""Every ZeRO stage on 1, 2 and 4 ranks trains the same model as ZeRO 1 on one rank.

On every change four ranks train each stage once; their other cases are `slow`.

Tolerances: fp32, 1e-5 relative over 6 steps for losses and gradient norms: the layouts add the same numbers in
another order, which fp32 rounds at 6e-8, and Adam amplifies. Weights: 2e-4 absolute, a fifth of one step's largest
change at the peak rate of 1e-3 (Adam moves a weight by about the rate whatever its gradient, so a gradient that is
all rounding may move it differently); the mean difference must stay below 1e-6.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import TrainingSamples
from megalm.model.transformer import LanguageModel, initialize
from megalm.parity.state_comparison import State
from megalm.planning.lr_schedule import learning_rate
from tests.distributed.selection import selected
from tests.distributed.training import (
    Case,
    Trace,
    assert_same_state,
    make_dataset,
    resolved,
    shape_of,
    train_cases,
    whole_state,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 6
REFERENCE = Case("zero1.json")
GPT2 = ("model.style=gpt2", "data.packing=best_fit")  # a mixture, under a document mask, with padding
CASES = {
    "zero0": Case("zero1.json", settings={"zero_optimization": {"stage": 0}}),
    "zero1": Case("zero1.json"),
    "zero2": Case("zero2.json"),
    "zero3": Case("zero3.json"),
    "zero3 persistent": Case(
        "zero3.json",
        overrides=("train.recompute=attention", "train.mlp_chunk_tokens=20"),
        settings={"zero_optimization": {"stage3_param_persistence_threshold": 100_000}},
    ),
    "fp32.json": Case("fp32.json"),
    "zero2 accumulated": Case("zero2.json", settings={"train_micro_batch_size_per_gpu": 2}),
    "zero2 accumulated by micro-batch": Case(
        "zero2.json",
        overrides=("train.reduce_gradients=micro_batch",),
        settings={"train_micro_batch_size_per_gpu": 2},
    ),
    "zero2 recomputed": Case(
        "zero2.json",
        overrides=("train.recompute=full", "train.mlp_chunk_tokens=20", "train.offload_activations=true"),
    ),
    "gpt2 zero1": Case("zero1.json", overrides=GPT2),
    "gpt2 zero3 accumulated": Case("zero3.json", overrides=GPT2, settings={"train_micro_batch_size_per_gpu": 2}),
    "gpt2 zero2": Case("zero2.json", overrides=GPT2),
}
# Pattern -> factor of the learning rate, weight decay. With heads of two elements, a group's second part is padding.
GROUPS = {"layers.1.attention.query_norm.*": (0.1, 0.0), "embedding.*": (0.25, 0.0), "*.mlp.*": (2.0, 0.5)}
_RULES = [f"{{match: '{name}', learning_rate_scale: {it[0]}, weight_decay: {it[1]}}}" for name, it in GROUPS.items()]
DECAY = 0.6
AVERAGED = f"train.ema_decay={DECAY}"
# Below the lowest parameter that trains, beside it and above it.
FROZEN = (
    "embedding.*",
    "layers.0.*",
    "layers.1.attention.query.*",
    "layers.1.mlp.up.*",
    "layers.1.mlp_norm.*",
    "head.*",
)
_STILL = [f"{{match: '{name}', frozen: true}}" for name in FROZEN]
STILL = ("model.head_dim=2", AVERAGED, f"train.parameter_groups=[{', '.join(_STILL)}]", "train.recompute=norms")
# And a batch that grows, on two ranks from one micro-batch to two and three, and shrinks; and a sequence length.
GROWS = (
    "schedule.batch=[{from_step: 2, sequences: 32}, {from_step: 3, sequences: 48}, {from_step: 6, sequences: 32}]",
    "data.sequence_length=12",
    "data.stages=[{from_step: 4, sequence_length: 24}]",
)
GROUPED = ("model.head_dim=2", AVERAGED, f"train.parameter_groups=[{', '.join(_RULES)}]", *GROWS)
MICRO_BATCH = {"train_micro_batch_size_per_gpu": 8}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
CASES |= {
    "groups zero0": Case("zero1.json", overrides=GROUPED, settings={"zero_optimization": {"stage": 0}} | MICRO_BATCH),
    "groups zero1": Case("zero1.json", overrides=GROUPED, settings=MICRO_BATCH),
    "groups zero2": Case("zero2.json", overrides=GROUPED, settings=MICRO_BATCH),
    "groups zero2 offloaded": Case("zero2.json", overrides=GROUPED, settings=OFFLOAD | MICRO_BATCH),
    "groups zero3": Case("zero3.json", overrides=GROUPED, settings=MICRO_BATCH),
    "frozen zero0": Case("zero1.json", overrides=STILL, settings={"zero_optimization": {"stage": 0}}),
    "frozen zero2 accumulated": Case("zero2.json", overrides=STILL, settings={"train_micro_batch_size_per_gpu": 2}),
    "frozen zero3 offloaded": Case("zero3.json", overrides=STILL, settings=OFFLOAD),
}
ON_MORE_RANKS = {
    # Pairs of ranks share a second copy; four micro-batches a step on two ranks gather most weights from it.
    "zero3 hpz": Case(
        "zero3.json",
        settings={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
        },
    )
}
CASES |= ON_MORE_RANKS
ON_FOUR_RANKS = ("zero0", "zero1", "gpt2 zero2", "gpt2 zero3 accumulated", "zero3 hpz")


@pytest.fixture(scope="module")
def traces(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Trace]]]:
    folder = tmp_path_factory.mktemp("parity")
    make_dataset(folder / "data", marked=True)
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
        if not name.startswith(("groups", "frozen")) and not (size == 1 and name in ON_MORE_RANKS)
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
    assert losses[-1] < losses[0] - 0.2


@pytest.fixture(scope="module")
def plain_adamw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trace, State]]:
    folder = tmp_path_factory.mktemp("plain")
    make_dataset(folder / "data", marked=True)
    return {kind: _plain_adamw(kind, folder) for kind in ("groups", "frozen")}


def _plain_adamw(kind: str, folder: Path) -> tuple[Trace, State]:
    """The steps of the cases of a kind with torch's AdamW alone, each parameter a group; and the state after them."""
    run = resolved(CASES[f"{kind} zero0"], 1, folder)
    shape, facts, batch = shape_of(run), run.optimizer, run.batch
    model = LanguageModel(shape)
    initialize(model, shape, run.config.train.seed)
    samples = TrainingSamples(IndexedDataset(folder / "data"), (0, 200), run.config.data.sample_length, seed=5)
    loader = BatchLoader(samples, BatchLayout(batch.global_batch, batch.micro_batch, 0, 1))
    for name, weight in model.named_parameters():
        weight.requires_grad_(kind == "groups" or not any(fnmatchcase(name, pattern) for pattern in FROZEN))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def of(name: str) -> tuple[float, float]:
        default = (1.0, facts.weight_decay if weights[name].dim() >= 2 else 0.0)
        rules = GROUPS if kind == "groups" else {}
        return next((settings for pattern, settings in rules.items() if fnmatchcase(name, pattern)), default)

    groups = [{"params": [weight], "weight_decay": of(name)[1]} for name, weight in weights.items()]
    optimizer = torch.optim.AdamW(groups, betas=facts.betas, eps=facts.epsilon)
    losses, norms = [], []
    averages = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in range(1, STEPS + 1):
        stage = run.stages.at(step)
        read = loader.batch(run.stages.samples(step - 1), [(stage.samples, stage.parts)])
        total = torch.zeros(())
        for micro in read.micro_batches:
            total = total + model(torch.from_numpy(micro.tokens), torch.from_numpy(micro.labels))[0] / read.target_count
        total.backward()
        losses.append(float(total.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.deepspeed["gradient_clipping"])))
        for name, group in zip(weights, optimizer.param_groups, strict=True):
            group["lr"] = learning_rate(run.schedule, step) * of(name)[0]
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in weights.items():
            averages[name] = DECAY * averages[name] + (1 - DECAY) * weight.detach()
    loader.close()
    after: State = {(name, "master"): weight.detach().numpy().reshape(-1) for name, weight in model.named_parameters()}
    after |= {(name, "ema"): average.numpy().reshape(-1) for name, average in averages.items()}
    return Trace(losses, norms, []), after


_GROUPED_CASES = [(name, 2) for name in CASES if name.startswith(("groups", "frozen"))]


@pytest.mark.parametrize(("name", "world_size"), _GROUPED_CASES)
def test_parameter_groups_and_growing_steps_are_adamw_s(
    traces: dict[int, list[dict[str, Trace]]],
    plain_adamw: dict[str, tuple[Trace, State]],
    name: str,
    world_size: int,
) -> None:
    kind = name.split(maxsplit=1)[0]
    reference, weights = plain_adamw[kind]
    ranks = [trace[name] for trace in traces[world_size]]
    np.testing.assert_allclose(ranks[0].losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(ranks[0].norms, reference.norms, rtol=1e-4)
    state = whole_state(ranks)
    without_moments = {parameter for parameter, part in state if part == "master"} - {
        parameter for parameter, part in state if part == "exp_avg"
    }
    patterns = FROZEN if kind == "frozen" else ()
    assert without_moments == {it for it, _ in weights if any(fnmatchcase(it, pattern) for pattern in patterns)}
    assert {place for place in state if place[1] in ("master", "ema")} == weights.keys()
    for place, values in weights.items():
        difference = np.abs(state[place] - values)
        assert difference.max() < 2e-4, place
        assert difference.mean() < 1e-6, place
