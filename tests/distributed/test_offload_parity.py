"""Offload to the CPU trains the same model as ZeRO 1 on one rank, and goes on bit-equal.

DeepSpeed's CPUAdam is another implementation of AdamW than torch's: it rounds in another order, which costs as much as
another layout does. It is compiled at its first use, which takes a minute or two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from tests.distributed.training import Case, Trace, assert_bit_equal, make_dataset, snapshot, start, steps, whole_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES = {
    "zero2_offload": Case("zero2_offload.json"),
    "zero3_offload": Case("zero3_offload.json", settings=NO_PERSISTENCE),
}
# With heads of two elements, the second rank's part of the pattern's group is padding alone.
_GROUP = "train.parameter_groups=[{match: layers.1.attention.query_norm.*, learning_rate_scale: 0.5}]"
RESUMED = CASES | {"zero2_offload groups": Case("zero2_offload.json", overrides=("model.head_dim=2", _GROUP))}
HALF, END = 10, 20


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, tuple[Trace, Trace, Trace]]:
    """Per case: both halves of an undisturbed run, and the second half after saving and loading."""
    traces = {}
    for name, case in RESUMED.items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        first = steps(engine, run, loader, 1, HALF)
        facts = {"step": HALF, "tokens": 0, "counters": engine.counters()}
        path = save_checkpoint(folder / name, HALF, engine.fragments(), facts, [], comm)
        second = steps(engine, run, loader, HALF + 1, END)
        loader.close()
        engine, run, loader = start(comm, device, case, prefix, folder)
        reader = CheckpointReader(path)
        engine.restore(reader.read, reader.manifest.counters, HALF)
        traces[name] = (first, second, steps(engine, run, loader, HALF + 1, END))
        loader.close()
    return traces


def _reference(comm: Any, device: torch.device, prefix: Path, folder: Path) -> Trace:
    engine, run, loader = start(comm, device, Case("zero1.json"), prefix, folder)
    trace = steps(engine, run, loader, 1, END)
    loader.close()
    return trace


def _cross(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[tuple[str, str], Trace]:
    """Per pair of layouts: the state of the second, right after it has loaded what the first had saved."""
    plain = {"zero1": Case("zero1.json"), "zero3": Case("zero3.json", settings=NO_PERSISTENCE)}
    paths, states = {}, {}
    for name, case in (CASES | plain).items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        states[name, name] = steps(engine, run, loader, 1, 3)
        facts = {"step": 3, "counters": engine.counters()}
        paths[name] = save_checkpoint(folder / f"cross {name}", 3, engine.fragments(), facts, [], comm)
        loader.close()
    for name, case in (CASES | plain).items():
        for other in paths if name in CASES else CASES:
            if other != name:
                engine, _, loader = start(comm, device, case, prefix, folder)
                reader = CheckpointReader(paths[other])
                engine.restore(reader.read, reader.manifest.counters, 3)
                states[other, name] = Trace([], [], snapshot(engine))
                loader.close()
    return states


def test_any_layout_gets_the_same_state(results: Any, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    ranks = run_ranks(2, _cross, tmp_path / "data", tmp_path)
    assert len(ranks[0]) == 4 + 2 * 3 + 2 * 2
    for saved, loaded in ranks[0]:
        expected = whole_state([rank[saved, saved] for rank in ranks])
        found = whole_state([rank[saved, loaded] for rank in ranks])
        assert expected.keys() == found.keys()
        for place, values in expected.items():
            np.testing.assert_array_equal(found[place], values, err_msg=f"{saved} into {loaded}: {place}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("offload")
    make_dataset(folder / "data")
    reference = run_ranks(1, _reference, folder / "data", folder)[0]
    return reference, run_ranks(2, _train, folder / "data", folder, timeout_seconds=560)


@pytest.mark.parametrize("name", list(CASES))
def test_equal_to_one_rank(results: tuple[Trace, list[dict[str, Any]]], name: str) -> None:
    reference, ranks = results
    for rank in ranks:
        first, second, _ = rank[name]
        np.testing.assert_allclose(first.losses + second.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(first.norms + second.norms, reference.norms, rtol=1e-4)
    expected, found = whole_state([reference]), whole_state([rank[name][1] for rank in ranks])
    assert expected.keys() == found.keys()
    for place, values in expected.items():
        assert np.abs(found[place] - values).max() < 2e-4, place


@pytest.mark.parametrize("name", list(RESUMED))
def test_goes_on_as_undisturbed(results: tuple[Trace, list[dict[str, Any]]], name: str) -> None:
    """Bit-equal. CPUAdam keeps powers of beta as a running product, which a resume has to multiply up again."""
    for rank in results[1]:
        _, straight, again = rank[name]
        assert_bit_equal(straight, again)
