"""The state of a pipeline: saved and loaded across layouts, continued, refused.

Bit for bit: masters, moments and the weights made of them, into and out of pipelines; what a pipeline does after
loading its own checkpoint, dropout included; the two copies of a tied weight. Across layouts the next fp32 loss agrees
to 1e-5: the same numbers are added in another order.
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
from tests.distributed.test_update_check import REFUSED, STEPS, assert_same, refuse_and_leave_out
from tests.distributed.training import (
    Case,
    Trace,
    assert_bit_equal,
    assert_stored,
    make_dataset,
    snapshot,
    start,
    steps,
    whole_state,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

GPT2 = ("model.num_hidden_layers=4", "model.style=gpt2", "model.qk_norm=false", "model.tie_word_embeddings=true")
PIPELINE = (*GPT2, "parallel.pipeline=2")
INTERLEAVED = (*PIPELINE, "parallel.virtual_stages=2")
ZB_V = (*INTERLEAVED, "parallel.pipeline_schedule=zb_v")
DROPOUT = ("model.dropout=0.1", "train.checkpoint_activations_every=2")
MICRO = {"train_micro_batch_size_per_gpu": 2}
NO_ZERO = MICRO | {"zero_optimization": {"stage": 0}}
CASES: dict[int, dict[str, Case]] = {
    1: {"zero1": Case("zero1.json", "fp32", GPT2, MICRO)},
    2: {
        "data zero3": Case("zero3.json", "fp32", GPT2, MICRO),
        "data zero2 bf16": Case("zero2.json", "bf16", GPT2, MICRO),
        "pipeline": Case("pipeline.json", "fp32", PIPELINE, MICRO),
        "pipeline zero0": Case("pipeline.json", "fp32", PIPELINE, NO_ZERO),
        "pipeline bf16": Case("pipeline.json", "bf16", PIPELINE, MICRO),
        "pipeline dropout": Case("pipeline.json", "fp32", (*PIPELINE, *DROPOUT), MICRO),
        "pipeline interleaved": Case("pipeline.json", "fp32", INTERLEAVED, MICRO),
    },
    4: {
        "pipeline zb_v data": Case("pipeline.json", "fp32", ZB_V, MICRO),
        "pipeline data zero0": Case("pipeline.json", "fp32", PIPELINE, NO_ZERO),
        "pipeline tensor bf16": Case("pipeline.json", "bf16", (*PIPELINE, "parallel.tensor=2"), MICRO),
    },
}
READ = {
    1: ("zero1",),
    2: ("data zero2 bf16", "pipeline zero0", "pipeline interleaved"),
    4: ("pipeline zb_v data", "pipeline tensor bf16"),
}
HALF, END = 3, 5


def _write(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    """Per case: a checkpoint, its state, the steps after it, and the same steps from the checkpoint."""
    found = {}
    for name, case in CASES[comm.size].items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        before = steps(engine, run, loader, 1, HALF)
        facts = {"step": HALF, "tokens": 0, "counters": engine.counters()}
        path = save_checkpoint(folder / name, HALF, engine.fragments(), facts, [], comm)
        straight = steps(engine, run, loader, HALF + 1, END)
        loader.close()
        engine, run, loader = start(comm, device, case, prefix, folder)
        _restore(engine, path)
        again = steps(engine, run, loader, HALF + 1, END)
        loader.close()
        found[name] = (path, before, straight, again, _tied_weight(engine))
    return found


def _read(comm: Any, device: torch.device, prefix: Path, folder: Path, paths: list[Path]) -> dict[Any, Trace]:
    """Per case and checkpoint: the state after loading, and the next step."""
    found = {}
    for name, case in CASES[comm.size].items():
        if "dropout" in name:
            continue
        engine, run, loader = start(comm, device, case, prefix, folder)
        for path in paths:
            reader = _restore(engine, path)
            loaded = snapshot(engine)
            if "pipeline" in name:
                _assert_weights_are(engine, reader)
            after = steps(engine, run, loader, HALF + 1, HALF + 1)
            found[name, path] = Trace(after.losses, after.norms, loaded)
        loader.close()
    return found


def _restore(engine: Any, path: Path) -> CheckpointReader:
    reader = CheckpointReader(path)
    engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
    return reader


def _assert_weights_are(engine: Any, reader: CheckpointReader) -> None:
    masters = reader.model()
    for name, parameter in engine._part.named_parameters():
        expected = shard_of(parameter).cut(masters[name]).to(parameter.dtype)
        assert torch.equal(parameter.data, expected), name


def _tied_weight(engine: Any) -> np.ndarray | None:
    """The copy on this rank, if it is of the first or the last stage of a pipeline."""
    if not hasattr(engine, "_pipeline"):
        return None
    weight = dict(engine._part.named_parameters()).get("embedding.tokens.weight")
    return None if weight is None else weight.detach().float().numpy().copy()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline_state")
    make_dataset(folder / "data")
    for size in (*CASES, "gate"):
        (folder / str(size)).mkdir()
    return folder


@pytest.fixture(scope="module")
def written(place: Path) -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, _write, place / "data", place / str(size)) for size in CASES}


@pytest.fixture(scope="module")
def read(place: Path, written: dict[int, Any]) -> dict[int, list[dict[Any, Trace]]]:
    paths = [written[size][0][name][0] for size, names in READ.items() for name in names]
    return {size: run_ranks(size, _read, place / "data", place / str(size), paths) for size in CASES}


@pytest.mark.parametrize("size", list(CASES))
def test_a_checkpoint_is_the_state_each_element_once(written: dict[int, Any], size: int) -> None:
    for name in CASES[size]:
        path, states = written[size][0][name][0], [rank[name][1] for rank in written[size]]
        assert {parameter for parameter, _ in whole_state(states)} == set(CheckpointReader(path).shapes())
        assert_stored(path, states, name)


@pytest.mark.parametrize("size", list(CASES))
def test_goes_on_bit_equal(written: dict[int, Any], size: int) -> None:
    for rank in written[size]:
        for name, (_, _, straight, again, _) in rank.items():
            assert_bit_equal(straight, again, name)


def test_copies_of_a_tied_weight_stay_equal(written: dict[int, Any]) -> None:
    for name in ("pipeline", "pipeline zero0", "pipeline bf16", "pipeline dropout", "pipeline interleaved"):
        first, last = (rank[name][4] for rank in written[2])
        np.testing.assert_array_equal(first, last, err_msg=name)
    for name in ("pipeline data zero0", "pipeline tensor bf16"):  # ranks 0 and 1 are the first stage, 2 and 3 the last
        copies = [rank[name][4] for rank in written[4]]
        np.testing.assert_array_equal(copies[0], copies[2], err_msg=name)
        np.testing.assert_array_equal(copies[1], copies[3], err_msg=name)


@pytest.mark.parametrize("size", list(CASES))
def test_any_layout_gets_the_same_state(read: dict[int, Any], size: int) -> None:
    ranks = read[size]
    assert len(ranks[0]) == 6 * len([name for name in CASES[size] if "dropout" not in name])
    for name, path in ranks[0]:
        assert_stored(path, [rank[name, path] for rank in ranks], name)


@pytest.mark.parametrize("size", list(CASES))
def test_any_layout_goes_on_with_the_same_loss(read: dict[int, Any], written: dict[int, Any], size: int) -> None:
    after = {path: straight.losses[0] for ranks in written.values() for path, _, straight, _, _ in ranks[0].values()}
    for (name, path), trace in read[size][0].items():
        if "bf16" not in name and "bf16" not in str(path):
            np.testing.assert_allclose(trace.losses[0], after[path], rtol=1e-5, err_msg=f"{name} from {path}")


GATED = ("pipeline", "pipeline zero0", "pipeline bf16", "pipeline interleaved")


def _gate(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    return {name: refuse_and_leave_out(comm, device, CASES[2][name], prefix, folder) for name in GATED}


@pytest.fixture(scope="module")
def gated(place: Path) -> list[dict[str, Any]]:
    return run_ranks(2, _gate, place / "data", place / "gate")


@pytest.mark.parametrize("name", GATED)
def test_a_refused_step_leaves_no_trace_on_any_stage(gated: list[dict[str, Any]], name: str) -> None:
    for found in (rank[name] for rank in gated):
        assert_same(found["before"], found["after"])
        assert_same(found["with refusal"], found["never seen"])
        assert [answer.refused for answer in found["answers"]] == [step == REFUSED for step in range(1, STEPS + 1)]
        assert found["asked"] == [(answer.loss, answer.grad_norm) for answer in found["answers"]]
        assert found["not a number"]["result"].refused  # the first stage's weights: the last one's loss
    assert gated[0][name]["asked"] == gated[1][name]["asked"]
