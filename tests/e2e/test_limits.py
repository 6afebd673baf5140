"""The time that a run is given, and a rank that stands still: every rank says where, and nothing is left behind."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from megalm.engine.ranks.flight_recorder import read_dumps
from megalm.runs.metrics_log import live_rows
from megalm.train.lifecycle.time_limits import Watchdog
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import PRETRAIN, finish, job, losses, own_lines, pretrain, rows, run_folder, train_rows
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

ENDLESS = "train.steps=1000000"
HANG_SECONDS = 6
WALL_SECONDS = 18
# The launcher gives a child that does not hear SIGTERM, because it is stopped, half a minute before SIGKILL.
LAUNCHER_SECONDS = 180.0


# Steps that take their time, but not the processor's.
UNHURRIED = """
import runpy, sys, time
import megalm.train.trainer as loop

step = loop.Trainer._train_step

def unhurried(self):
    time.sleep(0.2)
    return step(self)

loop.Trainer._train_step = unhurried
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def by_script(folder: Path, script: str, command: list[str | Path]) -> list[str | Path]:
    """The command, started by a script."""
    (path := folder / "script.py").write_text(script)
    at = command.index(PRETRAIN)
    return [*command[:at], path, *command[at:]]


def test_leaves_in_time_and_goes_on(small_data: SmallData, tmp_path: Path) -> None:
    words = (*small_data.words, "run.name=mine", "schedule.kind=constant", "--resume", "auto")
    command = pretrain(*words, ENDLESS, f"train.max_wall_time={WALL_SECONDS}s", ranks=2)
    finished = finish(tmp_path, by_script(tmp_path, UNHURRIED, command))
    assert finished.code == 75, finished.explain()
    events = [row["event"] for row in rows(tmp_path) if row["kind"] == "event"]
    assert events[-3:] == ["wall_time", "checkpoint", "end"]
    assert rows(tmp_path)[-1]["status"] == "stopped"
    (start,) = [row for row in rows(tmp_path) if row.get("event") == "start"]
    took = start["startup_seconds"] + rows(tmp_path)[-1]["time"] - start["time"]
    assert WALL_SECONDS / 2 < took < WALL_SECONDS, "it used its time, and did not exceed it"
    stopped = train_rows(tmp_path)[-1]["step"]
    finished = finish(tmp_path, pretrain(*words, f"train.steps={stopped + 3}", ranks=2))
    assert finished.code == 0, finished.explain()
    assert list(losses(tmp_path)) == list(range(1, stopped + 4))


