"""Which checkpoint `--resume` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.checkpoint.discovery import find_checkpoint, resume_candidates
from megalm.checkpoint.manifest import set_status
from megalm.errors import CheckpointError
from tests.checkpoint_files import save


def names(checkpoints: Path) -> list[str]:
    return [entry.path.name[-2:] for entry in resume_candidates(checkpoints, "auto")]


def test_auto_is_the_newest(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "not there", "auto") is None
    save(tmp_path, 5)
    newest = save(tmp_path, 10, attempt=2)
    assert find_checkpoint(tmp_path, "auto") == newest


def test_auto_goes_on_after_a_run_was_set_back(tmp_path: Path) -> None:
    """--resume 5 of a run that had come to 10: step 6 is where it is now."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    now = save(tmp_path, 6, attempt=2)
    assert find_checkpoint(tmp_path, "auto") == now


def test_auto_takes_good_ones_first_then_suspect_never_bad(tmp_path: Path) -> None:
    for step, status in ((10, "good"), (20, "suspect"), (30, "bad"), (40, "good"), (50, "suspect"), (60, "bad")):
        save(tmp_path, step, status=status)
    assert names(tmp_path) == ["40", "10", "50", "20"]
    for step in (10, 40):
        set_status(tmp_path / f"step-{step:08d}", "bad", "wrong")
    assert names(tmp_path) == ["50", "20"]
    for step in (20, 50):
        set_status(tmp_path / f"step-{step:08d}", "bad", "wrong")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is marked bad"):
        find_checkpoint(tmp_path, "auto")
    set_status(tmp_path / "step-00000030", "good", "it was not")
    assert names(tmp_path) == ["30"]


def test_a_bad_one_is_refused_by_name_and_a_suspect_one_is_not(tmp_path: Path) -> None:
    bad = save(tmp_path, 5, status="bad", status_reason="loss of 9")
    with pytest.raises(CheckpointError, match=r"marked bad \(loss of 9\).*mark-bad --good"):
        find_checkpoint(tmp_path, "5")
    set_status(bad, "suspect", "a spike at 4")
    assert find_checkpoint(tmp_path, "5") == bad


def test_incomplete_ones_are_passed_over_by_auto_and_refused_by_name(tmp_path: Path) -> None:
    complete = save(tmp_path, 5)
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000015.tmp").mkdir()
    assert find_checkpoint(tmp_path, "auto") == complete
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        find_checkpoint(tmp_path, "10")


def test_auto_passes_over_what_is_damaged(tmp_path: Path) -> None:
    good = save(tmp_path, 5)
    save(tmp_path, 10)
    save(tmp_path, 15)
    (tmp_path / "step-00000010" / "manifest.json").write_text("{")
    (tmp_path / "step-00000015" / "rank-00000.safetensors").write_bytes(b"")
    assert find_checkpoint(tmp_path, "auto") == good
    with pytest.raises(CheckpointError, match=r"step-00000010/manifest.json cannot be read"):
        find_checkpoint(tmp_path, "10")


def test_only_damaged_ones_are_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "rank-00000.safetensors").unlink()
    (save(tmp_path, 10) / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*manifest.json.*rank-00000"):
        find_checkpoint(tmp_path, "auto")


def test_latest_and_best_are_followed_and_a_run_folder_says_what_is_in_it(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    first, second = save(checkpoints, 5), save(checkpoints, 10)
    (checkpoints / "best").write_text("step-00000005\n")
    assert find_checkpoint(checkpoints, "best") == first
    assert find_checkpoint(tmp_path / "elsewhere", str(checkpoints / "latest")) == second
    with pytest.raises(CheckpointError, match=r"a run folder; name one of .*complete ones: step-00000005, step-0"):
        find_checkpoint(tmp_path / "elsewhere", str(tmp_path))


@pytest.mark.parametrize("wanted", ["5", "step-00000005"])
def test_by_name_or_path(tmp_path: Path, wanted: str) -> None:
    folder = save(tmp_path, 5)
    assert find_checkpoint(tmp_path, wanted) == folder
    assert find_checkpoint(tmp_path / "elsewhere", str(folder)) == folder
    with pytest.raises(CheckpointError, match="complete ones: step-00000005"):
        find_checkpoint(tmp_path, "7")
