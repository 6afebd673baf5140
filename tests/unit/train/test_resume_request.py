"""What the last attempt went on from, and what `--resume auto` makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import DataSegment, set_status, write_manifest
from megalm.communicator import SingleProcessCommunicator
from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.errors import CheckpointError, ConfigError
from megalm.runs.run_folder import RunFolder
from megalm.runs.run_settings import Arguments, Extension, ResumeOptions
from megalm.train.resume.resume_plan import find_checkpoint
from megalm.train.resume.resume_request import (
    attempt_after_rollback,
    describe_attempt,
    read_last_attempt,
    record_attempt,
    write_attempt,
)
from tests.checkpoint_files import save
from tests.messages import assert_names

CPU = DeviceFacts(kind="cpu", bf16=True, memory_bytes=2**36)
AUTO = ResumeOptions("auto")
ASKED = ResumeOptions("20", Extension(50), skip_steps=5, allow=("dataset",))


def saved(checkpoints: Path, step: int, next_sample: int = 0, **facts: object) -> CheckpointReader:
    segment = DataSegment(order="order", sequence_length=64, global_batch=16, samples_consumed=next_sample)
    path = save(checkpoints, step, data_position={"segments": [segment.model_dump()]}, **facts)
    return CheckpointReader(path)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Steps 10, 20, 30, 40 of attempt 1; attempt 2 went on from 20."""
    folder = RunFolder(tmp_path / "mine")
    readers = {step: saved(folder.checkpoints, step, 16 * step) for step in (10, 20, 30, 40)}
    write_attempt(folder, describe_attempt(readers[20], ASKED, attempt=2))
    return folder


def found(folder: RunFolder) -> tuple[int, ResumeOptions]:
    before, requeued = read_last_attempt(folder, "auto")
    assert not requeued
    start = find_checkpoint(folder, "auto", SingleProcessCommunicator(), before.origin if before else None)
    assert start is not None
    return start.reader.manifest.step, before.repeat(AUTO, start.reader) if before else AUTO


def test_later_steps_of_an_attempt_that_was_left_are_not_taken(folder: RunFolder) -> None:
    step, resume = found(folder)
    assert step == 20
    assert (resume.extension, resume.skip_steps, resume.allow) == (Extension(50), 5, ("dataset",))
    folder.request.unlink()
    assert found(folder) == (40, AUTO), "without the note they are"


def test_what_the_attempt_saved_itself_stands_for_it(folder: RunFolder) -> None:
    saved(folder.checkpoints, 25, attempt=2)
    assert found(folder) == (25, AUTO)
    set_status(folder.checkpoints / "step-00000025", "bad", "no good")
    assert found(folder)[0] == 20


def test_what_was_chosen_is_as_good_as_a_good_one(folder: RunFolder) -> None:
    set_status(folder.checkpoints / "step-00000020", "suspect", "a spike at 19")
    assert found(folder)[0] == 20
    saved(folder.checkpoints, 25, attempt=2, status="suspect")
    assert found(folder)[0] == 20, "and better than a later suspect one"
    set_status(folder.checkpoints / "step-00000020", "bad", "no good")
    assert found(folder)[0] == 40


def test_one_that_is_gone_is_no_reason_to_take_another(folder: RunFolder) -> None:
    shutil.rmtree(folder.checkpoints / "step-00000020")
    with pytest.raises(CheckpointError) as refused:
        found(folder)
    assert_names(refused.value, folder.checkpoints / "step-00000020", "--resume", "step-00000040")
    saved(folder.checkpoints, 25, attempt=2)
    assert found(folder) == (25, AUTO)


def test_the_start_of_a_run_is_another_run_s_checkpoint(tmp_path: Path) -> None:
    start = saved(tmp_path / "old" / "checkpoints", 500, attempt=3)
    folder = RunFolder(tmp_path / "new")
    write_attempt(folder, describe_attempt(start, ResumeOptions("x", Extension(9, "weights")), attempt=1))
    step, resume = found(folder)
    assert step == 500
    assert resume.weights_only
    saved(folder.checkpoints, 5)
    assert found(folder) == (5, AUTO)
    shutil.rmtree(folder.checkpoints)
    shutil.rmtree(start.path)
    with pytest.raises(CheckpointError) as refused:
        found(folder)
    assert_names(refused.value, start.path, "--resume")


