"""Which checkpoint `--resume` means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.checkpoint.layout import find_checkpoint
from megalm.errors import CheckpointError


def write(checkpoints: Path, step: int, attempt: int) -> Path:
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": step, "attempt": attempt}))
    return folder


def test_auto_is_the_newest(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "not there", "auto") is None
    write(tmp_path, 5, attempt=1)
    newest = write(tmp_path, 10, attempt=2)
    assert find_checkpoint(tmp_path, "auto") == newest


def test_auto_goes_on_after_a_run_was_set_back(tmp_path: Path) -> None:
    """--resume 5 of a run that had come to 10: step 6 is where it is now."""
    write(tmp_path, 5, attempt=1)
    write(tmp_path, 10, attempt=1)
    now = write(tmp_path, 6, attempt=2)
    assert find_checkpoint(tmp_path, "auto") == now


def test_incomplete_ones_are_passed_over_by_auto_and_refused_by_name(tmp_path: Path) -> None:
    complete = write(tmp_path, 5, attempt=1)
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000015.tmp").mkdir()
    assert find_checkpoint(tmp_path, "auto") == complete
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        find_checkpoint(tmp_path, "10")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (write(tmp_path, 5, attempt=1) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000005/manifest.json: not readable"):
        find_checkpoint(tmp_path, "auto")


@pytest.mark.parametrize("wanted", ["5", "step-00000005"])
def test_by_name_or_path(tmp_path: Path, wanted: str) -> None:
    folder = write(tmp_path, 5, attempt=1)
    assert find_checkpoint(tmp_path, wanted) == folder
    assert find_checkpoint(tmp_path / "elsewhere", str(folder)) == folder
    with pytest.raises(CheckpointError, match="complete ones: step-00000005"):
        find_checkpoint(tmp_path, "7")
