"""The manifest as a model: the file of an earlier version, what it may lack, what it may have more, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.manifest import (
    Manifest,
    read_manifest,
    require_training_state,
    set_status,
    shape_of,
    write_manifest,
)
from megalm.errors import CheckpointError
from tests.messages import assert_names

OLD = Path(__file__).resolve().parents[2] / "fixtures" / "run-0.1.0" / "small" / "checkpoints" / "step-00000009"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the manifest of an earlier version, in the folder of a checkpoint."""
    folder = tmp_path / "checkpoints" / OLD.name
    folder.mkdir(parents=True)
    shutil.copy(OLD / "manifest.json", folder)
    return folder


def stored(folder: Path) -> dict[str, Any]:
    """What its manifest says, with lists and numbers of its own."""
    content = json.loads((folder / "manifest.json").read_text())
    assert isinstance(content, dict)
    return content


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> Manifest:
    content = stored(folder)
    change(content)
    write_manifest(folder, read_manifest(folder).amended(**content))
    return read_manifest(folder)


def test_an_earlier_version_s_file_is_read_whole_and_written_as_it_was(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    manifest = read_manifest(folder)
    said = json.loads(json.dumps(manifest.model_dump(exclude_unset=True)))
    written = stored(folder)
    said["model"] = {name: said["model"][name] for name in written["model"]}  # choices of later releases come on top
    assert said == {name: value for name, value in written.items() if name != "seal"}
    unknown = manifest.model_extra or {}
    assert list(unknown) == ["format"], "every other key has its attribute"
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before
    set_status(folder, "suspect", "why")
    set_status(folder, "good", None)
    assert (folder / "manifest.json").read_bytes() == before


def test_what_was_not_noted_yet_has_its_default(folder: Path) -> None:
    content = stored(folder)
    for name in ("rollbacks", "attempt", "validation", "status_reason", "topology", "tokenizer", "seal"):
        del content[name]
    del content["schedule"]["stated"], content["fingerprints"]["dataset"]
    for segment in content["data_position"]["segments"]:
        for name in ("first_sample", "samples_skipped", "begins"):
            del segment[name]
    for segment in content["schedule"]["segments"]:
        del segment["offset_steps"]
    manifest = Manifest.from_json(content)
    assert (manifest.rollbacks, manifest.attempt, manifest.validation, manifest.topology) == (0, 1, None, None)
    assert (manifest.schedule.stated, manifest.fingerprints.dataset, manifest.holds) == ((), None, None)
    assert {segment.offset_steps for segment in manifest.schedule.segments} == {0}
    first = manifest.data_position.segments[0]
    assert (first.first_sample, first.samples_skipped, first.begins, first.next_sample) == (0, 0, "anew", 64)


def test_keys_of_a_newer_version_survive_a_mark(folder: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        places = (content, content["topology"], content["model"], content["data_position"]["segments"][0])
        for place in (*places, content["schedule"]["segments"][0], next(iter(content["files"].values()))):
            place["newer"] = {"of": [1, 2.0, None]}

    rewrite(folder, add)
    before = stored(folder)
    set_status(folder, "bad", "loss of 9")
    after = stored(folder)
    changed = {"status": "bad", "status_reason": "loss of 9", "seal": after["seal"]}
    assert after == {**before, **changed}
    assert list(after) == list(before)


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("tokens", -1, "tokens"),
        ("best_validation_loss", "low", "best_validation_loss"),
        ("data_position", {"segments": [{"order": "a"}]}, r"data_position\.segments\.0\.sequence_length"),
        ("schedule", {"segments": [{"kind": "cosine"}]}, r"schedule\.segments\.0\.peak_learning_rate"),
        ("topology", {"world_size": "many"}, r"topology\.world_size"),
        ("fingerprints", {"order": 5}, r"fingerprints\.order"),
        ("model", None, "model"),
    ],
)
def test_a_section_that_makes_no_sense_is_named_with_its_key(
    folder: Path, section: str, value: Any, named: str
) -> None:
    content = read_manifest(folder).content
    broken = Manifest.model_construct()
    broken._content = {**content, section: value}
    write_manifest(folder, broken)
    with pytest.raises(CheckpointError, match=rf"^\S*step-00000009/manifest\.json: {named}: .*--resume"):
        read_manifest(folder)


@pytest.mark.parametrize("section", ["data_position", "schedule", "counters", "tokens", "model", "fingerprints"])
def test_nothing_resumes_where_a_section_is_missing(folder: Path, section: str) -> None:
    manifest = read_manifest(folder)
    require_training_state(folder, manifest)
    lacking = Manifest.from_json({name: value for name, value in manifest.content.items() if name != section})
    with pytest.raises(CheckpointError) as refused:
        require_training_state(folder, lacking)
    assert_names(refused.value, folder / "manifest.json", section)


def test_a_model_or_a_data_position_of_a_newer_version_is_not_used(folder: Path) -> None:
    shape = shape_of(folder, read_manifest(folder))
    assert (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (16, 2, 257)
    newer = rewrite(folder, lambda content: content["model"].update(window=512))
    with pytest.raises(CheckpointError) as refused:
        shape_of(folder, newer)
    assert_names(refused.value, folder / "manifest.json", "model.window")
    newer = rewrite(folder, lambda content: content["data_position"]["segments"][0].update(packing="tight"))
    with pytest.raises(CheckpointError) as refused:
        require_training_state(folder, newer)
    assert_names(refused.value, folder / "manifest.json", "data_position.segments.packing")
    lacking = rewrite(folder, lambda content: [content["model"].pop(name) for name in ("window", "hidden_size")])
    with pytest.raises(CheckpointError, match=r"manifest\.json: model\.hidden_size: "):
        shape_of(folder, lacking)
