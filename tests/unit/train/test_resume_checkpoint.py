"""What a run goes on from, and what it tells of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalm.checkpoint import manifest
from megalm.checkpoint.discovery import resume_candidates
from megalm.checkpoint.manifest import read_manifest, set_status, write_manifest
from megalm.checkpoint.retention import tidy
from megalm.communicator import SingleProcessCommunicator
from megalm.errors import CheckpointError
from megalm.runs.run_folder import RunFolder
from megalm.train.evaluator import Evaluation
from megalm.train.resume.resume_plan import find_checkpoint, open_verified
from megalm.train.run_checkpointer import with_evaluation
from megalm.utils.formatting import format_clock
from tests.checkpoint_files import save
from tests.messages import assert_names


def find(folder: Path, wanted: str) -> tuple[int, tuple[str, ...]] | None:
    found = find_checkpoint(RunFolder(folder), wanted, SingleProcessCommunicator())
    return None if found is None else (found.reader.manifest.step, found.warnings)


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
    size = cut.stat().st_size
    for file, wrong in ((manifest, ["SHA-256"]), (flipped, ["SHA-256"]), (cut, [size, size + 1])):
        (warning,) = (words for words in found[1] if str(file) in words)
        assert_names(warning, *wrong)
        assert "--resume" not in warning, "an earlier one was chosen"
        with pytest.raises(CheckpointError) as refused:
            find(tmp_path, file.parent.name)
        assert_names(refused.value, file, *wrong)


def test_a_suspect_one_is_taken_with_a_warning(tmp_path: Path) -> None:
    good, suspect = (save(tmp_path / "checkpoints", step) for step in (10, 20))
    set_status(suspect, "suspect", "a spike at 18")
    assert find(tmp_path, "auto") == (10, ())
    named = find(tmp_path, "20")
    assert named is not None
    step, (warning,) = named
    assert step == 20
    assert_names(warning, suspect, "suspect", "a spike at 18")
    set_status(good, "bad", "no")
    assert find(tmp_path, "auto") == named


def test_damage_everywhere_is_no_reason_to_start_anew(tmp_path: Path) -> None:
    (save(tmp_path / "checkpoints", 10) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError) as refused:
        find(tmp_path, "auto")
    assert_names(refused.value, tmp_path, "step-00000010/rank-00000.safetensors")


@pytest.mark.parametrize(("on", "key"), [(100, "whole_validation_loss"), (6400, "validation_loss")])
def test_the_best_stays_so_when_it_is_judged_on_everything(tmp_path: Path, on: int, key: str) -> None:
    """The last checkpoint, the best over a part of the validation set, has another loss over all of it."""
    for step, loss in ((10, 3.0), (20, 2.5)):
        save(tmp_path, step, validation_loss=loss, best_validation_loss=loss, validation_tokens=on)
    (tmp_path / "best").write_text("step-00000020\n")
    last, loss = tmp_path / "step-00000020", 2.5 if on == 6400 else 2.6
    write_manifest(last, with_evaluation(read_manifest(last), Evaluation("validation", loss, 6400, None)))
    assert getattr(read_manifest(last), key) == loss
    assert tidy(tmp_path) == []
    assert (tmp_path / "best").read_text() == "step-00000020\n"


def test_a_long_check_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "checkpoints", 10)
    monkeypatch.setattr(manifest, "HASH_BLOCK_BYTES", 20)
    seconds = itertools.count()
    monkeypatch.setattr("megalm.utils.progress.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    said: list[str] = []
    reader, problem = open_verified(
        resume_candidates(tmp_path / "checkpoints", "auto")[0], SingleProcessCommunicator(), said.append
    )
    assert reader is not None
    assert problem == ""
    blocks = manifest.hashed_blocks(read_manifest(path))
    assert len(said) == (blocks - 1) // 5 > 3
    assert_names(said[0], "step-00000010", f"5/{blocks}", format_clock(blocks - 5))
