"""The plan's memory against what the tensors of a real engine hold.

Weights, gradients, master and moments are exact. They are taken by identity, not by name: every storage that is alive
between a backward pass and what follows it, less communication buffers, the model's tables and what is smaller than a
kilobyte.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.cost_model.memory import estimate_stages
from tests.distributed.training import Case, make_dataset, resolved, shape_of, start
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STATES = ("weights", "master", "moments", "ema", "secondary")
SMALL = 1024  # bytes: counters, norms, learning rates
# Wide enough that every part is far larger than a batch of tokens.
WIDE = ("model.hidden_size=128", "model.num_hidden_layers=3")
EXPERTS = ("model.num_experts=4", "model.num_dense_layers=1", "model.num_shared_experts=1")
GPT2 = ("model.style=gpt2", "model.qk_norm=false", "model.tie_word_embeddings=true")
CONTEXT, EXPERT = "parallel.context=2", "parallel.expert=2"
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
MUON = {"type": "Muon", "params": {"weight_decay": 0.1}}
GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
HPZ = {**GATHERED["zero_optimization"], "zero_hpz_partition_size": 2}
FROZEN = "train.parameter_groups=[{match: embedding.*, frozen: true}, {match: 'layers.[01].*', frozen: true}]"
CASES = {
    # Accumulating: a single backward pass frees gradients as it reduces them.
    "zero1 fp32": Case("zero1.json", overrides=WIDE, settings={"train_micro_batch_size_per_gpu": 2}),
    "zero2 fp32": Case("zero2.json", overrides=WIDE),
    "zero2 fp32 once a step": Case("zero2.json", overrides=WIDE, settings={"train_micro_batch_size_per_gpu": 2}),
    "zero2 bf16 once a step": Case("zero2.json", "bf16", WIDE, {"train_micro_batch_size_per_gpu": 2}),
    "zero3 fp32": Case("zero3.json", overrides=WIDE, settings=GATHERED),
    "zero3 bf16 hpz, all else": Case(
        "zero3.json",
        "bf16",
        (*WIDE, FROZEN, "train.ema_decay=0.9", "train.optimizer_state=8bit"),
        {"zero_optimization": HPZ},
    ),
    "zero1 bf16": Case("zero1.json", "bf16", WIDE),
    "zero2 bf16": Case("zero2.json", "bf16", WIDE),
    "zero3 bf16": Case("zero3.json", "bf16", WIDE, GATHERED),
    "tp2 zero1 fp32": Case(
        "zero1.json", overrides=(*WIDE, *EXPERTS, TENSOR), settings={"train_micro_batch_size_per_gpu": 2}
    ),
    "tp2 zero2 bf16": Case("zero2.json", "bf16", (*WIDE, TENSOR, "model.num_key_value_heads=1")),
    "sp2 zero3 bf16": Case("zero3.json", "bf16", (*WIDE, TENSOR, "parallel.sequence=true", *GPT2), GATHERED),
    "ep2 zero1 bf16": Case("zero1.json", "bf16", (*WIDE, *EXPERTS, EXPERT), {"train_micro_batch_size_per_gpu": 2}),
    "ep2 zero3 fp32": Case("zero3.json", overrides=(*WIDE, *EXPERTS, EXPERT), settings=GATHERED),
    "cp2 zero2 fp32": Case("zero2.json", overrides=(*WIDE, CONTEXT)),
    "cp2 zero3 bf16": Case("zero3.json", "bf16", (*WIDE, CONTEXT), GATHERED),
    "pp2 zero1 fp32": Case("zero1.json", overrides=(*WIDE, PIPELINE), settings={"train_micro_batch_size_per_gpu": 2}),
    "pp2 zero1 bf16": Case("zero1.json", "bf16", (*WIDE, PIPELINE, *GPT2), {"train_micro_batch_size_per_gpu": 2}),
    "zero1 muon": Case("zero1.json", "bf16", WIDE, {"optimizer": MUON}),
    "zero3 muon": Case("zero3.json", overrides=WIDE, settings={**GATHERED, "optimizer": MUON}),
    "zero1 bf16 states": Case("zero1.json", "bf16", (*WIDE, "train.optimizer_state=bf16")),
    "zero3 8bit states": Case("zero3.json", "bf16", (*WIDE, "train.optimizer_state=8bit"), GATHERED),
    "zero2 bf16 frozen": Case("zero2.json", "bf16", (*WIDE, FROZEN, "train.ema_decay=0.9")),
    "zero3 bf16 frozen": Case("zero3.json", "bf16", (*WIDE, FROZEN), GATHERED),
    "pp2 8bit states": Case(
        "zero1.json", "bf16", (*WIDE, PIPELINE, "train.optimizer_state=8bit"), {"train_micro_batch_size_per_gpu": 2}
    ),
}


def _measure_all(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, dict[str, int]]:
    gc.collect()
    gc.freeze()  # what is there already need not be looked through each time
    return {name: _measure(comm, device, case, prefix, folder) for name, case in CASES.items()}


def _measure(comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path) -> dict[str, int]:
    """Bytes per part at the second update; the first one makes the moments."""
    gc.collect()
    there = _tensors()  # held, so that nothing new gets an address of theirs
    before = _storages(there)
    engine, run, loader = start(comm, device, case, prefix, folder)
    stage = run.topology.coordinate(comm.rank).pipeline
    most = next(_most_gradients(plan, run) for plan in _plans(run) if plan.stage == stage)
    found: dict[str, int] = {}
    name = "_take_model_step" if run.topology.pipeline > 1 else "step"  # the one that its schedule calls
    update = getattr(engine._engine, name)

    def look_and_update(*arguments: Any) -> None:
        if engine._engine.global_steps == 1:
            for part, size in _settled_parts(engine, before, most).items():
                found[part] = max(size, found.get(part, 0))
        update(*arguments)

    setattr(engine._engine, name, look_and_update)
    for step in (1, 2):
        engine.train_step(loader.batch((step - 1) * run.batch.global_batch), step, 1e-3)
    loader.close()
    del there
    return found


def _settled_parts(engine: Any, before: dict[int, int], most_gradients: float) -> dict[str, int]:
    """The parts, once gloo's threads have let go of what they have reduced, which takes until they are scheduled."""
    parts = _parts(engine, before)
    deadline = time.monotonic() + 5
    while parts["gradients"] > most_gradients and time.monotonic() < deadline:
        time.sleep(0.1)
        parts = _parts(engine, before)
    return parts


