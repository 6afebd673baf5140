"""What a run goes on from, and what it tells of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from megalm.checkpoint.manifest import set_status
from megalm.errors import CheckpointError
from megalm.train.checkpointing import find_saved
from megalm.train.run_folder import RunFolder
from tests.checkpoint_files import Alone, save

T = TypeVar("T")


class OneRank(Alone):
    def once(self, work: Callable[[], T]) -> T:
        return work()


def find(folder: Path, wanted: str) -> tuple[int, tuple[str, ...]] | None:
    found = find_saved(RunFolder(folder), wanted, OneRank())  # type: ignore[arg-type]
    return None if found is None else (found.reader.manifest["step"], found.warnings)


def test_nothing_was_saved_yet(tmp_path: Path) -> None:
    assert find(tmp_path, "auto") is None


def test_flipped_cut_and_unreadable_ones_are_passed_over_and_named(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path / "checkpoints", step)
    flipped, cut, manifest = (
        tmp_path / "checkpoints" / f"step-000000{step}" / file
        for step, file in ((40, "rank-00000.safetensors"), (30, "rank-00000.safetensors"), (20, "manifest.json"))
    )
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 20', b'"step": 21'))
    found = find(tmp_path, "auto")
    assert found is not None
    assert found[0] == 10
    assert len(found[1]) == 3
    for file, said in ((manifest, "was altered"), (flipped, "SHA-256 is"), (cut, "the manifest says")):
        (warning,) = (words for words in found[1] if f"passed over: {file}" in words)
        assert said in warning
        assert "--resume" not in warning, "an earlier one was chosen"
        with pytest.raises(CheckpointError, match=said):
            find(tmp_path, file.parent.name)


def test_a_suspect_one_is_taken_with_a_warning(tmp_path: Path) -> None:
    good, suspect = (save(tmp_path / "checkpoints", step) for step in (10, 20))
    set_status(suspect, "suspect", "a spike at 18")
    assert find(tmp_path, "auto") == (10, ())
    said = (f"going on from {suspect}, which is marked suspect (a spike at 18)",)
    assert find(tmp_path, "20") == (20, said)
    set_status(good, "bad", "no")
    assert find(tmp_path, "auto") == (20, said)


def test_damage_everywhere_is_no_reason_to_start_anew(tmp_path: Path) -> None:
    (save(tmp_path / "checkpoints", 10) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used: .*rank-00000.safetensors is missing"):
        find(tmp_path, "auto")
