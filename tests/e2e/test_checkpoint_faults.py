"""Damage, full disks and secrets, met by the real commands."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.tracking.mlflow_mirror import mirror_process
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import PRETRAIN, finish, job, losses, pretrain, rows, run_folder, train_rows, until
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

WORDS = ("run.name=mine", "schedule.kind=constant", "checkpoint.interval_steps=2")


def _words(small_data: SmallData, *more: str) -> tuple[str, ...]:
    stated = {word.split("=")[0] for word in (*WORDS, *more)}
    return (*(word for word in small_data.words if word.split("=")[0] not in stated), *WORDS, *more)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_loudly(small_data: SmallData, tmp_path: Path) -> None:
    """The newest has a flipped bit, the one before lost its end: auto takes the third, by name both are refused."""
    words = _words(small_data)
    finished = finish(tmp_path, pretrain(*words, "train.steps=6"))
    assert finished.code == 0, finished.explain()
    undisturbed = losses(tmp_path)
    checkpoints = run_folder(tmp_path) / "checkpoints"
    flipped, cut = (checkpoints / f"step-{step:08d}" / "rank-00000.safetensors" for step in (6, 4))
    _flip(flipped)
    cut.write_bytes(cut.read_bytes()[:-8])

    for wanted, file in (("6", flipped), ("4", cut)):
        refused = finish(tmp_path, pretrain(*words, "train.steps=6", "--resume", wanted))
        assert refused.code == 2, refused.explain()
        (line,) = refused.stderr.splitlines()
        assert "/".join(file.parts[-2:]) in line

    resumed = finish(tmp_path, pretrain(*words, "train.steps=6", "--resume", "auto"))
    assert resumed.code == 0, resumed.explain()
    warnings = [row["text"] for row in rows(tmp_path) if row.get("event") == "warning"]
    assert len(warnings) == 2
    for file, warning in zip((flipped, cut), warnings, strict=True):
        assert "/".join(file.parts[-2:]) in warning
        assert f"WARNING: {warning}" in resumed.stdout
    attempt = train_rows(tmp_path)[-1]["attempt"]
    assert [row["step"] for row in train_rows(tmp_path) if row["attempt"] == attempt] == [3, 4, 5, 6]
    assert losses(tmp_path) == undisturbed


@pytest.fixture
def small_disk(mounted_disk: Callable[[str], Path]) -> Path:
    return mounted_disk("5m")


@pytest.mark.parametrize("behind", ["checkpoint.async=false", "checkpoint.async=true"])
def test_a_disk_that_holds_two_checkpoints_and_no_more(small_data: SmallData, small_disk: Path, behind: str) -> None:
    """The third is refused before it is begun; what is there stays, and with retention there is room for all."""
    words = _words(small_data, "train.steps=8", behind)
    finished = finish(small_disk, pretrain(*words, ranks=2))
    assert finished.code == 1, finished.explain()
    said = next(line for line in finished.stderr.splitlines() if line.startswith("megalm: "))
    assert "step-00000006" in said
    assert len(re.findall(r"\d [KM]iB", said)) >= 2, "what is free and what is needed"
    left = sorted(path.name for path in (run_folder(small_disk) / "checkpoints").iterdir())
    assert left == ["latest", "step-00000002", "step-00000004"]
    assert rows(small_disk)[-1]["status"] == "failed"

    command = pretrain(*words, "checkpoint.keep_last=1", "--resume", "auto", ranks=2)
    resumed = finish(small_disk, command)
    assert resumed.code == 0, resumed.explain()
    assert list(losses(small_disk)) == list(range(1, 9))
    left = sorted(path.name for path in (run_folder(small_disk) / "checkpoints").iterdir())
    assert left == ["latest", "step-00000008"]


SECRETS = {
    "MEGALM_CANARY_TOKEN": "canary-token-5f1e",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-77ab",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-90cd",
}


FAILS = """
import runpy, sys
import megalm.train.trainer as trainer

def fail(self, seconds):
    raise RuntimeError("made to fail")

trainer.Trainer._finish = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _holds(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("steps", [4, 0])
def test_secrets_of_the_environment_are_written_nowhere(
    small_data: SmallData, empty_store: Path, tmp_path: Path, steps: int
) -> None:
    """Not by a run that is tracked, nor by one that fails with a traceback."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    words = _words(small_data, "train.steps=4", "tracking.mlflow=true")
    command = pretrain(*words, "--verbose")
    if not steps:
        (script := tmp_path / "fails.py").write_text(FAILS)
        command.insert(command.index(PRETRAIN), script)
    finished = finish(tmp_path, command, environment=SECRETS, patience_seconds=30)
    assert finished.code == (0 if steps else 1), finished.explain()
    if steps:
        assert (tmp_path / "runs" / "mlflow.db").read_bytes() != empty_store.read_bytes()
    else:
        assert "RuntimeError: made to fail" in finished.stderr, finished.explain()
    for name, secret in SECRETS.items():
        assert secret not in finished.stdout + finished.stderr, name
        assert _holds(tmp_path, secret) == [], name


def test_a_password_in_an_address_is_written_nowhere(small_data: SmallData, tmp_path: Path) -> None:
    """MLFLOW_TRACKING_URI of a server that does not answer. The mirror is killed once it has said so; else it waits."""
    uri = "http://127.0.0.1:9?user=me@corp.example&password=canary-password-31ef"
    command = pretrain(*_words(small_data, "train.steps=4", "tracking.mlflow=true"))
    log = tmp_path / "runs" / "mine" / "mlflow.log"
    with job(tmp_path, command, {"MLFLOW_TRACKING_URI": uri}) as started:
        until(lambda: log.is_file() and "127.0.0.1:9" in log.read_text(), 120)
        until(lambda: any(row.get("event") == "end" for row in rows(tmp_path)), 120)
        (mirror,) = [process for process in started.processes() if mirror_process.__name__ in process.cmdline()]
        mirror.kill()
        finished = started.wait()
    assert finished.code == 0, finished.explain()
    assert_names(finished.stdout, "megalm track sync")
    assert "canary-password" not in finished.stdout + finished.stderr
    assert _holds(tmp_path, "canary-password") == []


def test_a_second_job_on_the_folder_is_refused(small_data: SmallData, tmp_path: Path) -> None:
    """The first goes on undisturbed; once it is killed a third takes its place."""
    words = _words(small_data, "--resume", "auto")
    with job(tmp_path, pretrain(*words, "train.steps=1000000")) as first:
        first.wait_for_step(3)
        second = finish(tmp_path, pretrain(*words, "train.steps=1000000"))
        assert second.code == 2, second.explain()
        assert platform.node() in second.stderr, second.explain()
        assert str(first.process.pid) in second.stderr
        step = train_rows(tmp_path)[-1]["step"]
        first.wait_for_step(step + 1)
        first.process.kill()
        first.wait(patience_seconds=20)
    done = train_rows(tmp_path)[-1]["step"]
    third = finish(tmp_path, pretrain(*words, f"train.steps={done + 2}"))
    assert third.code == 0, third.explain()
    assert list(losses(tmp_path)) == list(range(1, done + 3))
