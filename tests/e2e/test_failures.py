"""A job that fails, is killed or is asked to stop: it ends in seconds, says why once, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed.dataset import IndexedDataset, sidecar_path
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import TrainingSamples
from megalm.runs.metrics_log import ATTEMPT_EVENTS, live_rows, read_metrics
from megalm.train.lifecycle.shutdown import FailureClaim
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import (
    MEGALM,
    ROOT,
    Job,
    finish,
    interrupt_group,
    job,
    losses,
    own_lines,
    pretrain,
    rows,
    run_folder,
    train_rows,
    until,
)
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

# From the cause to the end of the last process. DeepSpeed's launcher looks once a second.
SOON_SECONDS = 120.0
ENDLESS = "train.steps=1000000"
POISON = 60_000  # no token of the small vocabulary


def poisoned(small_data: SmallData, folder: Path) -> tuple[str, str]:
    """A dataset with one token beyond the vocabulary, and a seed by which rank 1 of 2 meets it first."""
    good = IndexedDataset(small_data.prefix)
    tokens = good.tokens.astype(np.int64)
    tokens[len(tokens) // 2] = POISON
    with IndexedDatasetWriter(folder / "poisoned", np.uint16) as writer:
        writer.append_documents(tokens, list(good.sequence_lengths))
    # With the record of its builder: a dataset of another toolkit is looked at when the run starts.
    shutil.copy(sidecar_path(small_data.prefix), sidecar_path(folder / "poisoned"))
    dataset = IndexedDataset(folder / "poisoned")
    for seed in range(200):
        samples = TrainingSamples(dataset, (0, len(dataset)), 64, seed)
        for step in range(6):
            met = [_meets(samples, step, rank) for rank in (0, 1)]
            if any(met):
                break
        if met == [False, True]:
            return str(folder / "poisoned"), f"train.seed={seed}"
    raise AssertionError("no such seed")


def _meets(samples: TrainingSamples, step: int, rank: int) -> bool:
    with BatchLoader(samples, BatchLayout(16, 8, rank, 2)) as loader:
        return any(
            (micro.labels == POISON).any() or (micro.tokens == POISON).any()
            for micro in loader.batch(step * 16).micro_batches
        )


def test_a_token_outside_the_vocabulary_ends_the_job_in_one_line(small_data: SmallData, tmp_path: Path) -> None:
    """Rank 1 alone reads it, in a later batch."""
    prefix, seed = poisoned(small_data, tmp_path)
    words = [word for word in small_data.words if not word.startswith(("data.train", "data.split"))]
    finished = finish(tmp_path, pretrain(*words, f"data.train={prefix}", "data.split=null", seed, ranks=2))
    assert (finished.code, finished.left) == (2, []), finished.explain()
    (line,) = own_lines(finished.stderr)
    assert_names(line, f"{prefix}.bin", POISON)
    end = rows(tmp_path)[-1]
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "failed", finished.code)


FAILING = """
import os, runpy, sys
from megalm.engine.zero_engine import ZeroEngine

train_step = ZeroEngine.train_step

def failing_train_step(self, batch, step, rate):
    if step == 2 and os.environ["RANK"] == "1":
        raise IndexError("not there")
    return train_step(self, batch, step, rate)

ZeroEngine.train_step = failing_train_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_rank_that_failed_has_the_last_word(small_data: SmallData, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    launch, script, *words = pretrain(*small_data.words, ranks=2)
    finished = finish(tmp_path, [launch, tmp_path / "failing.py", script, *words])
    assert (finished.code, finished.left) == (1, []), finished.explain()
    said = own_lines(finished.stderr)
    assert said[0].startswith("megalm: error: rank 1 "), finished.explain()
    assert said[1] == "Traceback (most recent call last):"
    assert finished.stderr.count("Traceback") == 1, finished.explain()
    assert "train_step" in finished.stderr
    assert said[-1] == "IndexError: not there", finished.explain()
    end = rows(tmp_path)[-1]
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "failed", 1)
    report = next((run_folder(tmp_path) / "failures").iterdir())
    assert report.read_text().splitlines()[1:] == said