@pytest.mark.parametrize("using", ["forked", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_noticed(small_data: SmallData, tmp_path: Path, using: str) -> None:
    words = (*small_data.words, ENDLESS, f"train.hang_timeout_seconds={HANG_SECONDS}")
    with job(tmp_path, pretrain(*words, using=using, ranks=2)) as started:
        started.wait_for_step(3)
        started.rank(1).send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        finished = started.wait(LAUNCHER_SECONDS + 60, patience_seconds=LAUNCHER_SECONDS)
    assert time.monotonic() - stopped < HANG_SECONDS + LAUNCHER_SECONDS
    assert finished.code != 0, finished.explain()
    assert finished.left == []
    (line,) = own_lines(finished.stderr)
    assert line.startswith(f"megalm: error: rank 1 on {socket.gethostname()} (cpu) ")
    assert_names(line, "SIGSTOP", "train.hang_timeout_seconds", "stopped")
    stacks = run_folder(tmp_path) / "stacks" / "rank-0.txt"
    assert str(stacks.parent.relative_to(tmp_path)) in line
    assert line in (run_folder(tmp_path) / "log.txt").read_text()
    assert line in (run_folder(tmp_path) / "failures" / "attempt-1.txt").read_text()
    # Where the main thread stood: it met the stopped one in a step, or in asking whether to leave.
    assert re.search(r"trainer\.py\S* line \d+ in (_train_step|_should_stop)\b", stacks.read_text())
    end = rows(tmp_path)[-1]
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "failed", 1)


def test_a_killed_rank_costs_one_interval_and_changes_no_number(small_data: SmallData, tmp_path: Path) -> None:
    words = [word for word in small_data.words if not word.startswith("checkpoint.")]
    words += ["run.name=mine", "schedule.kind=constant", "checkpoint.interval_steps=3", "--resume", "auto"]
    (straight := tmp_path / "straight").mkdir()
    (killed := tmp_path / "killed").mkdir()
    with job(killed, pretrain(*words, ENDLESS, ranks=2)) as started:
        started.wait_for_step(7)
        started.rank(1).send_signal(signal.SIGKILL)
        ended = started.wait(LAUNCHER_SECONDS)
    assert ended.code != 0
    assert_names(ended.stderr, f"rank 1 on {socket.gethostname()}")
    reached = train_rows(killed)[-1]["step"]
    for folder in (killed, straight):
        finished = finish(folder, pretrain(*words, f"train.steps={reached + 3}", ranks=2))
        assert finished.code == 0, finished.explain()
    (resume,) = [row for row in rows(killed) if row.get("event") == "resume"]
    assert reached - 3 <= resume["step"] <= reached

    def numbers(folder: Path) -> list[tuple[int, float, float]]:
        live = live_rows(rows(folder))
        return [(row["step"], row["loss"], row["grad_norm"]) for row in live if row["kind"] == "train"]

    assert numbers(killed) == numbers(straight)


# Rank 1 goes into a loop of its own; both ranks can still write their stacks.
LOST = """
import os, runpy, sys, time
import megalm.train.trainer as loop

step = loop.Trainer._train_step

def lost_in_thought(self):
    while os.environ["RANK"] == "1" and self.position.step == 3:
        time.sleep(0.1)
    return step(self)

loop.Trainer._train_step = lost_in_thought
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_rank_writes_where_it_stood(small_data: SmallData, tmp_path: Path) -> None:
    words = (*small_data.words, ENDLESS, f"train.hang_timeout_seconds={HANG_SECONDS}")
    finished = finish(tmp_path, by_script(tmp_path, LOST, pretrain(*words, ranks=2)))
    assert finished.code == 1, finished.explain()
    assert finished.left == []
    (line,) = own_lines(finished.stderr)  # one rank speaks
    assert line.startswith(f"megalm: error: rank 1 on {socket.gethostname()} (cpu) ")
    folder = run_folder(tmp_path) / "stacks"
    entered = read_dumps(folder, "gloo_rank_")[0]["entries"][-1]
    assert_names(line, "rank 0", entered["profiling_name"].partition(":")[2], entered["collective_seq_id"])
    assert "lost_in_thought" in (folder / "rank-1.txt").read_text()
    assert "_train_step" in (folder / "rank-0.txt").read_text()


SLOW_BUT_ALIVE = """
import sys, time
from pathlib import Path
from megalm.train.lifecycle.time_limits import TimeLimits, Watchdog

limits = TimeLimits(watchdog=Watchdog(Path(sys.argv[1]), 2.0, lambda silence: print("hangs", flush=True)))
limits.boundary()
for _ in range(10):
    time.sleep(0.4)
    limits.heartbeat()
limits.stop_watching()
time.sleep(3)
print("done", flush=True)
"""


def test_what_makes_progress_is_left_alone(tmp_path: Path) -> None:
    """A validation of four seconds, each batch a beat, with a limit of two; and the end of a run, without beats."""
    with job(tmp_path, [sys.executable, "-c", SLOW_BUT_ALIVE, tmp_path / "stacks.txt"]) as started:
        finished = started.wait()
    assert finished.stdout == "done\n", finished.explain()
    assert not (tmp_path / "stacks.txt").exists()


def test_the_watchdog_tells_once(tmp_path: Path) -> None:
    told: list[float] = []
    dog = Watchdog(tmp_path / "stacks" / "rank-0.txt", 0.4, told.append)
    dog.start()
    dog.join(timeout=10)
    assert len(told) == 1
    assert told[0] > 0.4
    assert "test_the_watchdog_tells_once" in (tmp_path / "stacks" / "rank-0.txt").read_text()
