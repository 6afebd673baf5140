"""Which folder a run gets, and what is told in which words."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.checkpoint.shard_spec import WEIGHTS, WEIGHTS_AND_MOMENTS
from megalm.communicator import SingleProcessCommunicator
from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.errors import ConfigError
from megalm.planning.resolve import resolve
from megalm.runs.metrics_log import MetricsWriter
from megalm.runs.run_folder import RunFolder, newest_run, open_run_folder, write_facts
from megalm.train.lifecycle.shutdown import FailureClaim, RankSupervisor, RunHooks
from megalm.utils.atomic_files import write_json
from tests.checkpoint_files import save
from tests.messages import assert_names


def test_unnamed_runs_are_numbered(tmp_path: Path) -> None:
    names = [open_run_folder(tmp_path, None, "quickstart", resume=False).name for _ in range(3)]
    assert names == ["quickstart-001", "quickstart-002", "quickstart-003"]
    (tmp_path / "quickstart-010").mkdir()
    (tmp_path / "quickstart-notes").mkdir()
    (tmp_path / "quickstart-999").write_text("a file is no run")
    assert open_run_folder(tmp_path, None, "quickstart", resume=False).name == "quickstart-011"
    assert open_run_folder(tmp_path, None, None, resume=False).name == "run-001"


def test_resuming_without_a_name_takes_the_newest(tmp_path: Path) -> None:
    assert newest_run(tmp_path, "quickstart") is None
    for stem in ("quickstart", "quickstart", "other"):
        (open_run_folder(tmp_path, None, stem, resume=False).path / "config.yaml").touch()
    open_run_folder(tmp_path, None, "quickstart", resume=False)  # failed before it began
    assert newest_run(tmp_path, "quickstart") == "quickstart-002"


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    assert open_run_folder(tmp_path, "mine", "quickstart", resume=False).path == tmp_path / "mine"
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path, "mine", "quickstart", resume=False)
    assert_names(refused.value, tmp_path / "mine", "run.name")
    assert "--resume auto" not in str(refused.value), "there is no checkpoint"
    assert open_run_folder(tmp_path, "mine", "quickstart", resume=True).path == tmp_path / "mine"


def test_what_never_began_leaves_nothing(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path, "mine", None, resume=True)
    claim = FailureClaim(folder.failure(1))
    assert folder.is_empty
    assert claim.take("rank 0: why", 1)
    folder.remove_if_unused()
    assert not list(tmp_path.iterdir())
    assert claim.is_taken(), "rank 0 has told it"
    assert not claim.take("rank 1: why", 1)
    folder = open_run_folder(tmp_path, "mine", None, resume=True)
    (folder.path / "config.yaml").touch()
    folder.remove_if_unused()
    assert folder.path.is_dir()


def test_a_folder_that_is_moved_away_ends_no_run_in_silence(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path, "mine", None, resume=False)
    guard = RankSupervisor(rank=0)
    claim = FailureClaim(folder.failure(1))
    guard.enter(RunHooks(claim, began=True))
    folder.path.rename(tmp_path / "elsewhere")
    assert not claim.is_taken(), "nobody has failed"
    assert claim.take("rank 0: why", 1), "who fails then says so"
    guard.close()


@pytest.mark.parametrize("resume", [True, False])
def test_an_imported_model_is_no_run(tmp_path: Path, resume: bool) -> None:
    """It is refused before anything is written into its folder; a run that began with such weights goes on."""
    facts = {"step": 0, "tokens": 0, "counters": {}, "holds": WEIGHTS}
    path = save_checkpoint(tmp_path / "base" / "checkpoints", 0, [], facts, [], SingleProcessCommunicator())
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path, "base", None, resume)
    assert_names(refused.value, f"--resume {path} --extend-steps N --extend-strategy weights", "run.name=NEW")
    assert [child.name for child in (tmp_path / "base").iterdir()] == ["checkpoints"]
    (tmp_path / "base" / "config.yaml").touch()
    assert open_run_folder(tmp_path, "base", None, resume=True).path == tmp_path / "base"


def test_an_imported_checkpoint_is_no_run(tmp_path: Path) -> None:
    facts = {"tokens": 0, "counters": {}, "holds": WEIGHTS_AND_MOMENTS}
    path = save_checkpoint(tmp_path / "base" / "checkpoints", 9, [], facts, [], SingleProcessCommunicator())
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path, "base", None, True)
    assert_names(refused.value, f"--resume {path}", "run.name=NEW")


def test_a_root_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.root"):
        open_run_folder(tmp_path / "file" / "runs", None, "quickstart", resume=False)


def test_one_rank_claims_the_failure(tmp_path: Path) -> None:
    path = tmp_path / "failures" / "attempt-1.txt"
    assert FailureClaim(path).exit_code() is None
    assert FailureClaim(path).take("rank 1: why", 2) is True
    assert FailureClaim(path).take("rank 0: lost its peer", 1) is False
    assert FailureClaim(path).exit_code() == 2
    assert path.read_text().splitlines()[1:] == ["rank 1: why"]
    for other in ("", "exit code 1", "Traceback of an earlier release\n"):
        path.write_text(other)
        assert FailureClaim(path).exit_code() is None


def test_where_no_claim_can_be_written_a_rank_speaks(tmp_path: Path) -> None:
    assert FailureClaim(tmp_path / "failures" / ("no such name is possible" * 20)).take("rank 0: why", 1)
    path = tmp_path / "full" / "attempt-1.txt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        assert FailureClaim(path).take("rank 0: why", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == ""


def test_no_attempt_number_is_used_twice(tmp_path: Path) -> None:
    """Any one file that records an attempt is enough, so deleting metrics.jsonl does not start the numbers again."""
    folder = RunFolder(tmp_path)
    assert folder.next_attempt() == 1
    save(folder.checkpoints, 6, attempt=2)
    assert folder.next_attempt() == 3
    write_json(folder.path / "environment.attempt-1.json", {"attempt": 3})
    assert folder.next_attempt() == 4
    write_json(folder.request, {"attempt": 4})
    assert folder.next_attempt() == 5
    FailureClaim(folder.failure(5)).take("why", 1)
    (tmp_path / "failures" / "attempt-99-notes.txt").write_text("a person's")
    assert folder.next_attempt() == 6
    with MetricsWriter(folder.metrics) as metrics:
        metrics.row("event", event="rollback", step=6, attempt=6)
    assert folder.next_attempt() == 7
    folder.request.write_text("{")
    folder.environment_json.write_text("[]")
    assert folder.next_attempt() == 7


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "log.txt", "checkpoints/latest", "resume.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_before_it_is_opened(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    make(tmp_path / "mine" / name)
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path, "mine", None, resume=True)
    assert_names(refused.value, tmp_path / "mine" / name)


@pytest.mark.parametrize("name", ["checkpoints", "failures", "samples"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).touch()
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path, "mine", None, resume=True)
    assert_names(refused.value, tmp_path / "mine" / name)
    assert FailureClaim(tmp_path / "mine" / name / "attempt-1.txt").take("why", 1), "a failure is not silent"


def test_old_files_of_a_start_have_one_number(tmp_path: Path) -> None:
    """Also after somebody has deleted some: who looks up a step reads configuration and environment of one start."""
    loaded = load_run_config(None, [])
    source = read_deepspeed_json(str(Path(__file__).resolve().parents[3] / "ds_configs" / "fp32.json"))
    run = resolve(loaded, source, 1, DeviceFacts("cpu", False, 1 << 33), 100)
    folder = open_run_folder(tmp_path, "mine", None, resume=False)
    for attempt in (1, 2, 3):
        write_facts(folder, run, {"attempt": attempt})
    (folder.path / "environment.attempt-1.json").unlink()
    (folder.path / "environment.attempt-notes.json").touch()
    write_facts(folder, run, {"attempt": 4})
    assert json.loads((folder.path / "environment.attempt-3.json").read_text())["attempt"] == 3
    assert sorted(path.name for path in folder.path.glob("config.attempt-*")) == [
        f"config.attempt-{number}.yaml" for number in (1, 2, 3)
    ]