def test_a_killed_rank_ends_the_job(small_data: SmallData, tmp_path: Path) -> None:
    command = pretrain(*small_data.words, ENDLESS, using="deepspeed", ranks=2)
    with job(tmp_path, command) as started:
        started.wait_for_step(3)
        started.rank(1).kill()
        finished = started.wait(SOON_SECONDS)
    assert finished.code != 0, finished.explain()
    assert finished.left == []
    (line,) = own_lines(finished.stderr)
    host = socket.gethostname()
    assert line.startswith(f"megalm: error: rank 1 on {host} (cpu) ")
    assert_names(line, "vanished", f"rank 0 on {host}")  # which lost its connection to it
    report = next((run_folder(tmp_path) / "failures").iterdir()).read_text()
    assert report.splitlines()[:2] == ["exit code 1", line]
    assert report.count("Traceback") == 1, "of the rank that noticed"
    assert line in (run_folder(tmp_path) / "log.txt").read_text()
    end = rows(tmp_path)[-1]
    assert (end["event"], end["status"]) == ("end", "failed")
    assert end["reason"] == line.removeprefix("megalm: error: ")
    (node,) = json.loads((run_folder(tmp_path) / "environment.json").read_text())["nodes"]
    assert (node["host"], node["ranks"], node["devices"]) == (host, [0, 1], ["cpu", "cpu"])


WAITING = """
import sys, time
from pathlib import Path
from megalm.train.lifecycle.shutdown import FailureClaim, RankSupervisor, RunHooks

def work():
    claim = FailureClaim(Path(sys.argv[1]))
    guard.enter(RunHooks(claim, on_failure=lambda code, report: Path(sys.argv[1] + ".wish").write_text(str(code))))
    print("waiting", flush=True)
    time.sleep(600)

guard = RankSupervisor(rank=0)
guard.run(work)
"""


def test_a_rank_that_waits_forever_leaves_with_the_failed_one(tmp_path: Path) -> None:
    """As in a collective on a GPU whose other ranks have gone: nothing returns, no signal is heard."""
    claim = tmp_path / "failures" / "attempt-1.txt"
    with job(tmp_path, [sys.executable, "-c", WAITING, claim]) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline() == "waiting\n"
        assert FailureClaim(claim).take("rank 3 refused its data", 2)
        finished = started.wait(SOON_SECONDS)
    assert finished.code == 2, "as the rank that failed, whichever the launcher asks"
    assert finished.stderr == ""
    assert Path(f"{claim}.wish").read_text() == "2"
    assert claim.read_text().splitlines()[1:] == ["rank 3 refused its data"]


FULL = """
import errno, os, resource, sys
from pathlib import Path
from megalm.train.lifecycle.shutdown import FailureClaim, RankSupervisor, RunHooks

def work():
    claim = FailureClaim(Path(sys.argv[1]))
    guard.enter(RunHooks(claim, on_failure=lambda code, report: os.write(1, f"wish {code}".encode())))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    raise OSError(errno.ENOSPC, "No space left on device")

guard = RankSupervisor(rank=0)
guard.run(work)
"""


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    """Though the account of it does not fit that disk either."""
    with job(tmp_path, [sys.executable, "-c", FULL, tmp_path / "failures" / "attempt-1.txt"]) as started:
        finished = started.wait()
    assert (finished.code, finished.stdout) == (1, "wish 1"), finished.explain()
    (line,) = finished.stderr.splitlines()
    assert "[Errno 28] No space left on device" in line, finished.explain()
    assert str(tmp_path) in line
    assert "--resume auto" in line


UNREAD = """
import sys
from pathlib import Path
from megalm.train.lifecycle.shutdown import RankSupervisor
from megalm.train.console import RunConsole
from megalm.utils.process_setup import keep_standard_streams

def work():
    reporter = RunConsole(True, Path(sys.argv[1]))
    sys.stdin.readline()
    for step in range(3):
        reporter.info(f"step {step}")
    print("and this is in Python's buffer at the end")
    return 75

keep_standard_streams()
RankSupervisor(rank=0).run(work)
"""


