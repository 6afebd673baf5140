"""What the loop asks of an engine beside steps: rehearsal, validation, sampling, decay, accumulation, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.config.schema import SampleSection
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.batch_loader import BatchLayout, ValidationLoader
from megalm.data.sampling.samples import ValidationSamples
from megalm.engine import zero_engine
from megalm.train.evaluator import Evaluator
from megalm.train.text_samples import generate
from tests.distributed.training import VOCAB, Case, Trace, make_dataset, start, steps
from tests.number_tokenizer import Numbers
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ZERO3 = Case("zero3.json", settings=NO_PERSISTENCE, overrides=("model.tie_word_embeddings=true",))
REHEARSED = {
    "zero0": Case("zero1.json", settings={"zero_optimization": {"stage": 0}}),
    "zero1": Case("zero1.json"),
    "zero2 bf16": Case("zero2.json", "bf16"),
    "zero1 bf16": Case("zero1.json", "bf16"),
    "zero3": ZERO3,
}


ON_ONE_RANK = {
    "zero1": Case("zero1.json"),
    "zero2": Case("zero2.json"),
    "zero2 accumulated": Case("zero2.json", settings={"train_micro_batch_size_per_gpu": 4}),
    "zero2 bf16 accumulated": Case("zero2.json", "bf16", settings={"train_micro_batch_size_per_gpu": 4}),
    "zero2 bf16 in bf16": Case(
        "zero2.json",
        "bf16",
        settings={"train_micro_batch_size_per_gpu": 4, "data_types": {"grad_accum_dtype": "bf16"}},
    ),
}


class _LogitsRows(TorchDispatchMode):
    """Remembers of how many tokens any operation gave logits, or anything else as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == VOCAB:
            self.most = max(self.most, result.numel() // VOCAB)
        return result


def _work(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    return {
        "rehearsal": {name: _rehearse(comm, device, case, prefix, folder) for name, case in REHEARSED.items()},
        "trained": _evaluate_and_sample(comm, device, prefix, folder),
        "decay": _decaying_elements(comm, device, prefix, folder),
        "gradients": _gradients(comm, device, prefix, folder),
        "rows": _logits_rows(comm, device, prefix, folder),
        "placeholders": _step_of_placeholders(comm, device, prefix, folder),
        "flat": _flat_gradients(comm, device, prefix, folder) if comm.size == 1 else None,
    }


def _rehearse(comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path) -> tuple[Trace, Trace]:
    traces = []
    for rehearsed in (False, True):
        engine, run, loader = start(comm, device, case, prefix, folder)
        if rehearsed:
            engine.train_step(loader.batch(0), step=1, learning_rate=0.0)
            engine.reset()
        traces.append(steps(engine, run, loader, 1, 4))
        loader.close()
    return traces[0], traces[1]


def _evaluate_and_sample(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    engine, run, loader = start(comm, device, ZERO3, prefix, folder)
    steps(engine, run, loader, 1, 12)
    loader.close()
    # 4 documents: fewer windows than a whole number of batches, the last window not full.
    samples = ValidationSamples(IndexedDataset(prefix), (196, 200), run.config.data.sequence_length)
    batches = ValidationLoader(samples, BatchLayout(16, run.batch.micro_batch, comm.rank, comm.size))
    evaluator = Evaluator({"held out": (batches, batches)}, np.ones(VOCAB, np.int32), comm)
    settings = SampleSection(prompts=("1 2 3", "7", "90 92 94 96"), max_new_tokens=30, temperature=0.0)
    random = SampleSection(prompts=("1 2 3",), max_new_tokens=30, temperature=1.0)
    length = run.config.data.sequence_length
    return {
        "evaluation": evaluator.evaluate(engine, whole=True),
        "by hand": sum(engine.evaluate(batch.micro_batches) for batch in batches),
        "texts": generate(engine, comm, Numbers(VOCAB), settings, length, seed=1),
        "random": [generate(engine, comm, Numbers(VOCAB), random, length, seed) for seed in (1, 1, 2)],
    }


def _decaying_elements(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[float, int]:
    """Weight decay -> elements of this rank's flat masters."""
    engine, _, loader = start(comm, device, ZERO3, prefix, folder)
    loader.close()
    groups = engine._state._inner.param_groups
    outer = engine._engine.optimizer
    found: dict[float, int] = {}
    for index, flat in enumerate(outer.fp32_partitioned_groups_flat):
        decay = groups[outer.sub_group_to_group_id[index]]["weight_decay"]
        found[decay] = found.get(decay, 0) + flat.numel()
    return found


def _gradients(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, np.ndarray]:
    """The first step's gradient: Adam's first moment after one step is a tenth of it."""
    cases = {
        "fp32": Case("zero2.json", "fp32"),
        "bf16 at once": Case("zero2.json", "bf16"),
        "bf16 accumulated": Case("zero2.json", "bf16", settings={"train_micro_batch_size_per_gpu": 1}),
        "bf16 accumulated whole": Case(
            "zero2.json", "bf16", ("train.reduce_gradients=step",), {"train_micro_batch_size_per_gpu": 1}
        ),
        "bf16 in bf16": Case(
            "zero2.json",
            "bf16",
            settings={"train_micro_batch_size_per_gpu": 1, "data_types": {"grad_accum_dtype": "bf16"}},
        ),
    }
    found = {}
    for name, case in cases.items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        trace = steps(engine, run, loader, 1, 1)
        loader.close()
        found[name] = np.concatenate([values for key, values in trace.fragments if key.kind == "exp_avg"])
    return found


def _flat_gradients(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    """Case -> traces of three steps and reductions of buckets: gradients put in place at once, or by DeepSpeed."""

    def train(case: Case) -> tuple[Trace, int]:
        reduce = DeepSpeedZeroOptimizer.average_tensor
        with mock.patch.object(DeepSpeedZeroOptimizer, "average_tensor", autospec=True, side_effect=reduce) as reduced:
            engine, run, loader = start(comm, device, case, prefix, folder)
            trace = steps(engine, run, loader, 1, 3)
        loader.close()
        return trace, reduced.call_count

    found = {}
    for name, case in ON_ONE_RANK.items():
        own = train(case)
        with mock.patch.object(zero_engine, "FlatGradients"):
            found[name] = own, train(case)
    return found


def _logits_rows(comm: Any, device: torch.device, prefix: Path, folder: Path) -> int:
    engine, _, loader = start(comm, device, ZERO3, prefix, folder)
    with _LogitsRows() as rows:
        engine.train_step(loader.batch(0), 1, 1e-3)
    loader.close()
    return rows.most


def _step_of_placeholders(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, float]:
    """Model -> gradient norm of the preflight's step before a checkpoint is restored."""
    norms = {}
    for style in ("llama", "gpt2"):
        case = Case("zero1.json", "bf16", (f"model.style={style}", f"model.qk_norm={str(style == 'llama').lower()}"))
        engine, _, loader = start(comm, device, case, prefix, folder, initial_weights=False)
        norms[style] = engine.train_step(loader.batch(0), step=1, learning_rate=0.0).grad_norm
        loader.close()
    return norms


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("parts")
    make_dataset(folder / "data")
    return {world_size: run_ranks(world_size, _work, folder / "data", folder) for world_size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", list(REHEARSED))
def test_rehearsal_leaves_no_trace(results: Any, name: str, world_size: int) -> None:
    for rank in results[world_size]:
        plain, rehearsed = rank["rehearsal"][name]
        assert rehearsed.losses == plain.losses
        assert rehearsed.norms == plain.norms
        for (_, expected), (_, found) in zip(plain.fragments, rehearsed.fragments, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_validation_is_the_same_for_any_layout(results: Any) -> None:
    one, two = results[1][0]["trained"], [rank["trained"] for rank in results[2]]
    evaluation = one["evaluation"]
    assert evaluation.loss == pytest.approx(one["by hand"] / evaluation.targets, rel=1e-12)
    for rank in two:
        assert rank["evaluation"].targets == evaluation.targets
        assert rank["evaluation"].loss == pytest.approx(evaluation.loss, rel=1e-5)
        assert rank["evaluation"].bits_per_byte == pytest.approx(evaluation.bits_per_byte, rel=1e-5)


def test_sampling_under_zero_3_is_that_of_one_rank(results: Any) -> None:
    one = results[1][0]["trained"]
    for rank in results[2]:
        assert rank["trained"]["texts"] == one["texts"]
    assert one["random"][0] == one["random"][1]
    assert one["random"][0] != one["random"][2]


def test_matrices_decay_under_zero_3(results: Any) -> None:
    """ZeRO 3 flattens every parameter to one dimension; groups were made before."""
    found = results[1][0]["decay"]
    norms = 32 * (2 * 2 + 1) + 2 * 2 * 8  # two in each of 2 layers, the last one, and those of queries and keys
    assert found[0.0] == norms
    assert found[0.1] > 50 * norms


def test_bf16_accumulates_in_fp32(results: Any) -> None:
    """Sixteen micro-batches in bf16 are as near to fp32 as one; accumulated in bf16 they are not."""
    gradients = results[1][0]["gradients"]
    exact = gradients["fp32"]

    def error(name: str) -> float:
        return float(np.linalg.norm(gradients[name] - exact) / np.linalg.norm(exact))

    assert error("bf16 at once") < 0.02
    assert error("bf16 accumulated") < 1.1 * error("bf16 at once")
    assert error("bf16 accumulated whole") < 1.1 * error("bf16 at once")
    assert error("bf16 in bf16") > 1.2 * error("bf16 accumulated")


@pytest.mark.parametrize("name", list(ON_ONE_RANK))
def test_one_rank_needs_no_buckets(results: Any, name: str) -> None:
    """A gradient that goes where the optimizer reads it trains as DeepSpeed's buckets do, bit for bit."""
    (own, no_reductions), (expected, reductions) = results[1][0]["flat"][name]
    assert no_reductions == 0
    assert reductions >= 3
    assert (own.losses, own.norms) == (expected.losses, expected.norms)
    for (_, found), (_, values) in zip(own.fragments, expected.fragments, strict=True):
        np.testing.assert_array_equal(found, values)


def test_preflight_runs_without_initial_weights(results: Any) -> None:
    """DeepSpeed's BF16_Optimizer stops at a norm of 0, which weights of 0 would have."""
    assert all(0 < norm < 100 for rank in results[2] for norm in rank["placeholders"].values())


@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_logits_never_exist(results: Any, world_size: int) -> None:
    """Tied weights under ZeRO 3: 384 or 192 tokens a micro-batch, logits of one chunk of 40 at most."""
    assert [rank["rows"] for rank in results[world_size]] == [40] * world_size
