"""Optimizer states on a disk are those of the CPU's memory, bit for bit: while training, saved, loaded, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.engine.cpp_extensions import load_async_io, load_cpu_adam
from megalm.engine.interface import UpdateVerdict
from tests.distributed.training import Case, Trace, make_dataset, snapshot, start, steps, whole_state
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# DeepSpeed keeps what has less than a megabyte in memory: two sub-groups of a rank are swapped, and some are not.
LARGER = ("model.hidden_size=160", "model.num_hidden_layers=5", "model.intermediate_size=640")
ZERO = {"stage3_param_persistence_threshold": 0, "sub_group_size": 600_000}
HALF, END = 3, 6


def _compile(comm: Any, device: torch.device) -> None:
    load_cpu_adam()
    load_async_io()


def _case(folder: Path, name: str) -> Case:
    if name == "zero1":
        return Case("zero1.json", overrides=LARGER)
    overrides = (*LARGER, "parallel.tensor=2") if name.startswith("tp2") else LARGER
    states = {"device": "nvme", "nvme_path": str(folder / "disk"), "buffer_count": 4, "pin_memory": True}
    zero = {**ZERO, "offload_optimizer": states} if name.endswith("nvme") else ZERO
    return Case("zero3_offload.json", overrides=overrides, settings={"zero_optimization": zero})


def _saved(engine: Any, step: int, folder: Path, comm: Any) -> CheckpointReader:
    facts = {"step": step, "tokens": 0, "counters": engine.counters()}
    return CheckpointReader(save_checkpoint(folder, step, engine.fragments(), facts, [], comm))


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    readers = {}
    refuses = False

    def judge(loss: float, norm: float) -> UpdateVerdict:
        return UpdateVerdict(refuses)

    for name in ("zero1", "cpu", "nvme", "tp2 cpu", "tp2 nvme"):
        engine, run, loader = start(comm, device, _case(folder, name), prefix, folder, judge)
        first = steps(engine, run, loader, 1, HALF)
        readers[name] = _saved(engine, HALF, folder / name, comm)
        found[name] = first, steps(engine, run, loader, HALF + 1, END)
        if name == "nvme":
            found["swapped"], found["resident"] = _places(engine)
            batch = loader.batch(END * run.batch.global_batch)
            before = snapshot(engine)
            refuses = True
            refused = engine.train_step(batch, END + 1, 1e-3)
            gradients = engine.refused_gradients()
            found["refused"] = refused, gradients, _differences(before, snapshot(engine))
            refuses = False
        engine.close()
        loader.close()
    engine, run, loader = start(comm, device, _case(folder, "nvme"), prefix, folder)
    steps(engine, run, loader, 1, 1)  # there are moments on the disk that must go
    engine.restore(readers["nvme"].read, readers["nvme"].manifest.counters, HALF)
    found["resident after loading"] = _places(engine)[1]
    found["again"] = steps(engine, run, loader, HALF + 1, END)
    for source in ("zero1", "cpu"):
        engine.restore(readers[source].read, readers[source].manifest.counters, HALF)
        found[f"{source} into nvme"] = snapshot(engine)
    engine.reset()
    found["reset"] = max(float(np.abs(values).max()) for key, values in snapshot(engine) if key.kind != "master")
    engine.close()
    loader.close()
    comm.barrier()
    found["left"] = sorted(path.name for path in (folder / "disk").iterdir())
    return found


def _places(engine: Any) -> tuple[list[bool], list[bool]]:
    """Of each sub-group: whether it is swapped, and whether its master or a moment is in memory."""
    outer = engine._engine.optimizer
    flats = outer.fp32_partitioned_groups_flat
    swapped = [outer._swappable_optimizer_subgroup(index) for index in range(len(flats))]
    tensors = [[flat, *(outer.optimizer.state[flat][kind] for kind in ("exp_avg", "exp_avg_sq"))] for flat in flats]
    return swapped, [any(tensor.numel() for tensor in three) for three in tensors]


def _differences(before: list[tuple[Any, np.ndarray]], after: list[tuple[Any, np.ndarray]]) -> list[str]:
    pairs = zip(before, after, strict=True)
    return [str(key) for (key, then), (other, now) in pairs if key != other or not np.array_equal(then, now)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nvme")
    make_dataset(folder / "data")
    run_ranks(1, _compile, timeout_seconds=1800)  # once, at its own time
    return run_ranks(2, _train, folder / "data", folder)


def test_states_lie_on_the_disk(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert sum(rank["swapped"]) >= 2
        assert not all(rank["swapped"]), "some are too small"
        for when in ("resident", "resident after loading"):
            assert rank[when] == [not swapped for swapped in rank["swapped"]], when


@pytest.mark.parametrize("layout", ["", "tp2 "])
def test_as_offloaded_to_memory(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        for in_memory, on_disk in zip(rank[f"{layout}cpu"], rank[f"{layout}nvme"], strict=True):
            assert on_disk.losses == in_memory.losses
            assert on_disk.norms == in_memory.norms
            assert _differences(in_memory.fragments, on_disk.fragments) == []
        plain = [step for trace in rank["zero1"] for step in trace.losses]
        np.testing.assert_allclose([step for trace in rank[f"{layout}nvme"] for step in trace.losses], plain, rtol=1e-5)


def test_goes_on_bit_equal(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["again"].losses == rank["nvme"][1].losses
        assert rank["again"].norms == rank["nvme"][1].norms
        assert _differences(rank["again"].fragments, rank["nvme"][1].fragments) == []


@pytest.mark.parametrize("source", ["zero1", "cpu"])
def test_loads_any_layout(ranks: list[dict[str, Any]], source: str) -> None:
    expected = whole_state([rank[source][0] for rank in ranks])
    found = whole_state([Trace([], [], rank[f"{source} into nvme"]) for rank in ranks])
    assert expected.keys() == found.keys()
    for place, values in expected.items():
        np.testing.assert_array_equal(found[place], values, err_msg=str(place))


def test_a_refused_step_leaves_no_trace(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result, gradients, differences = rank["refused"]
        assert result.refused
        assert differences == []
        assert sum(norm**2 for norm in gradients.values()) ** 0.5 == pytest.approx(result.grad_norm, rel=1e-4)


def test_only_moments_are_forgotten_and_nothing_is_left(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["reset"] == 0.0
        assert rank["left"] == []
