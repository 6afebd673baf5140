"""Weights gathered through second copies (hpZ) train what ZeRO 3 trains without them, bit for bit, with every feature.

Two groups of two ranks. Checkpoints of all layouts and with frozen weights alone are in test_checkpoint_layouts.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from tests.distributed.training import Case, Trace, make_dataset, snapshot, start, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

HALF, END = 2, 3
FROZEN = "train.parameter_groups=[{match: 'layers.0.*', frozen: true}]"
AVERAGE = "train.ema_decay=0.5"
MUON = {"type": "Muon", "params": {"weight_decay": 0.1, "betas": [0.9, 0.95]}}
# Overrides, sections of ZeRO, other sections of the JSON.
Feature = tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]
FEATURES: dict[str, Feature] = {
    "8-bit states, average, frozen": (("train.optimizer_state=8bit", AVERAGE, FROZEN), {}, {}),
    "Muon, average, frozen": ((AVERAGE, FROZEN), {}, {"optimizer": MUON}),
    "offloaded optimizer, frozen": ((FROZEN,), {"offload_optimizer": {"device": "cpu"}}, {}),
}


def _case(feature: Feature, **second_copy: int) -> Case:
    overrides, zero, sections = feature
    # Small parameters are on every rank, the others are gathered.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 500, **zero, **second_copy}
    sizes = {"train_micro_batch_size_per_gpu": 2}
    return Case("zero3.json", "bf16", overrides, {**sizes, "zero_optimization": zero, **sections})


Traces = dict[str, list[tuple[Trace, Trace, str]]]


def _go_on(engine: Any, run: Any, loader: Any) -> tuple[Trace, str]:
    validated = str(engine.evaluate(loader.batch(run.stages.samples(END)).micro_batches))
    return steps(engine, run, loader, HALF + 1, END), validated


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> Traces:
    """Per feature the state at HALF, the steps after it, and a validation between.

    Without second copies, with them, and with them again from the checkpoint of the first.
    """
    found: Traces = {name: [] for name in FEATURES}
    for name, feature in FEATURES.items():
        path = folder / name / f"step-{HALF:08d}"
        for case in (_case(feature), _case(feature, zero_hpz_partition_size=2)):
            engine, run, loader = start(comm, device, case, prefix, folder)
            half = steps(engine, run, loader, 1, HALF)
            if not found[name]:
                facts = {"step": HALF, "tokens": 0, "counters": engine.counters()}
                save_checkpoint(folder / name, HALF, engine.fragments(), facts, [], comm)
            found[name].append((half, *_go_on(engine, run, loader)))
            if len(found[name]) == 2:
                reader = CheckpointReader(path)
                engine.restore(reader.read, reader.manifest.counters, HALF)
                restored = Trace(half.losses, half.norms, snapshot(engine))
                found[name].append((restored, *_go_on(engine, run, loader)))
            loader.close()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Traces]:
    folder = tmp_path_factory.mktemp("second copies")
    make_dataset(folder / "data")
    return run_ranks(4, _train, folder / "data", folder)


@pytest.mark.parametrize("name", FEATURES)
def test_second_copies_change_no_bit(trained: list[Traces], name: str) -> None:
    for rank in trained:
        plain, *copies = rank[name]
        for each in copies:
            assert str(each[2]) == str(plain[2])
            for found, expected in zip(each[:2], plain[:2], strict=True):
                assert (found.losses, found.norms) == (expected.losses, expected.norms)
                for (key, values), (other, wanted) in zip(found.fragments, expected.fragments, strict=True):
                    assert key == other
                    np.testing.assert_array_equal(values, wanted, err_msg=str(key))
