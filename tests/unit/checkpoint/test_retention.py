"""What is kept, what goes, and what a killed job left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.discovery import Entry, complete_checkpoints, list_checkpoints
from megalm.checkpoint.manifest import Manifest, set_status
from megalm.checkpoint.retention import Retention, prune, superfluous, tidy
from tests.checkpoint_files import assert_holds, save


def entries(*steps: int, **statuses: Any) -> list[Entry]:
    known = {step: Manifest(step=step, status=statuses.get(f"s{step}", "good"), files={}, tensors={}) for step in steps}
    return [Entry(Path(f"step-{step:08d}"), manifest) for step, manifest in known.items()]


def gone(found: list[Entry], retention: Retention, best: int | None = None) -> list[int]:
    name = None if best is None else f"step-{best:08d}"
    return [entry.step for entry in superfluous(found, retention, name)]


def test_the_last_n_the_best_and_every_m_stay() -> None:
    found = entries(10, 20, 30, 40, 50, 60)
    assert gone(found, Retention()) == []
    assert gone(found, Retention(2)) == [10, 20, 30, 40]
    assert gone(found, Retention(2), best=20) == [10, 30, 40]
    assert gone(found, Retention(2, keep_every_steps=30), best=20) == [10, 40]
    assert gone(found, Retention(6)) == gone(found, Retention(7)) == []


def test_suspect_and_bad_ones_are_not_counted_and_go_with_their_time() -> None:
    found = entries(10, 20, 30, 40, 50, 60, s20="bad", s40="suspect", s60="bad")
    assert gone(found, Retention(2)) == [10, 20]
    assert gone(found, Retention(1)) == [10, 20, 30, 40]
    assert gone(found, Retention(1, keep_every_steps=10)) == [20, 40]
    assert gone(found, Retention(4)) == []


def test_unreadable_ones_stay() -> None:
    found = [Entry(Path("step-00000005"), None, "why"), *entries(10, 20)]
    assert gone(found, Retention(1)) == [10]


def test_those_written_last_stay_after_a_run_was_set_back(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, attempt=2)
    assert [path.name[-2:] for path in prune(tmp_path, Retention(2))] == ["10", "20"]
    assert [path.name[-2:] for path in complete_checkpoints(tmp_path)] == ["15", "30"]


def test_none_created_after_a_kept_one_goes(tmp_path: Path) -> None:
    """Attempts were numbered from 1 again while metrics.jsonl was gone: the highest attempt is not the newest."""
    for step, attempt, hour in ((8, 3, 12), (12, 3, 13), (16, 1, 14)):
        save(tmp_path, step, attempt=attempt, created=f"2026-11-20T{hour}:00:00+00:00")
    assert prune(tmp_path, Retention(2)) == []
    save(tmp_path, 20, attempt=4, created="2026-11-20T15:00:00+00:00")
    assert sorted(path.name[-2:] for path in prune(tmp_path, Retention(1))) == ["08", "12", "16"]


def test_within_an_attempt_a_clock_that_is_set_back_keeps_nothing_more(tmp_path: Path) -> None:
    for step, hour in ((10, 14), (20, 15), (30, 13), (40, 14)):
        save(tmp_path, step, created=f"2026-11-20T{hour}:00:00+00:00")
    assert [path.name[-2:] for path in prune(tmp_path, Retention(2))] == ["10", "20"]


@pytest.mark.parametrize("created", ["2026-13-40", "", None, 10**30, "1e999"])
def test_a_time_that_cannot_be_read_deletes_nothing_more(tmp_path: Path, created: object) -> None:
    save(tmp_path, 10, created=created)
    save(tmp_path, 20, attempt=2)
    assert [path.name[-2:] for path in prune(tmp_path, Retention(1))] == ([] if created == 10**30 else ["10"])


def test_the_best_is_what_the_pointer_names(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "best").write_text("step-00000010\n")
    assert [path.name[-2:] for path in prune(tmp_path, Retention(1))] == ["20"]
    (tmp_path / "best").write_bytes(b"\xff../../x")
    assert [path.name[-2:] for path in prune(tmp_path, Retention(1))] == ["10"]


def test_the_best_stays_without_its_pointer(tmp_path: Path) -> None:
    for step, loss, best in ((10, 3.0, 3.0), (20, 2.5, 2.5), (30, 2.8, 2.5)):
        save(tmp_path, step, validation_loss=loss, best_validation_loss=best)
    assert [path.name[-2:] for path in prune(tmp_path, Retention(1, keep_best=True))] == ["10"]
    assert [path.name[-2:] for path in prune(tmp_path, Retention(1), dry_run=True)] == ["20"], "nobody asked for it"
    assert tidy(tmp_path, keep_best=True) == [tmp_path / "best"]
    assert (tmp_path / "best").read_text() == "step-00000020\n"


def test_latest_is_written_again_but_never_hides_damage(tmp_path: Path) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    (tmp_path / "latest").unlink()
    assert tidy(tmp_path) == [tmp_path / "latest"]
    assert (tmp_path / "latest").read_text() == f"{newest.name}\n"
    (newest / "manifest.json").write_text("{")
    assert tidy(tmp_path) == []
    assert (tmp_path / "latest").read_text() == f"{newest.name}\n"


def test_a_checkpoint_that_was_moved_behind_a_link_stays_and_blocks_nothing(tmp_path: Path) -> None:
    checkpoints, archive = tmp_path / "checkpoints", tmp_path / "archive"
    for step in (10, 20, 30):
        save(checkpoints, step)
    (checkpoints / "step-00000010").rename(archive)
    (checkpoints / "step-00000010").symlink_to(archive)
    assert prune(checkpoints, Retention(1)) == [checkpoints / "step-00000020"]
    assert_holds(checkpoints / "step-00000010", 10)
    save(checkpoints, 10, attempt=2)
    assert not (checkpoints / "step-00000010").is_symlink()
    assert_holds(checkpoints / "step-00000010.replaced.found-1", 10)
    (checkpoints / "step-00000040.trash").symlink_to(archive)
    (checkpoints / "step-00000050.tmp").write_text("a person's")
    assert sorted(path.suffix for path in tidy(checkpoints)) == [".tmp", ".trash"]
    assert (checkpoints / "step-00000050.tmp.found-1").read_text() == "a person's"
    save(checkpoints, 50)
    assert_holds(archive, 10)


def test_a_pipe_in_place_of_a_pointer_is_not_waited_for(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "latest").unlink()
    os.mkfifo(tmp_path / "latest")
    os.mkfifo(tmp_path / "best")
    assert prune(tmp_path, Retention(1)) == []
    assert tidy(tmp_path) == [tmp_path / "latest"]
    save(tmp_path, 20)
    assert (tmp_path / "latest").read_text() == "step-00000020\n"


def test_leftovers_of_a_killed_job_are_put_in_order(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20).rename(tmp_path / "step-00000020.replaced")  # its successor never came
    save(tmp_path, 30).rename(tmp_path / "step-00000030.trash")
    save(tmp_path, 40)
    save(tmp_path, 41).rename(tmp_path / "step-00000040.replaced")  # its successor did
    (tmp_path / "step-00000050.tmp").mkdir()
    (tmp_path / "step-00000010" / ".manifest.json.host-1.tmp").touch()
    (tmp_path / ".latest.host-1.tmp").touch()
    (tmp_path / "mine.tmp").mkdir()  # not ours
    assert len(tidy(tmp_path)) == 7
    assert (tmp_path / "latest").read_text() == "step-00000040\n", "it named what is gone"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["latest", "mine.tmp", "step-00000010", "step-00000020", "step-00000040"]
    for step in (10, 20, 40):
        assert_holds(tmp_path / f"step-{step:08d}", step)
    assert tidy(tmp_path) == tidy(tmp_path / "not there") == []


def test_a_checkpoint_that_cannot_be_deleted_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "not allowed", str(path))

    monkeypatch.setattr("megalm.utils.atomic_files.shutil.rmtree", refuse)
    with pytest.raises(PermissionError):
        prune(tmp_path, Retention(1))
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [20]


def test_a_kill_before_the_best_was_named_is_made_good(tmp_path: Path) -> None:
    for step, loss, best in ((10, 3.0, 3.0), (20, 2.5, 2.5), (30, 2.8, 2.5), (40, None, 2.5)):
        save(tmp_path, step, validation_loss=loss, best_validation_loss=best)
    assert tidy(tmp_path) == []
    assert not (tmp_path / "best").exists()  # nobody asked for it
    (tmp_path / "best").write_text("step-00000010\n")
    assert tidy(tmp_path) == [tmp_path / "best"]
    assert (tmp_path / "best").read_text() == "step-00000020\n"
    assert tidy(tmp_path) == []
    set_status(tmp_path / "step-00000020", "bad", "it is not")
    tidy(tmp_path)
    assert (tmp_path / "best").read_text() == "step-00000010\n"