def _parts(engine: Any, before: dict[int, int]) -> dict[str, int]:
    gc.collect()
    outer, inner = engine._engine.optimizer, engine._state._inner
    masters = [flat for flat in inner.state if flat.numel()]
    weights = [getattr(parameter, "ds_tensor", parameter.data) for parameter in engine._engine.module.parameters()]
    buckets = [buffer for bucket in getattr(outer, "ipg_buckets", {}).values() for buffer in _buffers(bucket)]
    parts = {
        "weights": _storages(weights),
        "master": _storages(masters),
        "moments": _storages(value for state in inner.state.values() for value in state.values()),
        "ema": _storages(engine._state.ema._averages.values()),
        "secondary": _storages(getattr(it, "ds_secondary_tensor", None) for it in engine._engine.module.parameters()),
    }
    known = before | _storages(buckets) | _storages(engine._engine.module.buffers())
    for part in parts.values():
        known |= part
    parts["gradients"] = {place: size for place, size in _storages(_tensors()).items() if place not in known}
    return {name: sum(size for size in part.values() if size >= SMALL) for name, part in parts.items()}


def _buffers(bucket: Any) -> list[torch.Tensor]:
    buffer = getattr(bucket, "buffer", None)
    return [] if buffer is None else [buffer] if isinstance(buffer, torch.Tensor) else list(buffer)


def _tensors() -> list[torch.Tensor]:
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]  # asks no proxy
    return found + [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]


def _storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of each storage behind the tensors, once."""
    held = (tensor for tensor in tensors if isinstance(tensor, torch.Tensor))  # a state may have a number too
    storages = (tensor.untyped_storage() for tensor in held if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("memory")
    make_dataset(folder / "data")
    return folder, run_ranks(2, _measure_all, folder / "data", folder)


@pytest.mark.parametrize("name", list(CASES))
def test_plan_tells_what_is_held(measured: Any, name: str) -> None:
    folder, ranks = measured
    run = resolved(CASES[name], 2, folder)
    for plan in _plans(run):
        here = [ranks[rank][name] for rank in range(2) if run.topology.coordinate(rank).pipeline == plan.stage]
        # Norms, each smaller than the smallest storage that is counted, are kept one by one under ZeRO 3.
        most = {part: 1.01 * getattr(plan, part) for part in STATES}
        # Frozen blocks have no backward pass: their gathered weights, of the plan's buckets, stay.
        if not (CASES[name].json == "zero3.json" and FROZEN in CASES[name].overrides):
            most["gradients"] = _most_gradients(plan, run)
        for part, limit in most.items():
            fullest = max(found[part] for found in here)
            least = 0.99 * getattr(plan, part)
            assert (least if least >= SMALL else 0) <= fullest <= limit, f"{part} of stage {plan.stage}: {here}"


def _plans(run: Any) -> list[Any]:
    return estimate_stages(run.memory_case(shape_of(run)))


def _most_gradients(plan: Any, run: Any) -> float:
    """Hidden states that a pipeline has sent or received count as gradients here."""
    return (1.2 if run.topology.pipeline > 1 else 1.01) * plan.gradients
