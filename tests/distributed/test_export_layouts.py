"""Whatever layout wrote a checkpoint, its export is the same files, byte for byte; any layout starts from an import."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.huggingface.export_model import export_checkpoint, plan_export
from megalm.huggingface.import_model import import_model
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from tests.distributed.training import Case, Trace, make_dataset, shape_of, snapshot, start, steps, whole_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

# No multiple of anything, and room for the ids of the bytes tokenizer.
LLAMA = ("model.vocab_size=301", "model.num_key_value_heads=2")
GPT2 = ("model.vocab_size=301", "model.style=gpt2", "model.qk_norm=false", "model.tie_word_embeddings=true")
NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
ONE_RANK = {"llama": Case("zero1.json", overrides=LLAMA), "gpt2": Case("zero1.json", overrides=GPT2)}
LAYOUTS: dict[str, dict[str, Case]] = {
    style: {
        "zero3": Case("zero3.json", overrides=words, settings=NO_PERSISTENCE),
        "tensor zero1": Case("zero1.json", overrides=(*words, TENSOR)),
        "tensor zero3": Case("zero3.json", overrides=(*words, TENSOR), settings=NO_PERSISTENCE),
        "pipeline zero1": Case("pipeline.json", overrides=(*words, PIPELINE)),
    }
    for style, words in (("llama", LLAMA), ("gpt2", GPT2))
}


def _save(comm: Any, engine: Any, run: Any, folder: Path) -> Path:
    shape = shape_of(run)
    facts = {
        "tokens": 0,
        "run": "layouts",
        "counters": engine.counters(),
        "model": asdict(shape),
        "tokenizer": "bytes",
        "fingerprints": {"tokenizer": load_tokenizer("bytes").fingerprint},
    }
    return save_checkpoint(folder, 2, engine.fragments(), facts, [], comm)


def _train(comm: Any, device: torch.device, prefix: Path, folder: Path) -> dict[str, Path]:
    """One rank, two steps."""
    written = {}
    for style, case in ONE_RANK.items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        steps(engine, run, loader, 1, 2)
        written[style] = _save(comm, engine, run, folder / style)
        loader.close()
    return written


def _take_over(comm: Any, device: torch.device, prefix: Path, folder: Path, paths: dict[str, Path]) -> dict[Any, Path]:
    """Each layout loads what one rank wrote, and writes it as it holds it."""
    written = {}
    for style, layouts in LAYOUTS.items():
        for name, case in layouts.items():
            engine, run, loader = start(comm, device, case, prefix, folder)
            reader = CheckpointReader(paths[style])
            engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
            written[style, name] = _save(comm, engine, run, folder / style / name)
            loader.close()
    return written


def _start_from(comm: Any, device: torch.device, prefix: Path, folder: Path, path: Path) -> dict[str, Trace]:
    """Each layout starts a run of its own from weights alone; its state before the first step, and that step."""
    found = {}
    for name, case in LAYOUTS["llama"].items() if comm.size > 1 else (("alone", ONE_RANK["llama"]),):
        engine, run, loader = start(comm, device, case, prefix, folder)
        reader = CheckpointReader(path)
        engine.restore(reader.read_weights, reader.manifest.counters, 0)
        engine.reset()
        loaded = snapshot(engine)
        first = steps(engine, run, loader, 1, 1)
        found[name] = Trace(first.losses, first.norms, loaded)
        loader.close()
    return found


def _files(checkpoint: Path, target: Path) -> dict[str, bytes]:
    """The export, in several files; its card tells of the run and its layout."""
    plan = plan_export(CheckpointReader(checkpoint), target, torch.float32, None)
    export_checkpoint(plan, 30_000, "it", lambda: None)
    return {path.name: path.read_bytes() for path in target.iterdir() if path.name != "README.md"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_dataset(folder / "data")
    for ranks in ("1", "2"):
        (folder / ranks).mkdir()
    return folder


@pytest.fixture(scope="module")
def written(place: Path) -> dict[str, Path]:
    """Per style: one rank's checkpoint."""
    return run_ranks(1, _train, place / "data", place / "1")[0]


def test_exports_of_all_layouts_are_the_same_bytes(place: Path, written: dict[str, Path], tmp_path: Path) -> None:
    together, _ = run_ranks(2, _take_over, place / "data", place / "2", written)
    assert len(together) == 8
    expected = {style: _files(path, tmp_path / style / "alone") for style, path in written.items()}
    for (style, name), path in together.items():
        assert len(list(path.glob("rank-*.safetensors"))) == 2, (style, name)
        found = _files(path, tmp_path / style / name)
        assert len([file for file in found if file.endswith(".safetensors")]) > 3
        assert found.keys() == expected[style].keys(), (style, name)
        assert [file for file in found if found[file] != expected[style][file]] == [], (style, name)


def test_every_layout_starts_from_an_import(place: Path, written: dict[str, Path], tmp_path: Path) -> None:
    _files(written["llama"], tmp_path / "out")
    imported = import_model(HuggingFaceFolder(tmp_path / "out"), tmp_path / "run", None, lambda: None).checkpoint
    (alone,) = run_ranks(1, _start_from, place / "data", place / "1", imported)
    together = run_ranks(2, _start_from, place / "data", place / "2", imported)
    weights = CheckpointReader(written["llama"]).model()
    for name in together[0]:
        state = whole_state([rank[name] for rank in together])
        for (parameter, kind), values in state.items():
            expected = weights[parameter].flatten().numpy() if kind == "master" else np.zeros_like(values)
            np.testing.assert_array_equal(values, expected, err_msg=f"{name} {parameter} {kind}")
        np.testing.assert_allclose(together[0][name].losses, alone["alone"].losses, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(together[0][name].norms, alone["alone"].norms, rtol=1e-4, err_msg=name)
