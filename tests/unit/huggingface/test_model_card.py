"""What a card says of the data that a model was trained on; the whole of one is in tests/e2e/test_publishing.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalm.checkpoint.manifest import read_manifest
from megalm.huggingface.export_tokenizer import ExportedTokenizer
from megalm.huggingface.model_card import Card
from tests.huggingface_models import SECTIONS, random_model, save_model
from tests.messages import assert_names

PARTS = [{"prefix": "/data/of/mine/web", "weight": 3.0}, {"prefix": "code", "weight": 1.0}]
STAGES = [{"from_step": 1000, "blend": [{"prefix": "/data/of/mine/books", "weight": 1.0}]}]
SEGMENT = {"order": "a", "sequence_length": 40, "global_batch": 2, "first_sample": 0, "samples_consumed": 14}


def card(tmp_path: Path, data: dict[str, Any], segments: int = 1, **facts: Any) -> str:
    shape, model = random_model(SECTIONS["llama"])
    consumed = 14 // segments
    position = {"segments": [{**SEGMENT, "samples_consumed": consumed, "begins": "anew"}] * segments}
    checkpoint = save_model(tmp_path / "run/checkpoints", shape, model, data_position=position, **facts)
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return Card("it", checkpoint, read_manifest(checkpoint), shape, "float32", ExportedTokenizer("none", ())).text()


def row(tmp_path: Path, data: dict[str, Any], segments: int = 1, name: str = "dataset", **facts: Any) -> str:
    """The cell beside `name`."""
    (line,) = (line for line in card(tmp_path, data, segments, **facts).splitlines() if line.startswith(f"| {name} | "))
    return line.split(" | ", 1)[1].removesuffix(" |")


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"train": "/data/of/mine/web"}, ["web"]),
        ({"train": PARTS}, ["web", 3, "code", 1]),
        ({"train": PARTS, "stages": STAGES}, ["web", 3, "code", 1, "1,000", "books", 1]),
        ({"train": None, "recipe": "python-stdlib"}, ["python-stdlib"]),
    ],
)
def test_datasets_are_reported_without_their_folder(tmp_path: Path, data: dict[str, Any], names: list[object]) -> None:
    told = row(tmp_path, data)
    assert_names(told, *names)
    assert re.findall(r"[\d,]*\d", told) == [str(name) for name in names if str(name)[0].isdigit()]
    assert "/data/of" not in told


def test_only_a_model_that_was_pretrained_here_is_called_untuned(tmp_path: Path) -> None:
    """What was imported may have been fine-tuned elsewhere."""
    for facts, told in (({}, True), ({"imported_from": "tuned", "holds": "weights"}, False)):
        text = card(tmp_path / str(told), {"train": "web"}, **facts)
        assert ("not tuned" in text) == told
        assert ("pretrained with megalm" in text) == ("- pretrained\n" in text) == told


def test_data_that_was_changed_on_the_way_is_reported(tmp_path: Path) -> None:
    assert_names(row(tmp_path, {"train": "web"}, segments=3), "web", 3)


@pytest.mark.parametrize(("sizes", "epochs"), [((1000,), ["1,000"]), ((1000, 1000), ["1,000"]), ((1000, 2000), [])])
def test_epochs_need_one_dataset_in_all_attempts(tmp_path: Path, sizes: tuple[int, ...], epochs: list[str]) -> None:
    (tmp_path / "run").mkdir()
    for number, size in enumerate(sizes):
        name = "environment.json" if number == 0 else f"environment.attempt-{number}.json"
        facts = {"datasets": [{"prefix": "web", "tokens_per_epoch": size, "epochs": 1.0}]}
        (tmp_path / "run" / name).write_text(json.dumps(facts))
    text = card(tmp_path, {"train": "web"}, tokens=2500)
    rows = [line for line in text.splitlines() if line.startswith("| epochs |")]
    assert len(rows) == len(epochs)
    for line, size in zip(rows, epochs, strict=True):
        assert_names(line, "2.50", size)


def test_a_loss_beyond_all_measure(tmp_path: Path) -> None:
    assert_names(
        row(tmp_path, {}, name="validation", validation_loss=800.0), "800.0000", "perplexity", f"{math.exp(700):,.2f}"
    )


def test_a_hub_page_can_show_what_was_measured(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    measured = {"kind": "eval", "step": 7, "tokens": 9, "loss": 3.5, "perplexity": 33.1, "targets": 50, "time": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(measured) + "\n")
    row = {"kind": "evaluation", "source": "choices", "dataset": "q/quiz.jsonl", "questions": 9, "time": 2.0}
    rows = [{**row, "step": 7, "accuracy": 0.75}, {**row, "step": 6, "accuracy": 0.5}]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    front = yaml.safe_load(card(tmp_path, {"train": "web"}).split("---\n")[1])
    ((model,), found) = front["model-index"], front["model-index"][0]["results"]
    assert model["name"] == "it"
    assert [(one["dataset"]["name"], one["metrics"]) for one in found] == [
        ("validation", [{"type": "loss", "value": 3.5}, {"type": "perplexity", "value": 33.1}]),
        ("quiz", [{"type": "accuracy", "value": 0.75}]),
    ]
    assert {one["task"]["type"] for one in found} == {"text-generation"}
