"""What a step costs beside its arithmetic: waits for the device, and bytes of gradients.

A CPU has nothing to wait for, so what is counted here is what makes Python wait on a GPU: numbers that it takes out of
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.engine.base_engine import HostCopy
from megalm.engine.traffic_counter import TrafficCounter
from tests.distributed.training import Case, make_dataset, start, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ACCUMULATED = 4
MICRO_BATCH = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
SUB_GROUPS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 2000}}
EACH = ("train.reduce_gradients=micro_batch",)
# Layout -> case, and how often the fp32 gradients of all parameters are all-reduced in a step; None: otherwise.
CASES: dict[str, tuple[Case, int | None]] = {
    "zero0": (Case("zero1.json", settings=MICRO_BATCH | {"zero_optimization": {"stage": 0}}), 1),
    "zero1": (Case("zero1.json", settings=MICRO_BATCH), 1),
    "zero1 bf16": (Case("zero1.json", "bf16", settings=MICRO_BATCH), 1),
    "zero2": (Case("zero2.json", settings=MICRO_BATCH), 1),
    "zero2 bf16": (Case("zero2.json", "bf16", settings=MICRO_BATCH), 1),
    "zero2 bf16 by micro-batch": (Case("zero2.json", "bf16", EACH, MICRO_BATCH), ACCUMULATED),
    "zero3 bf16": (Case("zero3.json", "bf16", settings=MICRO_BATCH | SUB_GROUPS), None),
    "pp2": (Case("pipeline.json", overrides=("parallel.pipeline=2",), settings=MICRO_BATCH), None),
    "pp2 bf16": (Case("pipeline.json", "bf16", ("parallel.pipeline=2",), MICRO_BATCH), None),
}


class _Readings(TorchDispatchMode):
    """Counts numbers taken out of tensors, but for those that `Tensor.cpu` has copied, which counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [it for it in tree_leaves((args, kwargs)) if isinstance(it, torch.Tensor)]
        on_host = bool(inputs) and all(hasattr(it, "on_host") for it in inputs)
        self.count += function is torch.ops.aten._local_scalar_dense.default and not on_host
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result) if on_host else ():
            if isinstance(tensor, torch.Tensor):
                tensor.on_host = True  # type: ignore[attr-defined]
        return result


@contextmanager
def _readings() -> Iterator[_Readings]:
    def copied(tensor: torch.Tensor) -> torch.Tensor:
        readings.count += 1
        copy = tensor.clone()
        copy.on_host = True  # type: ignore[attr-defined]
        return copy

    def read_copy(copy: HostCopy) -> list[float]:
        readings.count += copy._numbers.numel() if copy._read is None else 0
        return read(copy)

    cpu, read = torch.Tensor.cpu, HostCopy.read
    with _Readings() as readings:
        torch.Tensor.cpu = copied  # type: ignore[assignment, method-assign]
        HostCopy.read = read_copy  # type: ignore[method-assign]
        try:
            yield readings
        finally:
            torch.Tensor.cpu = cpu  # type: ignore[method-assign]
            HostCopy.read = read  # type: ignore[method-assign]


def _costs(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, dict[str, Any]]:
    counter = TrafficCounter()
    counter.install()
    return {name: _measure(comm, device, case, prefix, folder, counter) for name, (case, _) in CASES.items()}


def _measure(
    comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path, counter: TrafficCounter
) -> dict[str, Any]:
    engine, run, loader = start(comm, device, case, prefix, folder)
    steps(engine, run, loader, 1, 2)
    counter.start()
    with _readings() as readings:
        engine.train_step(loader.batch(0), 3, 1e-3)
    traffic = counter.stop()
    loader.close()
    return {
        "readings": readings.count,
        "accumulated": run.batch.accumulation,
        "parameters": sum(fragment.tensor.numel() for fragment in engine.fragments()) // 3,
        "all-reduced": sum(it.bytes for it in traffic if it.collective == "all_reduce"),
    }


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("costs")
    make_dataset(folder / "data")
    return run_ranks(2, _costs, folder / "data", folder)


@pytest.mark.parametrize("name", list(CASES))
def test_a_step_reads_loss_and_norm_once(costs: Any, name: str) -> None:
    """Two numbers: the norm's reading waits, the loss, requested before it, is there then."""
    assert [rank[name]["readings"] for rank in costs] == [2, 2]


@pytest.mark.parametrize("name", [name for name, (_, times) in CASES.items() if times is not None])
def test_gradients_are_sent_as_documented(costs: Any, name: str) -> None:
    assert {rank[name]["accumulated"] for rank in costs} == {ACCUMULATED}
    parameters = sum(rank[name]["parameters"] for rank in costs)
    times = CASES[name][1]
    assert times is not None
    for rank in costs:
        assert 0 <= rank[name]["all-reduced"] - 4 * parameters * times <= 64, "and a few numbers: loss, norm"
