"""The biases of experts follow the load of the whole global batch, on every layout, and move with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.parity.state_comparison import Trace, whole_state
from tests.distributed.training import Case, make_dataset, snapshot, start
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

RATE = 0.01
MODEL = (
    "model.num_experts=4",
    "model.moe_intermediate_size=24",
    "model.router_scores=sigmoid",
    "model.expert_bias=true",
    "model.initializer_range=0.2",
    f"train.expert_bias_rate={RATE}",
    "train.router_aux_loss=0",
)
BATCH = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
LAYOUTS = {
    "dp2 zero 3": ("zero3.json", ()),
    "tp2 zero 2": ("zero2.json", ("parallel.tensor=2",)),
    "pp2 zero 1": ("zero1.json", ("parallel.pipeline=2",)),
}
SAVED, STEPS = 2, 4


def biases(fragments: list[Any]) -> dict[str, Any]:
    return {key.name: values for key, values in fragments if key.name.endswith("expert_bias")}


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    other: Path | None = None
    for name, (json, words) in LAYOUTS.items():
        case = Case(json, overrides=(*MODEL, *words), settings=BATCH)
        engine, run, loader = start(comm, device, case, prefix, folder)
        facts = found[name] = {"counts": []}

        def step(number: int, rate: float = 1e-3) -> None:
            batch = loader.batch(run.stages.samples(number - 1))  # noqa: B023  (called in this turn of the loop)
            routing = engine.train_step(batch, number, rate).routing  # noqa: B023
            facts["counts"].append(routing.counts)  # noqa: B023

        step(1, rate=0.0)
        engine.reset()
        facts["at rate zero"] = biases(snapshot(engine))
        facts["counts"].clear()
        for number in range(1, STEPS + 1):
            step(number)
            if number == SAVED:
                manifest = {"step": SAVED, "tokens": 0, "counters": engine.counters()}
                own = save_checkpoint(folder / name, SAVED, engine.fragments(), manifest, [], comm)
                facts["saved"] = biases(snapshot(engine))
        facts["last"] = snapshot(engine)
        for place in filter(None, (own, other)):
            reader = CheckpointReader(place)
            engine.restore(reader.read, reader.manifest.counters, SAVED)
            facts["loaded" if place == own else "moved"] = biases(snapshot(engine))
            if place == own:
                for number in range(SAVED + 1, STEPS + 1):
                    step(number)
                facts["again"] = snapshot(engine)
        facts["kinds"] = {key: CheckpointReader(own).kinds(key) for key in facts["saved"]}
        loader.close()
        other = own
    return found


def test_biases_follow_the_load_and_move_to_other_layouts(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    ranks = run_ranks(2, _train, tmp_path / "data", tmp_path)
    before: dict[str, Any] | None = None
    for name in LAYOUTS:
        own = [rank[name] for rank in ranks]
        together = {what: {**own[0][what], **own[1][what]} for what in ("at rate zero", "saved", "loaded")}
        assert sorted(together["saved"]) == [f"layers.{layer}.mlp.router.expert_bias" for layer in range(2)], name
        assert sum(len(each["saved"]) for each in own) == 2, "each is saved once"
        assert not any(values.any() for values in together["at rate zero"].values()), name
        expected = np.zeros((2, 4), dtype=np.float32)
        for counts in own[0]["counts"][:SAVED]:
            load = np.array(counts)
            assert (load.sum(1) == 16 * 24 * 2).all()
            expected += np.float32(RATE) * np.sign(load.mean(1, keepdims=True) - load).astype(np.float32)
        assert expected.any()
        for layer, values in enumerate(expected):
            place = f"layers.{layer}.mlp.router.expert_bias"
            np.testing.assert_array_equal(together["saved"][place], values)
            np.testing.assert_array_equal(together["loaded"][place], values)
            if before is not None:
                np.testing.assert_array_equal({**own[0]["moved"], **own[1]["moved"]}[place], before[place])
        last, again = (whole_state([Trace([], [], each[what]) for each in own]) for what in ("last", "again"))
        assert last.keys() == again.keys()
        assert all(np.array_equal(values, again[place]) for place, values in last.items()), "a resume, bit for bit"
        assert {kinds for each in own for kinds in each["kinds"].values()} == {("master",)}
        before = together["saved"]
