"""`--ema`: the commands that use a model take the moving average of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.cli.main import main
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import CheckpointError
from megalm.inference.inference_model import InferenceModel
from tests.inference_models import write_run
from tests.messages import assert_names

HALF = 0.5


def run(*words: object) -> object:
    """The command's exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code or 0


@pytest.fixture
def averaged(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", ByteTokenizer(), average=HALF)


def test_a_model_of_the_average(averaged: Path) -> None:
    plain, average = (dict(InferenceModel(averaged, ema=ema).network.named_parameters()) for ema in (False, True))
    for name, values in plain.items():
        assert torch.equal(average[name], HALF * values), name


def test_of_a_frozen_parameter_the_weights_are_the_average(tmp_path: Path) -> None:
    """A checkpoint has no average of it, but of the others."""
    reader = CheckpointReader(write_run(tmp_path / "run", ByteTokenizer(), average=HALF), ema=True)
    name, shape = "final_norm.weight", reader.shapes()["final_norm.weight"]
    entry = reader.manifest.tensors[name]
    masters = tuple(each for each in entry.fragments if each.kind == "master")
    reader.manifest.tensors[name] = entry.model_copy(update={"fragments": masters})
    assert torch.equal(reader.read_parameter(name, shape), reader.read_parameter(name, shape, "master"))


def test_evaluate_and_export_take_the_average(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "some.txt"
    text.write_text("words, and more words\n")
    losses = []
    for more in ((), ("--ema",)):
        run("evaluate", averaged, "--text", text, "--json", *more)
        (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert row["ema"] is bool(more)
        losses.append(row["loss"])
        run("export", averaged, tmp_path / f"exported{len(more)}", *more)
        capsys.readouterr()
    assert losses[0] != losses[1]
    plain, average = (load_file(tmp_path / name / "model.safetensors") for name in ("exported0", "exported1"))
    assert all(torch.equal(average[name], HALF * values) for name, values in plain.items())
    cards = [(tmp_path / name / "README.md").read_text() for name in ("exported0", "exported1")]
    assert ["moving average" in card for card in cards] == [False, True]


@pytest.mark.parametrize("command", ["evaluate", "generate", "export"])
def test_a_checkpoint_without_an_average_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = write_run(tmp_path / "run", ByteTokenizer())
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(path, ema=True)
    assert_names(error.value, "train.ema_decay", "--ema")
    text = tmp_path / "some.txt"
    text.write_text("words\n")
    words = {"evaluate": ["--text", text], "generate": ["--prompt", "a"], "export": [tmp_path / "exported"]}
    assert run(command, path, *words[command], "--ema") != 0
    assert_names(capsys.readouterr().err, "train.ema_decay", "--ema")