def test_training_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    """`... | head`, or a terminal that has gone."""
    command = [sys.executable, "-c", UNREAD, tmp_path / "log.txt"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as started:
        assert started.stdout is not None
        started.stdout.close()
        _, stderr = started.communicate("go on\n", timeout=SOON_SECONDS)
    assert (started.returncode, stderr) == (75, "")
    assert [line.rpartition(" ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["0", "1", "2"]


LETTERS = """
import sys
from pathlib import Path
from megalm.train.console import RunConsole
from megalm.utils.process_setup import keep_standard_streams

keep_standard_streams()
reporter = RunConsole(True, Path(sys.argv[1]))
for word in ("one", "zw\\xf6lf \\u2192 \\udcff", "three"):
    reporter.info(word)
"""


def test_a_terminal_without_the_letters_of_a_sample_ends_no_run(tmp_path: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii"}
    finished = finish(tmp_path, [sys.executable, "-c", LETTERS, tmp_path / "log.txt"], environment=environment)
    assert (finished.code, finished.stderr) == (0, ""), finished.explain()
    assert finished.stdout == "one\nzw\\xf6lf \\u2192 \\udcff\nthree\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("three\n")


# What Python finds at its start: closed streams, a full disk, a pipe without a reader.
REDIRECTED = """
import os, runpy, sys
del sys.argv[0]
how = sys.argv.pop(0)
if how == ">&- 2>&-":
    os.closerange(1, 3)
    sys.stdout = sys.stderr = None
elif how == ">/dev/full":
    os.dup2(os.open(how[1:], os.O_WRONLY), 1)
else:
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", ">/dev/full", "| true"])
def test_an_end_is_what_it_is_without_standard_output(small_data: SmallData, tmp_path: Path, redirection: str) -> None:
    """A good run ends with 0, one that is stopped with 75; metrics.jsonl never gets the number of a closed stdout."""
    is_real = redirection == ">&-"
    words = small_data.changed("run.name=mine", "checkpoint.interval_steps=2", ENDLESS)
    command = [str(word) for word in pretrain(*words, using="python" if is_real else "forked")]
    if is_real:
        command = ["bash", "-c", f'"$@" {redirection}; exit $?', "bash", *command]
    else:
        (script := tmp_path / "redirected.py").write_text(REDIRECTED)
        command[1:1] = [str(script), redirection]
    with job(tmp_path, command) as started:
        started.wait_for_step(2)
        started.rank(0).send_signal(signal.SIGTERM)
        finished = started.wait()
    assert finished.code == 75, finished.explain()
    assert own_lines(finished.stderr) == []
    assert rows(tmp_path)[-1]["exit_code"] == 75


@pytest.mark.parametrize("redirection", [">&-", "| true"])
def test_commands_do_all_their_work_without_standard_output(six_steps: Path, redirection: str) -> None:
    page = six_steps / "page.html"
    words = [str(word) for word in (MEGALM, "report", run_folder(six_steps), "--output", page)]
    finished = finish(six_steps, ["bash", "-o", "pipefail", "-c", f'"$@" {redirection}', "bash", *words])
    assert (finished.code, finished.stderr) == (0, ""), finished.explain()
    page.unlink()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_standard_output_is_one_line(tmp_path: Path, unbuffered: str) -> None:
    environment = {"PYTHONUNBUFFERED": unbuffered}
    finished = finish(tmp_path, ["bash", "-c", f"{MEGALM} presets > /dev/full"], environment=environment)
    assert finished.code != 0
    (line,) = finished.stderr.splitlines()
    assert_names(line, os.strerror(errno.ENOSPC))


REFUSED = """
from megalm.errors import ConfigError
from megalm.train.lifecycle.shutdown import RankSupervisor

def work():
    print("refused", flush=True)
    raise ConfigError("no such key")

RankSupervisor(rank=1).run(work)
"""


@pytest.mark.parametrize("ended_by_launcher", [True, False])
def test_a_refusal_is_rank_0s_to_tell(tmp_path: Path, ended_by_launcher: bool) -> None:
    """Another rank waits for it to speak; one that nobody ends has a refusal of its own, and tells it."""
    with job(tmp_path, [sys.executable, "-c", REFUSED]) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline() == "refused\n"
        if ended_by_launcher:
            time.sleep(0.5)  # until it waits
            started.process.send_signal(signal.SIGTERM)
        finished = started.wait(SOON_SECONDS)
    assert finished.code == 2
    if ended_by_launcher:
        assert finished.stderr == ""
    else:
        (line,) = finished.stderr.splitlines()
        assert "no such key" in line
        assert "rank 1" in line


def terminate_launcher(started: Job) -> None:
    started.process.send_signal(signal.SIGTERM)


def hang_up_rank(started: Job) -> None:
    started.rank(1).send_signal(signal.SIGHUP)


STOPS: dict[str, tuple[str, int, Callable[[Job], None]]] = {
    "ctrl-c, deepspeed": ("deepspeed", 2, interrupt_group),
    "terminated launcher": ("deepspeed", 1, terminate_launcher),
    "closed terminal, one rank": ("forked", 2, hang_up_rank),
}


@pytest.mark.parametrize("name", list(STOPS))
def test_stops_with_everything_saved(small_data: SmallData, tmp_path: Path, name: str) -> None:
    using, ranks, stop = STOPS[name]
    with job(tmp_path, pretrain(*small_data.words, ENDLESS, using=using, ranks=ranks)) as started:
        started.wait_for_step(3)
        stop(started)
        finished = started.wait(SOON_SECONDS, patience_seconds=SOON_SECONDS)
    assert finished.left == []
    # A launcher that was itself told to stop has an exit code of its own.
    expected = finished.code == 75 if stop is hang_up_rank else finished.code != 0
    assert expected, finished.explain()
    assert_all_saved(tmp_path)


def assert_all_saved(folder: Path) -> None:
    last = train_rows(folder)[-1]["step"]
    assert (run_folder(folder) / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    events = [row["event"] for row in rows(folder) if row["kind"] == "event"]
    assert events[-1] == "end"
    assert sorted(events[-3:-1]) == ["checkpoint", "signal"]  # a step that is saved anyway is not saved again
    assert rows(folder)[-1]["status"] == "stopped"


def test_a_restart_by_torchrun_resumes_the_run_that_the_job_began(small_data: SmallData, tmp_path: Path) -> None:
    """Without a name and without --resume, as the first start was; what was there before is not taken for its run.

    Ctrl-C then stops the job, with everything saved, and no further restart.
    """
    command = pretrain(*small_data.changed("checkpoint.interval_steps=2", ENDLESS), using="torchrun", ranks=2)
    (tmp_path / "runs" / "quickstart-001").mkdir(parents=True)
    with job(tmp_path, [*command[:3], "--max-restarts=1", *command[3:]]) as started:
        run = tmp_path / "runs" / "quickstart-002"
        until((run / "checkpoints" / "step-00000004").exists, 300)
        started.rank(1).kill()
        again = {"kind": "train", "attempt": 2}
        until(lambda: sum(again.items() <= row.items() for row in read_metrics(run / "metrics.jsonl")) > 5, 300)
        interrupt_group(started)
        finished = started.wait(SOON_SECONDS, patience_seconds=SOON_SECONDS)
    assert finished.code != 0, finished.explain()
    assert finished.left == []
    assert not (tmp_path / "runs" / "quickstart-003").exists(), finished.explain()
    found = list(read_metrics(run / "metrics.jsonl"))
    begun = [(row["event"], row["step"] > 0) for row in found if row.get("event") in ATTEMPT_EVENTS]
    assert begun == [("start", False), ("resume", True)]
    (tmp_path / "runs" / "quickstart-001").rmdir()
    assert_all_saved(tmp_path)
    last = train_rows(tmp_path)[-1]["step"]
    assert [row["step"] for row in live_rows(found) if row["kind"] == "train"] == list(range(1, last + 1))


def test_goes_on_after_ctrl_c(small_data: SmallData, tmp_path: Path) -> None:
    words = (*small_data.words, "run.name=mine", "--resume", "auto")
    with job(tmp_path, pretrain(*words, ENDLESS)) as started:
        started.wait_for_step(3)
        interrupt_group(started)
        interrupted = started.wait(SOON_SECONDS)
    assert (interrupted.code, interrupted.left) == (75, []), interrupted.explain()
    assert_all_saved(tmp_path)
    stopped = train_rows(tmp_path)[-1]["step"]
    finished = finish(tmp_path, pretrain(*words, f"train.steps={stopped + 5}"))
    assert finished.code == 0, finished.explain()
    assert list(losses(tmp_path)) == list(range(1, stopped + 6))
    assert [row["step"] for row in train_rows(tmp_path) if row["attempt"] == 2] == list(range(stopped + 1, stopped + 6))


def test_leaves_with_zero_every_time(small_data: SmallData, tmp_path: Path) -> None:
    """gloo's threads abort one interpreter in ten that exits in the usual way."""
    for number in range(2):  # and all the other runs of these tests
        finished = finish(tmp_path, pretrain(*small_data.words, "train.steps=3", f"run.name=short-{number}"))
        assert finished.code == 0, finished.explain()
        assert finished.left == []


def test_too_few_open_files_are_refused_in_a_line(tmp_path: Path) -> None:
    words = [str(word) for word in pretrain("--dry-run", using="python")]
    finished = finish(tmp_path, ["bash", "-c", 'ulimit -n 24; exec "$@"', "bash", *words])
    assert finished.code == 2, finished.explain()
    (line,) = finished.stderr.splitlines()
    assert_names(line, 24, "ulimit -n")
