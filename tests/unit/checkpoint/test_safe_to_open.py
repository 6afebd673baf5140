"""A checkpoint from anywhere may be opened: nothing in it runs, nothing in it leads out of its folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import first_whole, read_pointer
from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.retention import Retention, prune
from megalm.checkpoint.shard_spec import FragmentKey
from megalm.errors import CheckpointError
from tests.checkpoint_files import SHAPES, assert_holds, save
from tests.messages import assert_names

RANK_FILE = "rank-00000.safetensors"


class Planted:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickles(mark: Path, folder: Path) -> dict[str, bytes]:
    """The ways in which Python code travels in files of tensors."""
    torch.save({"weight": Planted(mark)}, folder / "zip.pt")
    torch.save({"weight": Planted(mark)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    np.save(folder / "array.npy", np.array([Planted(mark)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Planted(mark)),
        "pickle as text": pickle.dumps(Planted(mark), protocol=0),
        **{name: (folder / name).read_bytes() for name in ("zip.pt", "old.pt", "array.npy")},
    }


def read_everything(path: Path) -> None:
    reader = CheckpointReader(path)
    if problem := reader.verify():
        raise CheckpointError(problem)
    reader.model()


def seal(path: Path, content: dict[str, Any]) -> None:
    """A manifest of any content with the right seal, as the format has it."""
    content = {name: value for name, value in content.items() if name != "seal"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**content, "seal": digest}))


def reseal(path: Path, **changes: Any) -> None:
    """As somebody would who wants the file to be taken for whole."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    for name, facts in manifest["files"].items():
        if (path / name).is_file():
            content = (path / name).read_bytes()
            facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(path, manifest)


@pytest.mark.parametrize("kind", ["pickle", "pickle as text", "zip.pt", "old.pt", "array.npy"])
@pytest.mark.parametrize(
    ("file", "sealed"),
    [*itertools.product([RANK_FILE, "config.yaml", "deepspeed.json"], [True, False]), ("manifest.json", False)],
)
def test_a_planted_pickle_never_runs(tmp_path: Path, file: str, kind: str, sealed: bool) -> None:
    mark = tmp_path / "it ran"
    copies = (tmp_path / "config.yaml", tmp_path / "deepspeed.json")
    for copy in copies:
        copy.write_text("{}")
    content = pickles(mark, tmp_path)[kind]
    pickle.loads(pickles(mark, tmp_path)["pickle"])
    mark.rmdir()  # the plant is alive
    path = save(tmp_path / "checkpoints", 5, copies=copies)
    (path / file).write_bytes(content)
    if sealed:
        reseal(path)
    if sealed and file != RANK_FILE:
        read_everything(path)  # kept for people; loading looks at their hashes only
    else:
        with pytest.raises(CheckpointError, match=file):
            read_everything(path)
    assert not mark.exists()


def test_pointers_are_names_and_nothing_else(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    save(tmp_path, 5)
    newest = save(tmp_path, 6)
    for content in (*pickles(mark, tmp_path).values(), b"../outside", b"/etc", b"step-00000005/../../x", b"", b"\xff"):
        for pointer in ("latest", "best"):
            (tmp_path / pointer).write_bytes(content)
            assert read_pointer(tmp_path, pointer) is None
        assert first_whole(tmp_path, "auto")[0] == newest
        assert prune(tmp_path, Retention(2)) == []
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "a/b", ".hidden", "", "a\\b"])
def test_names_in_a_manifest_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "run", 5)
    (tmp_path / "run" / "secret").write_bytes(b"x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    seal(path, manifest)
    with pytest.raises(CheckpointError, match="files"):
        read_manifest(path)


def test_a_tensor_is_read_from_the_manifests_files_only(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "other.safetensors").write_bytes((path / RANK_FILE).read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tensors"]["norm.weight"]["fragments"][0]["file"] = "other.safetensors"
    seal(path, manifest)
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(path).model()
    assert_names(error.value, path, "master/norm.weight", "other.safetensors")


def test_a_link_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 5)
    (path / RANK_FILE).rename(tmp_path / "elsewhere")
    (path / RANK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(path)
    assert_names(error.value, path / RANK_FILE, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {RANK_FILE: {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {RANK_FILE: {"bytes": 1, "sha256": "short"}}},
        {"tensors": {"norm.weight": {"shape": ["many"], "fragments": []}}},
        {"tensors": 5},
        {"tensors": {"x": {"shape": [2], "fragments": [{"file": RANK_FILE, "kind": "master", "start": 0}]}}},
        {"status": "excellent"},
        {"step": "ten"},
        {"attempt": {}},
        {"format": 1},
        {"format": 99},
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = save(tmp_path, 5)
    seal(path, {**read_manifest(path).content, **changes})
    with pytest.raises(CheckpointError, match=r"step-00000005"):
        CheckpointReader(path).model()


def test_tensors_that_are_not_what_the_manifest_says(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    for tensors in ({"master/norm.weight": torch.zeros(3)}, {"master/norm.weight": torch.zeros(5).bfloat16()}, {}):
        save_file(tensors, path / RANK_FILE)
        reseal(path)
        with pytest.raises(CheckpointError, match=RANK_FILE):
            CheckpointReader(path).read(FragmentKey("norm.weight", "master", SHAPES["norm.weight"], 0, 5))


def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    """One bit flipped anywhere, or the end cut off anywhere, and the checkpoint says which file it was."""
    (tmp_path / "config.yaml").write_text("train: {steps: 5}\n")
    path = save(tmp_path / "checkpoints", 5, copies=(tmp_path / "config.yaml",))
    random = np.random.default_rng(1)
    for file in path.iterdir():
        content = file.read_bytes()
        places = random.choice(len(content), size=min(60, len(content)), replace=False)
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << random.integers(8)
            for damaged in (bytes(flipped), content[:place]):
                file.write_bytes(damaged)
                if file.name == "manifest.json" and _says_the_same(damaged, content):
                    continue  # one space for another: nothing is lost
                with pytest.raises(CheckpointError, match=file.name):
                    read_everything(path)
        file.write_bytes(content)
    assert_holds(path, 5)


def _says_the_same(damaged: bytes, content: bytes) -> bool:
    try:
        return bool(json.loads(damaged) == json.loads(content))
    except ValueError:
        return False
