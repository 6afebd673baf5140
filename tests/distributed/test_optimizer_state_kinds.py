"""Moments in bf16 and 8 bits on every layout: they train as fp32 ones, go on bit-equal, and move to any other kind."""

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
LAYOUTS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "zero0": ("zero1.json", "fp32", (), {"zero_optimization": {"stage": 0}}),
    "zero1 bf16": ("zero1.json", "bf16", (), {}),
    "zero2": ("zero2.json", "fp32", (), {}),
    "zero3": ("zero3.json", "fp32", (), NO_PERSISTENCE),
    "tp2": ("zero2.json", "fp32", ("parallel.tensor=2",), {}),
    "pp2": ("zero1.json", "fp32", ("parallel.pipeline=2",), {}),
}
# bf16 differs from 8bit in the codec alone.
RUNS = [(layout, "8bit") for layout in LAYOUTS] + [("zero1 bf16", "bf16"), ("zero3", "bf16")]
MOVES = [("8bit", "fp32"), ("8bit", "bf16"), ("8bit", "8bit"), ("fp32", "8bit"), ("bf16", "8bit")]
HALF, END = 3, 6
# Mean distance of a master from the one of fp32 states, after six updates of up to 3e-3.
APART = {"bf16": 5e-5, "8bit": 4e-4}
# Of a moment that another kind or layout reads: of the value, and where that is small, of the block's largest.
READ = {"fp32": (0.0, 0.0), "bf16": (2.0**-8, 0.0), "8bit": (1 / 24, 2.0**-10)}


def _case(layout: str, kind: str) -> Case:
    json, precision, overrides, settings = LAYOUTS[layout]
    return Case(json, precision, (*overrides, f"train.optimizer_state={kind}", "train.ema_decay=0.9"), settings)


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> tuple[dict[Any, Any], dict[Any, Trace]]:
    """Per layout and kind a run's second half and the same steps after a resume; per move the state that is read."""
    trained: dict[Any, Any] = {}
    moved = {}
    place = prefix, folder
    for layout, kind in [*((layout, "fp32") for layout in LAYOUTS), *RUNS]:
        engine, run, loader = start(comm, device, _case(layout, kind), *place)
        steps(engine, run, loader, 1, HALF)
        facts = {"step": HALF, "tokens": 0, "counters": engine.counters()}
        path = save_checkpoint(folder / f"{layout} {kind}", HALF, engine.fragments(), facts, [], comm)
        straight = again = steps(engine, run, loader, HALF + 1, END)
        for _, other in (move for move in MOVES if layout == "zero3" and move[0] == kind):
            engine, _, _ = start(comm, device, _case("tp2", other), *place)
            moved[kind, other] = Trace([], [], snapshot(_restored(engine, path)))
        if kind != "fp32":
            engine, _, _ = start(comm, device, _case(layout, kind), *place)
            again = steps(_restored(engine, path), run, loader, HALF + 1, END)
        trained[layout, kind] = straight, again
        loader.close()
    return trained, moved


def _restored(engine: Any, path: Path) -> Any:
    reader = CheckpointReader(path)
    engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
    return engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    make_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[Any]:
    return run_ranks(2, _train, place / "data", place)


@pytest.mark.parametrize(("layout", "kind"), RUNS)
def test_a_resume_is_bit_equal(ranks: list[Any], layout: str, kind: str) -> None:
    for trained, _ in ranks:
        straight, again = trained[layout, kind]
        assert_bit_equal(straight, again)


@pytest.mark.parametrize(("layout", "kind"), RUNS)
def test_trains_as_fp32_states_do(ranks: list[Any], layout: str, kind: str) -> None:
    reference, mine = ([trained[layout, each][0] for trained, _ in ranks] for each in ("fp32", kind))
    np.testing.assert_allclose(mine[0].losses, reference[0].losses, rtol=2e-3)
    found = whole_state(mine)
    for (name, part), values in whole_state(reference).items():
        if part == "master":
            assert 0 < np.abs(found[name, part] - values).mean() < APART[kind], name


@pytest.mark.parametrize(("kind", "into"), MOVES)
def test_any_kind_and_layout_reads_a_checkpoint(ranks: list[Any], place: Path, kind: str, into: str) -> None:
    """From ZeRO 3 to a tensor group of two, where blocks are others: masters and averages are exact, moments nearly."""
    reader = CheckpointReader(next((place / f"zero3 {kind}").glob("step-*")))
    relative, of_largest = READ[into]
    if kind == into:  # levels are the same in every block, but for the smallest
        relative = 0.0
    for (name, part), values in whole_state([moved[kind, into] for _, moved in ranks]).items():
        stored = reader.read_parameter(name, reader.shapes()[name], part).numpy().reshape(-1)
        if part in ("master", "ema"):
            np.testing.assert_array_equal(values, stored)
        else:
            root = np.sqrt if part == "exp_avg_sq" else np.abs
            limit = relative * root(stored) + of_largest * root(stored).max()
            assert (np.abs(root(values) - root(stored)) <= limit).all(), name
