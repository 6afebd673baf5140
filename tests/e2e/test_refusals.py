"""What cannot run is refused in one line, with exit code 2, before a process group or a model exists.

Once by each launcher: python and torchrun here, Slurm in test_slurm_train.py; all other reasons in forked processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, pretrain, rows, run_folder, write_json
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

# Importing torch is most of it, a few seconds; on a machine with other work to do it takes several times as long.
MOST_SECONDS = 120.0
STARTED_AFRESH = "unknown key"


@dataclass(frozen=True)
class Case:
    """`words` of the command and `json_changes` of ds_configs/fp32.json; `said` has to be in the line."""

    words: tuple[str, ...]
    said: tuple[str, ...]
    json_changes: dict[str, object] | None = None


CASES = {
    "unknown key": Case(("train.stepps=5",), ("train.stepps", "train.steps")),
    "unknown section": Case(("models.hidden_size=5",), ("models.hidden_size", "model.hidden_size")),
    "no number": Case(("train.steps=many",), ('train.steps="many"',)),
    "no key=value": Case(("train.steps",), ("'train.steps'", "key=value")),
    "unknown preset": Case(("--config", "quickstrat"), ("quickstrat", "quickstart")),
    "mistyped JSON key": Case((), ("gradient_cliping", "gradient_clipping"), {"gradient_cliping": 1.0}),
    "mistyped JSON key at depth": Case(
        (),
        ("optimizer.params.weight_decy", "weight_decay"),
        {"optimizer": {"type": "AdamW", "params": {"weight_decy": 0}}},
    ),
    "mistyped ZeRO key": Case(
        (),
        ("zero_optimization.reduce_bucket_sise", "reduce_bucket_size"),
        {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}},
    ),
    "a fact in both files": Case(("train_batch_size=8",), ("train_batch_size",)),
    "batch that does not divide": Case((), ("train_batch_size", "16", "3"), {"train_micro_batch_size_per_gpu": 3}),
    "heads": Case(("model.num_attention_heads=5",), ("model.hidden_size=64", "model.num_attention_heads=5")),
    "groups of heads": Case(("model.num_key_value_heads=3",), ("model.num_key_value_heads=3",)),
    "missing dataset": Case(("data.train=nowhere/text",), ("nowhere/text.bin", "build_dataset.py")),
    "missing tokenizer": Case(("data.tokenizer=nowhere.model",), ("nowhere.model",)),
    "positions": Case(("model.max_position_embeddings=32",), ("data.sequence_length=64", "max_position_embeddings=32")),
    "warm-up": Case(("train.steps=2",), ("schedule.warmup_steps=2", "train.steps=2")),
    "a grid of other ranks": Case(("parallel.tensor=2",), ("parallel.tensor=2", "1 rank")),
}


def refused(folder: Path, words: tuple[str, ...], json_file: Path | str = "fp32.json") -> str:
    """The one line that the command wrote to stderr."""
    finished = finish(folder, pretrain(*words, json_file=json_file))
    return one_line(finished)


def one_line(finished: Finished) -> str:
    assert finished.code == 2, finished.explain()
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.explain()
    assert lines[0].startswith("megalm: "), finished.explain()
    assert finished.left == []
    return lines[0]


@pytest.mark.parametrize("name", list(CASES))
def test_one_line_before_anything_starts(small_data: SmallData, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    json_file = write_json(tmp_path / "ds.json", **(case.json_changes or {}))
    using = "python" if name == STARTED_AFRESH else "forked"
    command = pretrain(*small_data.changed(*case.words), using=using, json_file=json_file)
    finished = finish(tmp_path, command)
    line = one_line(finished)
    for words in case.said:
        assert words in line
    if case.json_changes:
        assert str(json_file) in line
    assert finished.stdout == ""
    assert finished.seconds < MOST_SECONDS
    assert not (tmp_path / "runs").exists()


def test_everything_that_is_wrong_is_reported_at_once(small_data: SmallData, tmp_path: Path) -> None:
    """Of the command line, of the JSON, and of the rules across both; one line each after a first one."""
    json_file = write_json(tmp_path / "ds.json", gradient_cliping=1.0, optimizer={"type": "Lamb", "params": {"lr": 1}})
    words = (*small_data.changed("train.stepps=5"), "model.num_attention_heads=5")
    finished = finish(tmp_path, pretrain(*words, json_file=json_file))
    assert finished.code == 2, finished.explain()
    first, *others = finished.stderr.splitlines()
    assert first.startswith("megalm: ")
    for said in ("train.stepps", "gradient_cliping", 'optimizer.type="Lamb"', "model.num_attention_heads=5"):
        assert sum(said in line for line in others) == 1, said
    assert len(others) == 4, finished.explain()
    assert not (tmp_path / "runs").exists()


def test_a_json_that_is_not_there(small_data: SmallData, tmp_path: Path) -> None:
    assert "zero9.json" in refused(tmp_path, small_data.words, tmp_path / "zero9.json")


def test_a_dataset_of_another_tokenizer(small_data: SmallData, tmp_path: Path) -> None:
    line = refused(tmp_path, small_data.changed("data.tokenizer=bytes", "run.name=mine"))
    assert str(small_data.prefix) in line
    assert "bytes" in line
    assert "257" in line
    assert not list((tmp_path / "runs").iterdir()), "nothing is left of a run that never began"
    finished = finish(tmp_path, pretrain(*small_data.words, "run.name=mine", "train.steps=3"))
    assert finished.code == 0, finished.explain()


def test_more_epochs_than_wanted(small_data: SmallData, tmp_path: Path) -> None:
    line = refused(tmp_path, (*small_data.words, "data.max_epochs=0.5"))
    assert str(small_data.prefix) in line
    assert "400 steps" in line
    assert "data.max_epochs=0.5" in line


@pytest.fixture(scope="module")
def trained(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    finished = finish(folder, pretrain(*small_data.words, "run.name=mine", "train.steps=4"))
    assert finished.code == 0, finished.explain()
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A finished run of one's own to damage."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_name_that_exists(small_data: SmallData, copy: Path) -> None:
    line = refused(copy, (*small_data.words, "run.name=mine"))
    assert "runs/mine" in line
    assert "--resume auto" in line


def test_a_checkpoint_that_is_not_there(small_data: SmallData, copy: Path) -> None:
    for _ in range(2):  # the first failure must not silence the second
        line = refused(copy, (*small_data.words, "run.name=mine", "--resume", "nowhere"))
        assert "'nowhere'" in line
        assert "runs/mine/checkpoints" in line
        assert "step-00000004" in line
    assert rows(copy)[-1]["status"] == "finished"  # a refusal is no part of the run's account


def test_nothing_is_left_of_a_refused_resume_under_a_new_name(small_data: SmallData, copy: Path) -> None:
    command = pretrain(*small_data.words, "run.name=new", "--resume", "nowhere", ranks=2)
    finished = finish(copy, command)
    assert finished.code != 0
    assert finished.stderr.count("'nowhere'") == 1, finished.explain()
    assert [path.name for path in (copy / "runs").iterdir()] == ["mine"]


def _flip(folder: Path) -> Path:
    file = next(folder.glob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    return file


def _cut(folder: Path) -> Path:
    file = next(folder.glob("rank-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    return file


def _lose(folder: Path) -> Path:
    file = next(folder.glob("rank-*.safetensors"))
    file.unlink()
    return file


def _lose_manifest(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    return folder


def _cut_manifest(folder: Path) -> Path:
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:-20])
    return file


@pytest.mark.parametrize("damage", [_flip, _cut, _lose, _lose_manifest, _cut_manifest])
def test_a_damaged_checkpoint(small_data: SmallData, copy: Path, damage: Callable[[Path], Path]) -> None:
    named = damage(run_folder(copy) / "checkpoints" / "step-00000004").relative_to(copy)
    line = refused(copy, (*small_data.words, "run.name=mine", "--resume", "4"))
    assert str(named) in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.num_hidden_layers=3",), r"num_hidden_layers\b.*\b2\b.*\b3\b"),
        (("data.split=80,20",), r"data\.split\b.*80"),
    ],
)
def test_another_model_or_other_data(small_data: SmallData, copy: Path, words: tuple[str, ...], said: str) -> None:
    before = (run_folder(copy) / "config.yaml").read_text()
    line = refused(copy, small_data.changed(*words, "run.name=mine", "train.steps=8", "--resume", "auto"))
    assert re.search(said, line)
    assert (run_folder(copy) / "config.yaml").read_text() == before
    manifest = json.loads((run_folder(copy) / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["step"] == 4


def test_another_optimizer(small_data: SmallData, copy: Path) -> None:
    """Its moments are not in the checkpoint, and zeros in their place would be wrong in silence."""
    words = small_data.changed("run.name=mine", "train.steps=8", "--resume", "auto")
    line = refused(copy, words, json_file="muon.json")
    assert_names(line, "exp_avg", "momentum_buffer", "--extend-strategy")
    assert "step-00000004" in line
