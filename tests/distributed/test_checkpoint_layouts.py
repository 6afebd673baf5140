"""A checkpoint goes on bit-equal on its own layout, and gives the very same state to every other layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.engine.deepspeed_patches import allow_cpu_fp16_for_tests
from megalm.engine.interface import StepResult
from megalm.model.transformer import LanguageModel
from megalm.planning.engine_checks import ALLOW_CPU_FP16
from tests.distributed.training import (
    Case,
    Trace,
    assert_bit_equal,
    make_dataset,
    shape_of,
    snapshot,
    start,
    steps,
    whole_state,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES = {
    "zero1": Case("zero1.json"),
    "zero2": Case("zero2.json"),
    "zero3": Case("zero3.json", settings=NO_PERSISTENCE),
    "zero3 persistent": Case("zero3.json"),
    "zero1 bf16": Case("zero1.json", precision="bf16"),
    "zero2 bf16": Case("zero2.json", precision="bf16"),
    "zero3 bf16": Case("zero3.json", precision="bf16", settings=NO_PERSISTENCE),
    "zero2 round robin": Case("zero2.json", settings={"zero_optimization": {"round_robin_gradients": True}}),
    "zero1 dropout": Case("zero1.json", overrides=("model.dropout=0.1", "model.attention_dropout=0.1")),
    "zero2 dropout recomputed": Case(
        "zero2.json", overrides=("model.dropout=0.1", "train.checkpoint_activations_every=1")
    ),
}
# Weights of which some are gathered through a second copy; frozen ones too, which no update renews.
_HPZ = {"zero_optimization": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 500}}
_FROZEN = "train.parameter_groups=[{match: 'layers.0.*', frozen: true}]"
ON_MORE_RANKS = {
    "zero3 hpz": Case("zero3.json", settings=_HPZ),
    "zero3 hpz frozen": Case("zero3.json", overrides=(_FROZEN,), settings=_HPZ),
}
HALF, END = 3, 5


def _cases(world_size: int) -> dict[str, Case]:
    return CASES if world_size == 1 else CASES | ON_MORE_RANKS


def _save(comm: Any, engine: Any, step: int, folder: Path) -> Path:
    facts = {"step": step, "tokens": 0, "counters": engine.counters()}
    return save_checkpoint(folder, step, engine.fragments(), facts, [], comm)


def _restored(comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path, path: Path) -> Any:
    engine, run, loader = start(comm, device, case, prefix, folder, initial_weights=False)
    _restore(engine, path)
    return engine, run, loader


def _restore(engine: Any, path: Path) -> None:
    reader = CheckpointReader(path)
    engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)


def _stop_and_go_on(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, tuple[Trace, Trace]]:
    """Per case: the undisturbed run's second half, and the same steps after saving and loading at the first's end."""
    result = {}
    for name, case in _cases(comm.size).items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        steps(engine, run, loader, 1, HALF)
        path = _save(comm, engine, HALF, folder / name)
        straight = steps(engine, run, loader, HALF + 1, END)
        loader.close()
        engine, run, loader = _restored(comm, device, case, prefix, folder, path)
        result[name] = (straight, steps(engine, run, loader, HALF + 1, END))
        loader.close()
    return result


def _train_and_save(comm: Any, device: torch.device, prefix: Path, folder: Path, names: list[str]) -> None:
    for name in names:
        engine, run, loader = start(comm, device, CASES[name], prefix, folder)
        steps(engine, run, loader, 1, HALF)
        _save(comm, engine, HALF, folder / name)
        loader.close()


def _loss_scales(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Any]:
    """Per ZeRO stage in fp16: what each step of the second half said, undisturbed and resumed, and the end state."""
    os.environ[ALLOW_CPU_FP16] = "1"
    allow_cpu_fp16_for_tests()
    # It starts too high, so that updates are skipped, and grows every other step, so that it overflows again.
    scale = {"fp16": {"initial_scale_power": 26, "loss_scale_window": 2, "hysteresis": 2}}
    result = {}
    for name in ("zero1", "zero2", "zero3"):
        case = Case(f"{name}.json", precision="fp16", settings=scale)

        def go(engine: Any, run: Any, loader: Any, first: int, last: int) -> list[StepResult]:
            return [
                engine.train_step(loader.batch((step - 1) * run.batch.global_batch), step, 1e-3)
                for step in range(first, last + 1)
            ]

        engine, run, loader = start(comm, device, case, prefix, folder)
        first = go(engine, run, loader, 1, 7)
        path = _save(comm, engine, 7, folder / name)
        straight = go(engine, run, loader, 8, 16), engine.counters(), snapshot(engine)
        loader.close()
        engine, run, loader = _restored(comm, device, case, prefix, folder, path)
        result[name] = first, straight, (go(engine, run, loader, 8, 16), engine.counters(), snapshot(engine))
        loader.close()
    return result


def _scales_elsewhere(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, float]:
    """ "precision of the checkpoint, of the engine" -> the scale of the first step after loading."""
    os.environ[ALLOW_CPU_FP16] = "1"
    allow_cpu_fp16_for_tests()
    cases = {
        "bf16": Case("zero2.json", precision="bf16"),
        "fp16": Case("zero1.json", precision="fp16", settings={"fp16": {"initial_scale_power": 7}}),
        "fixed": Case("zero1.json", precision="fp16", settings={"fp16": {"loss_scale": 4.0}}),
    }
    paths, found = {}, {}
    for name, case in cases.items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        steps(engine, run, loader, 1, 1)
        paths[name] = _save(comm, engine, 1, folder / name)
        loader.close()
    for name, case in cases.items():
        for source, path in paths.items():
            engine, run, loader = _restored(comm, device, case, prefix, folder, path)
            found[f"{source}, {name}"] = engine.train_step(loader.batch(0), 2, 1e-3).loss_scale
            loader.close()
    return found


def _load(comm: Any, device: torch.device, prefix: Path, folder: Path, paths: list[Path]) -> Any:
    """Per case and checkpoint: the state right after loading, and the loss of the next step.

    Two ranks load every other checkpoint, four those between: each case of several ranks loads each of them.
    """
    result = {}
    cases = {name: case for name, case in _cases(comm.size).items() if "dropout" not in name and "frozen" not in name}
    for number, (name, case) in enumerate(cases.items()):
        engine, run, loader = start(comm, device, case, prefix, folder)
        for path in paths if comm.size == 1 else paths[(number + comm.size // 2) % 2 :: 2]:
            _restore(engine, path)
            loaded = snapshot(engine)
            after = steps(engine, run, loader, HALF + 1, HALF + 1)
            result[name, str(path)] = Trace(after.losses, after.norms, loaded)
        loader.close()
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    make_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def resumed(place: Path) -> dict[int, Any]:
    result = {}
    for world_size in (1, 2):
        (place / str(world_size)).mkdir()
        result[world_size] = run_ranks(world_size, _stop_and_go_on, place / "data", place / str(world_size))
    return result


@pytest.mark.parametrize(("name", "world_size"), [(name, size) for size in (1, 2) for name in _cases(size)])
def test_goes_on_bit_equal(resumed: dict[int, Any], name: str, world_size: int) -> None:
    for rank in resumed[world_size]:
        straight, again = rank[name]
        assert_bit_equal(straight, again)


def test_the_loss_scale_goes_on_too(place: Path) -> None:
    """fp16: skipped updates, the scale, its countdown and hysteresis; bit-equal losses, weights and moments."""
    (place / "fp16").mkdir()
    for rank in run_ranks(2, _loss_scales, place / "data", place / "fp16"):
        for name, (first, straight, again) in rank.items():
            assert any(step.skipped for step in first), name
            assert any(step.skipped for step in straight[0]), name
            assert len({step.loss_scale for step in straight[0]}) > 1, name
            assert [repr(step) for step in again[0]] == [repr(step) for step in straight[0]]  # nan is not nan
            assert again[1] == straight[1]
            for (key, expected), (other, found) in zip(straight[2], again[2], strict=True):
                assert key == other
                np.testing.assert_array_equal(found, expected, err_msg=f"{name}: {key}")


def test_a_loss_scale_is_of_the_precision_that_it_was_found_in(place: Path) -> None:
    """fp16 that goes on from bf16 would start at a scale of 1, at which small gradients are zero."""
    (place / "elsewhere").mkdir()
    (found,) = run_ranks(1, _scales_elsewhere, place / "data", place / "elsewhere")
    dynamic = {"fp16, fp16": 2.0**7, "bf16, fp16": 2.0**7, "fixed, fp16": 2.0**7}
    fixed = {"fp16, fixed": 4.0, "bf16, fixed": 4.0, "fixed, fixed": 4.0}
    assert found == {**dynamic, **fixed, "fp16, bf16": 1.0, "bf16, bf16": 1.0, "fixed, bf16": 1.0}


@pytest.fixture(scope="module")
def crossed(place: Path, resumed: dict[int, Any]) -> dict[int, Any]:
    (place / "4").mkdir()
    run_ranks(4, _train_and_save, place / "data", place / "4", ["zero1", "zero3"])
    saved = [(1, "zero1"), (1, "zero2 bf16"), (2, "zero3 hpz"), (2, "zero2 bf16"), (4, "zero1"), (4, "zero3")]
    paths = [place / str(size) / name / f"step-{HALF:08d}" for size, name in saved]
    result = {}
    for world_size in (1, 2, 4):
        folder = place / f"load-{world_size}"
        folder.mkdir()
        result[world_size] = run_ranks(world_size, _load, place / "data", folder, paths)
    return result


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_gets_the_same_state(crossed: dict[int, Any], world_size: int) -> None:
    ranks = crossed[world_size]
    assert len(ranks[0]) == (8 * 6 if world_size == 1 else 9 * 3)
    for name, path in ranks[0]:
        reader = CheckpointReader(Path(path))
        state = whole_state([rank[name, path] for rank in ranks])
        for (parameter, kind), values in state.items():
            stored = _stored(reader, parameter, kind)
            np.testing.assert_array_equal(values, stored, err_msg=f"{name} from {path}: {kind} of {parameter}")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_goes_on_with_the_same_loss(
    crossed: dict[int, Any], resumed: dict[int, Any], world_size: int
) -> None:
    """fp32 into fp32: the next loss is the undisturbed run's, to 1e-5."""
    expected = resumed[1][0]["zero1"][0].losses[0]
    for (name, path), trace in crossed[world_size][0].items():
        if "bf16" not in name and "bf16" not in path:
            np.testing.assert_allclose(trace.losses[0], expected, rtol=1e-5, err_msg=f"{name} from {path}")


def test_safetensors_alone_gives_the_model_back(place: Path, resumed: dict[int, Any]) -> None:
    """A one-rank folder read with the library only, and any folder with the reader, is the fp32 model."""
    path = place / "1" / "zero1" / f"step-{HALF:08d}"
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        weights = {name.removeprefix("master/"): file.get_tensor(name) for name in file.keys() if "master/" in name}  # noqa: SIM118
    from tests.distributed.training import resolved

    model = LanguageModel(shape_of(resolved(CASES["zero1"], 1, place)))
    model.load_state_dict(weights)
    two_ranks = CheckpointReader(place / "2" / "zero1" / f"step-{HALF:08d}").model()
    assert two_ranks.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(two_ranks[name], weight, rtol=0, atol=2e-4)


def _stored(reader: CheckpointReader, name: str, kind: str) -> np.ndarray:
    """The whole parameter from the files, by hand."""
    entry = reader.manifest.tensors[name]
    whole = np.full(int(np.prod(entry.shape)), np.nan, np.float32)
    for stored in entry.fragments:
        if stored.kind == kind:
            with safe_open(reader.path / stored.file, framework="np") as file:
                whole[stored.start : stored.stop] = file.get_tensor(f"{kind}/{name}").reshape(-1)
    return whole
