"""Which checkpoint `--resume` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.checkpoint.discovery import first_whole, resume_candidates
from megalm.checkpoint.manifest import set_status
from megalm.errors import CheckpointError
from tests.checkpoint_files import save
from tests.messages import assert_names


def names(checkpoints: Path) -> list[str]:
    return [entry.path.name[-2:] for entry in resume_candidates(checkpoints, "auto")]


def test_auto_is_the_newest(tmp_path: Path) -> None:
    assert first_whole(tmp_path / "not there", "auto")[0] is None
    save(tmp_path, 5)
    newest = save(tmp_path, 10, attempt=2)
    assert first_whole(tmp_path, "auto")[0] == newest


def test_auto_goes_on_after_a_run_was_set_back(tmp_path: Path) -> None:
    """--resume 5 of a run that had come to 10: step 6 is where it is now."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    now = save(tmp_path, 6, attempt=2)
    assert first_whole(tmp_path, "auto")[0] == now


def test_auto_takes_good_ones_first_then_suspect_never_bad(tmp_path: Path) -> None:
    for step, status in ((10, "good"), (20, "suspect"), (30, "bad"), (40, "good"), (50, "suspect"), (60, "bad")):
        save(tmp_path, step, status=status)
    assert names(tmp_path) == ["40", "10", "50", "20"]
    for step in (10, 40):
        set_status(tmp_path / f"step-{step:08d}", "bad", "wrong")
    assert names(tmp_path) == ["50", "20"]
    for step in (20, 50):
        set_status(tmp_path / f"step-{step:08d}", "bad", "wrong")
    with pytest.raises(CheckpointError) as error:
        first_whole(tmp_path, "auto")
    assert_names(error.value, tmp_path, "megalm checkpoint mark-bad --good")
    set_status(tmp_path / "step-00000030", "good", "it was not")
    assert names(tmp_path) == ["30"]


def test_a_bad_one_is_refused_by_name_and_a_suspect_one_is_not(tmp_path: Path) -> None:
    bad = save(tmp_path, 5, status="bad", status_reason="loss of 9")
    with pytest.raises(CheckpointError) as error:
        first_whole(tmp_path, "5")
    assert_names(error.value, "loss of 9", f"megalm checkpoint mark-bad --good {bad}")
    set_status(bad, "suspect", "a spike at 4")
    assert first_whole(tmp_path, "5")[0] == bad


def test_incomplete_ones_are_passed_over_by_auto_and_refused_by_name(tmp_path: Path) -> None:
    complete = save(tmp_path, 5)
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000015.tmp").mkdir()
    assert first_whole(tmp_path, "auto")[0] == complete
    with pytest.raises(CheckpointError) as error:
        first_whole(tmp_path, "10")
    assert_names(error.value, tmp_path / "step-00000010", "manifest.json", complete.name)


def test_auto_passes_over_what_is_damaged(tmp_path: Path) -> None:
    good = save(tmp_path, 5)
    save(tmp_path, 10)
    save(tmp_path, 15)
    (tmp_path / "step-00000010" / "manifest.json").write_text("{")
    (tmp_path / "step-00000015" / "rank-00000.safetensors").write_bytes(b"")
    assert first_whole(tmp_path, "auto")[0] == good
    with pytest.raises(CheckpointError, match=r"step-00000010/manifest\.json"):
        first_whole(tmp_path, "10")


def test_only_damaged_ones_are_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "rank-00000.safetensors").unlink()
    (save(tmp_path, 10) / "manifest.json").write_text("")
    with pytest.raises(CheckpointError) as error:
        first_whole(tmp_path, "auto")
    assert_names(error.value, "step-00000010/manifest.json", "step-00000005", "rank-00000.safetensors")


def test_latest_and_best_are_followed_and_a_run_folder_says_what_is_in_it(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    first, second = save(checkpoints, 5), save(checkpoints, 10)
    (checkpoints / "best").write_text("step-00000005\n")
    assert first_whole(checkpoints, "best")[0] == first
    assert first_whole(tmp_path / "elsewhere", str(checkpoints / "latest"))[0] == second
    with pytest.raises(CheckpointError) as error:
        first_whole(tmp_path / "elsewhere", str(tmp_path))
    assert_names(error.value, checkpoints, first.name, second.name)


@pytest.mark.parametrize("wanted", ["5", "step-00000005"])
def test_by_name_or_path(tmp_path: Path, wanted: str) -> None:
    folder = save(tmp_path, 5)
    assert first_whole(tmp_path, wanted)[0] == folder
    assert first_whole(tmp_path / "elsewhere", str(folder))[0] == folder
    with pytest.raises(CheckpointError) as error:
        first_whole(tmp_path, "7")
    assert_names(error.value, 7, tmp_path, folder.name)