def test_a_folder_that_is_moved_keeps_its_start(folder: RunFolder) -> None:
    moved = RunFolder(folder.path.rename(folder.path.with_name("moved")))
    assert found(moved)[0] == 20


def test_data_that_a_rollback_passed_over_is_not_passed_over_twice(folder: RunFolder) -> None:
    before, _ = read_last_attempt(folder, "auto")
    reader = CheckpointReader(folder.checkpoints / "step-00000020")
    write_attempt(folder, attempt_after_rollback(before, reader, attempt=3))
    assert found(folder)[1].skip_steps == 5, "killed before the checkpoint told of it"
    segment = reader.manifest.data_position.segments[0].model_copy(update={"samples_skipped": 96})
    write_manifest(reader.path, reader.manifest.amended(data_position={"segments": [segment.model_dump()]}))
    assert found(folder) == (20, ResumeOptions("auto", Extension(50), 0, ("dataset",)))
    later = saved(folder.checkpoints, 25, 400, attempt=2)
    saved(folder.checkpoints, 28, 448, attempt=2)
    write_attempt(folder, attempt_after_rollback(before, later, attempt=4))
    assert found(folder) == (25, AUTO), "the extension is in it"


def test_the_words_of_a_requeued_job_are_those_of_its_first_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_attempt(folder, describe_attempt(CheckpointReader(folder.checkpoints / "step-00000020"), ASKED, attempt=2))
    assert not read_last_attempt(folder, "20")[1], "the same command in one allocation, by hand"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert read_last_attempt(folder, "20")[1]
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not read_last_attempt(folder, "20")[1]


def test_a_job_that_restarts_in_vain_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    reader = CheckpointReader(folder.checkpoints / "step-00000020")
    for restarts in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        assert record_attempt(folder, reader, ResumeOptions("auto"), 2 + restarts).restarts_without_progress == restarts
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(ConfigError) as refused:
        record_attempt(folder, reader, ResumeOptions("auto"), attempt=5)
    assert_names(refused.value, "77", "step-00000020", 3)
    record_attempt(folder, saved(folder.checkpoints, 25, attempt=2), ResumeOptions("auto"), attempt=5)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert record_attempt(folder, reader, ResumeOptions("auto"), attempt=6).restarts_without_progress == 0


def test_damage_is_reported_and_a_named_checkpoint_is_the_way_out(folder: RunFolder) -> None:
    folder.request.write_bytes(folder.request.read_bytes()[:-9])
    with pytest.raises(CheckpointError) as refused:
        read_last_attempt(folder, "auto")
    assert_names(refused.value, folder.request, "--resume")
    assert read_last_attempt(folder, "20") == (None, False)


def test_flags_that_say_nothing_without_others_are_refused() -> None:
    """`--extend-strategy weights` alone would go on with moments, schedule and data, and say nothing of it."""
    for stated, names in (
        (Arguments(None, resume="auto", extend_strategy="weights"), ("--extend-strategy weights", "--extend-steps")),
        (Arguments(None, extend_steps=5), ("--extend-steps", "--resume")),
        (Arguments(None, skip_steps=5), ("--skip-steps", "--resume")),
    ):
        with pytest.raises(ConfigError) as refused:
            stated.resume_options()
        assert_names(refused.value, *names)
    assert Arguments(None, resume="auto").resume_options() == ResumeOptions("auto")
    assert Arguments(None, resume="7", extend_steps=5, extend_strategy="weights").resume_options().weights_only


def test_an_extension_from_weights_is_a_run_of_that_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, files = Arguments(None, resume="7", extend_steps=5, extend_strategy="weights").read(1, CPU)
    assert (files.loaded.config.train.steps, options.extension) == (5, Extension(5, "weights"))
    _, files = Arguments(None, resume="7", extend_steps=5, overrides=("train.steps=50",)).read(1, CPU)
    assert files.loaded.config.train.steps == 50
