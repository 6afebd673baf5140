"""A checkpoint of any layout gives the very same state to every other, and to the weights: of all axes but pipelines.

Bit for bit: masters, moments and the low-precision weights made of them. Going on from it gives the next loss of the
run that wrote it, in fp32 to 1e-5; on the same layout bit for bit, dropout included. On every change each layout reads
a third of the checkpoints, and each checkpoint is read by one and more ranks; all pairs are `slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.model.layer_factory import shard_of
from tests.distributed.training import (
    Case,
    Trace,
    assert_bit_equal,
    assert_stored,
    make_dataset,
    snapshot,
    start,
    steps,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
NO_ZERO = {"zero_optimization": {"stage": 0}}
GROUPED = "model.num_key_value_heads=2"
TENSOR, SEQUENCE = (GROUPED, "parallel.tensor=2"), (GROUPED, "parallel.tensor=2", "parallel.sequence=true")
CONTEXT = (GROUPED, "parallel.context=2")
LAYOUTS: dict[int, dict[str, Case]] = {
    1: {"zero1": Case("zero1.json", overrides=(GROUPED,)), "zero3 bf16": Case("zero3.json", "bf16", (GROUPED,))},
    2: {
        "data zero2": Case("zero2.json", overrides=(GROUPED,)),
        "tensor zero0": Case("zero1.json", overrides=TENSOR, settings=NO_ZERO),
        "tensor zero1 bf16": Case("zero1.json", "bf16", TENSOR),
        "context zero2": Case("zero2.json", overrides=CONTEXT),
        "tensor zero3": Case("zero3.json", overrides=TENSOR, settings=NO_PERSISTENCE),
        "sequence zero1 dropout": Case("zero1.json", overrides=(*SEQUENCE, "model.dropout=0.1")),
    },
    4: {
        "data zero3": Case("zero3.json", overrides=(GROUPED,), settings=NO_PERSISTENCE),
        "tensor 2 zero0": Case("zero1.json", overrides=TENSOR, settings=NO_ZERO),
        "sequence context zero3": Case(
            "zero3.json", overrides=(*SEQUENCE, *CONTEXT, "parallel.context_method=ring"), settings=NO_PERSISTENCE
        ),
        "tensor 2 zero2 bf16": Case("zero2.json", "bf16", TENSOR),
        "tensor 4 zero1": Case("zero1.json", overrides=(GROUPED, "parallel.tensor=4")),  # two ranks share a kv head
    },
}
STEPS = 3


def _write(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, tuple[Path, Trace, Trace, Trace]]:
    """Per layout: the checkpoint, the state that it was made of, the step after it, the same from the checkpoint."""
    written = {}
    for name, case in LAYOUTS[comm.size].items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        before = steps(engine, run, loader, 1, STEPS)
        facts = {"step": STEPS, "tokens": 0, "counters": engine.counters()}
        path = save_checkpoint(folder / name, STEPS, engine.fragments(), facts, [], comm)
        straight = steps(engine, run, loader, STEPS + 1, STEPS + 1)
        loader.close()
        engine, run, loader = start(comm, device, case, prefix, folder)
        reader = CheckpointReader(path)
        engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
        written[name] = (path, before, straight, steps(engine, run, loader, STEPS + 1, STEPS + 1))
        loader.close()
    return written


def _read(
    comm: Any, device: torch.device, prefix: Path, folder: Path, paths: list[Path], apart: int
) -> dict[Any, Trace]:
    """Per layout and checkpoint, of which each layout reads every `apart`-th: the state and the next step."""
    found = {}
    for number, (name, case) in enumerate(_readers(comm.size).items()):
        engine, run, loader = start(comm, device, case, prefix, folder)
        for path in paths[(number + comm.size) % apart :: apart]:
            reader = CheckpointReader(path)
            engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
            loaded = snapshot(engine)
            if "zero3" not in name:
                _assert_weights_are(engine, reader)
            after = steps(engine, run, loader, STEPS + 1, STEPS + 1)
            found[name, path] = Trace(after.losses, after.norms, loaded)
        loader.close()
    return found


def _readers(size: int) -> dict[str, Case]:
    return {name: case for name, case in LAYOUTS[size].items() if "dropout" not in name}


def _assert_weights_are(engine: Any, reader: CheckpointReader) -> None:
    masters = reader.model()
    for name, parameter in engine._engine.module.named_parameters():
        expected = shard_of(parameter).cut(masters[name]).to(parameter.dtype)
        assert torch.equal(parameter.data, expected), name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_checkpoints")
    make_dataset(folder / "data")
    for size in LAYOUTS:
        (folder / str(size)).mkdir()
    return folder


@pytest.fixture(scope="module")
def written(place: Path) -> dict[int, list[dict[str, tuple[Path, Trace, Trace, Trace]]]]:
    return {size: run_ranks(size, _write, place / "data", place / str(size)) for size in LAYOUTS}


@pytest.fixture(scope="module", params=[3, pytest.param(1, marks=pytest.mark.slow)], ids=["a third", "all"])
def read(request: pytest.FixtureRequest, place: Path, written: dict[int, Any]) -> dict[int, list[dict[Any, Trace]]]:
    paths = [written[size][0][name][0] for size in LAYOUTS for name in _readers(size)]
    ranks = {size: run_ranks(size, _read, place / "data", place / str(size), paths, request.param) for size in LAYOUTS}
    for size, found in ranks.items():
        pairs = {(name, path) for name in _readers(size) for path in paths}
        assert len(found[0]) * request.param == len(pairs)
        assert size == 1 or {path for _, path in found[0]} == set(paths)
    return ranks


@pytest.mark.parametrize("size", list(LAYOUTS))
def test_a_checkpoint_is_the_state_each_element_once(written: dict[int, Any], size: int) -> None:
    for name in LAYOUTS[size]:
        ranks = written[size]
        assert_stored(ranks[0][name][0], [rank[name][1] for rank in ranks], name)


@pytest.mark.parametrize("size", list(LAYOUTS))
def test_goes_on_bit_equal(written: dict[int, Any], size: int) -> None:
    for rank in written[size]:
        for name, (_, _, straight, again) in rank.items():
            assert_bit_equal(straight, again, name)


@pytest.mark.parametrize("size", list(LAYOUTS))
def test_any_layout_gets_the_same_state(read: dict[int, Any], size: int) -> None:
    ranks = read[size]
    for name, path in ranks[0]:
        assert_stored(path, [rank[name, path] for rank in ranks], name)


@pytest.mark.parametrize("size", list(LAYOUTS))
def test_any_layout_goes_on_with_the_same_loss(read: dict[int, Any], written: dict[int, Any], size: int) -> None:
    after = {path: trace.losses[0] for ranks in written.values() for path, _, trace, _ in ranks[0].values()}
    for (name, path), trace in read[size][0].items():
        if "bf16" not in name and "bf16" not in str(path):
            np.testing.assert_allclose(trace.losses[0], after[path], rtol=1e-5, err_msg=f"{name} from {path}")
