"""Muon on every kind of layout steps whole matrices: as torch.optim.Muon does in one process, AdamW beside it.

An average of the weights follows them, and what is frozen stays as it is.

The reference orthogonalises in fp32, as megalm does for a model in fp32: torch rounds to bf16, which turns the last
bits of a gradient into thousandths of an update. tests/unit/engine/test_muon.py compares bf16 bit by bit.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import TrainingSamples
from megalm.engine.deepspeed_patches import allow_cpu_fp16_for_tests
from megalm.engine.optimizer import muon
from megalm.model.transformer import LanguageModel, initialize
from megalm.planning.engine_checks import ALLOW_CPU_FP16
from megalm.planning.lr_schedule import learning_rate
from tests.distributed.training import (
    Case,
    Trace,
    make_dataset,
    resolved,
    shape_of,
    snapshot,
    start,
    steps,
    whole_state,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

HALF, END = 2, 4
CLIPPING = 0.3
MUON_LR, ADAM_LR, DECAY, MOMENTUM = 0.02, 3e-3, 0.1, 0.9  # Adam's rate is schedule.peak_learning_rate
# In groups of every kind: of Muon with and without a rule, and of Adam; a pipeline's stages have different ones.
RULE = "{match: '*.attention.*', learning_rate_scale: 0.5, weight_decay: 0}"
AVERAGE_DECAY = 0.6
OVERRIDES = (
    "model.num_key_value_heads=1",
    "model.intermediate_size=88",
    "train.embedding_weight_decay=false",
    f"train.ema_decay={AVERAGE_DECAY}",
)
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
# Matrices and others below the lowest parameter that trains and above it; and whole stages of a pipeline.
FROZEN = {
    "none": (),
    "some": ("embedding.*", "layers.0.attention.query.*", "*.mlp.up.*", "layers.1.mlp_norm.*"),
    "stage": ("embedding.*", "layers.0.*"),
}


def _case(stage: int, *overrides: str, precision: str = "fp32", frozen: str = "none", **zero: Any) -> Case:
    rules = [*(f"{{match: '{pattern}', frozen: true}}" for pattern in FROZEN[frozen]), RULE]
    grouped = f"train.parameter_groups=[{', '.join(rules)}]"
    params = {"muon_lr": MUON_LR, "weight_decay": DECAY, "momentum": MOMENTUM, "eps": 1e-6}
    settings = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "Muon", "params": {**params, "betas": [0.9, 0.95], "adjust_lr_fn": "match_rms_adamw"}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    return Case("zero1.json", precision, (*OVERRIDES, grouped, *overrides), settings)


CASES = {
    "zero0": _case(0),
    "zero1, some frozen": _case(1, frozen="some"),
    "zero3": _case(3, sub_group_size=3000),
    "cp2 zero3, some frozen": _case(3, "parallel.context=2", frozen="some"),
    "tp2 zero0": _case(0, TENSOR),
    "tp2 zero2, some frozen": _case(2, TENSOR, frozen="some"),
    "sp2 zero3": _case(3, TENSOR, "parallel.sequence=true"),
    "pp2 zero1": _case(1, PIPELINE),
    "tp2 pp2 zero1, stage frozen": _case(1, TENSOR, PIPELINE, frozen="stage"),
    "tp2 zero1 bf16": _case(1, TENSOR, precision="bf16"),
    "zero2 fp16": _case(2, precision="fp16"),
}
LOW = ("tp2 zero1 bf16", "zero2 fp16")
EXACT = [name for name in CASES if name not in LOW]
MOVES = [("sp2 zero3", "pp2 zero1"), ("pp2 zero1", "tp2 zero1 bf16"), ("tp2 zero0", "zero3"), ("zero3", "zero3")]


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[Any, Any]:
    """Per case the state at the save and the whole run; per move what is read, and the steps that follow."""
    found: dict[Any, Any] = {}
    paths = {}
    os.environ[ALLOW_CPU_FP16] = "1"
    allow_cpu_fp16_for_tests()
    muon.MUON_ROUND = 4000  # several rounds, one matrix larger than that
    for name, case in CASES.items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        first = steps(engine, run, loader, 1, HALF)
        facts = {"step": HALF, "tokens": 0, "counters": engine.counters()}
        paths[name] = save_checkpoint(folder / name, HALF, engine.fragments(), facts, [], comm)
        second = steps(engine, run, loader, HALF + 1, END)
        found[name] = first, Trace([*first.losses, *second.losses], [*first.norms, *second.norms], second.fragments)
        loader.close()
    for source, target in MOVES:
        engine, run, loader = start(comm, device, CASES[target], prefix, folder, initial_weights=False)
        reader = CheckpointReader(paths[source])
        engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
        loaded = Trace([], [], snapshot(engine))
        found[source, target] = loaded, steps(engine, run, loader, HALF + 1, END)
        loader.close()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    make_dataset(folder / "data", marked=True)
    return folder


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[dict[Any, Any]]:
    return run_ranks(4, _train, place / "data", place, timeout_seconds=500)


def _in_fp32(
    grad: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> torch.Tensor:
    matrix = grad / grad.norm()
    a, b, c = ns_coefficients
    for _ in range(ns_steps):
        square = matrix @ matrix.T
        matrix = a * matrix + (b * square + c * square @ square) @ matrix
    return matrix


Reference = tuple[Trace, dict[Any, np.ndarray]]


@pytest.fixture(scope="module")
def plain(place: Path) -> dict[str, Reference]:
    """By what is frozen: the same steps in one process with torch's optimizers, and the state after them."""
    return {frozen: _plain(place, patterns) for frozen, patterns in FROZEN.items()}


def _plain(place: Path, frozen: tuple[str, ...]) -> Reference:
    run = resolved(CASES["zero0"], 1, place)
    shape, batch = shape_of(run), run.batch
    model = LanguageModel(shape)
    initialize(model, shape, run.config.train.seed)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in frozen))
    samples = TrainingSamples(IndexedDataset(place / "data"), (0, 200), run.config.data.sequence_length, seed=5)
    loader = BatchLoader(samples, BatchLayout(batch.global_batch, batch.micro_batch, 0, 1))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    averages = {name: weight.detach().clone() for name, weight in weights.items()}

    def group(name: str) -> dict[str, Any]:
        ruled, decays = ".attention." in name, weights[name].dim() == 2 and not name.startswith("embedding.")
        return {
            "params": [weights[name]],
            "scale": 0.5 if ruled else 1.0,
            "weight_decay": DECAY if decays and not ruled else 0.0,
        }

    matrices = [name for name, weight in weights.items() if name.startswith("layers.") and weight.dim() == 2]
    others = [name for name in weights if name not in matrices]
    by_muon = torch.optim.Muon(map(group, matrices), momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    by_adamw = torch.optim.AdamW(map(group, others), betas=(0.9, 0.95), eps=1e-6)
    losses, norms = [], []
    for step in range(1, END + 1):
        read = loader.batch((step - 1) * batch.global_batch)
        total = torch.zeros(())
        for micro in read.micro_batches:
            total = total + model(torch.from_numpy(micro.tokens), torch.from_numpy(micro.labels))[0] / read.target_count
        total.backward()
        losses.append(float(total.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)))
        share = learning_rate(run.schedule, step) / run.schedule.peak_learning_rate
        for optimizer, rate in ((by_muon, MUON_LR), (by_adamw, ADAM_LR)):
            for each in optimizer.param_groups:
                each["lr"] = rate * share * each["scale"]
            with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", _in_fp32):
                optimizer.step()
            optimizer.zero_grad()
        for name, weight in weights.items():
            averages[name] = AVERAGE_DECAY * averages[name] + (1 - AVERAGE_DECAY) * weight.detach()
    loader.close()
    state: dict[Any, torch.Tensor] = {(name, "master"): weight for name, weight in model.named_parameters()}
    state |= {(name, "ema"): average for name, average in averages.items()}
    for optimizer in (by_muon, by_adamw):
        for name, weight in weights.items():
            for kind, values in optimizer.state[weight].items() if weight in optimizer.state else ():
                if kind != "step":
                    state[name, kind] = values
    return Trace(losses, norms, []), {key: values.detach().numpy().reshape(-1) for key, values in state.items()}


@pytest.mark.parametrize("name", EXACT)
def test_steps_as_torch_s_on_whole_matrices(
    ranks: list[dict[Any, Any]], plain: dict[str, Reference], name: str
) -> None:
    """Weights, their average, momenta and moments to 1e-5 of each parameter's norm, as in the parity matrix."""
    reference, expected = plain[next((it for it in FROZEN if name.endswith(f"{it} frozen")), "none")]
    traces = [rank[name][1] for rank in ranks]
    np.testing.assert_allclose(traces[0].losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(traces[0].norms, reference.norms, rtol=1e-5)
    found = whole_state(traces)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert np.linalg.norm(found[key] - values) <= 1e-5 * np.linalg.norm(values), key


@pytest.mark.parametrize("frozen", FROZEN)
def test_the_steps_show_mistakes(plain: dict[str, Reference], frozen: str) -> None:
    """They learn and clip, and a matrix moves far: a piece orthogonalised alone would move it elsewhere."""
    trace, state = plain[frozen]
    assert trace.losses[-1] < trace.losses[0] - 0.03
    assert min(trace.norms) > CLIPPING

    def kinds(of: str) -> set[str]:
        return {kind for name, kind in state if name == of}

    assert kinds("layers.1.mlp.down.weight") == {"master", "momentum_buffer", "ema"}
    assert kinds("head.weight") == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert kinds("layers.0.attention.query.weight") == (
        {"master", "momentum_buffer", "ema"} if frozen == "none" else {"master"}
    )


@pytest.mark.parametrize("name", LOW)
def test_in_low_precision_it_trains_as_in_fp32(
    ranks: list[dict[Any, Any]], plain: dict[str, Reference], name: str
) -> None:
    """As near as in the parity matrix: a model in bf16 or fp16 is orthogonalised in bf16."""
    reference, expected = plain["none"]
    traces = [rank[name][1] for rank in ranks]
    np.testing.assert_allclose(traces[0].losses, reference.losses, rtol=1e-3)
    found = whole_state(traces)
    for key, values in expected.items():
        assert np.linalg.norm(found[key] - values) <= 0.05 * np.linalg.norm(values), key


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_any_layout_goes_on_from_any_checkpoint(ranks: list[dict[Any, Any]], source: str, target: str) -> None:
    """The state that is loaded is the one that was saved, bit for bit; so are its steps on the same layout."""
    saved = whole_state([rank[source][0] for rank in ranks])
    loaded = whole_state([rank[source, target][0] for rank in ranks])
    assert loaded.keys() == saved.keys()
    for key, values in saved.items():
        np.testing.assert_array_equal(loaded[key], values, err_msg=str(key))
    after, expected = ranks[0][source, target][1], ranks[0][source][1]
    if source == target:
        assert (after.losses, after.norms) == (expected.losses[HALF:], expected.norms[HALF:])
        for (key, found), (other, values) in zip(after.fragments, expected.fragments, strict=True):
            assert key == other
            np.testing.assert_array_equal(found, values, err_msg=str(key))
    np.testing.assert_allclose(after.losses, expected.losses[HALF:], rtol=1e-3 if "bf16" in target else 1e-5)
