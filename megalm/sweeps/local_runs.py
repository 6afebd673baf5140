"""Run a sweep on this machine, one run after another: those that are not finished, each as its user would start it.

A run is a session of its own, so that Ctrl-C reaches this process alone, which passes it on once, as a terminal would;
the run saves and ends, and the sweep with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megalm.errors import ConfigError
from megalm.runs.run_status import read_status
from megalm.sweeps.expansion import Sweep, SweptRun
from megalm.sweeps.sweep_folder import State, SweepFolder, state_of
from megalm.utils.progress import ProgressBar
from megalm.utils.stop_signals import handled_stop_signals

_POLL_SECONDS = 0.5
_LINE_SECONDS = 60.0  # between two lines of progress in a file; a terminal has a bar
_LONGEST_LINE = 300
_LOG_TAIL_BYTES = 20_000


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code of its command; None for a run that was not started.
        why: of a failure, its error.
    """

    run: SweptRun
    state: State
    code: int | None = None
    why: str = ""


class LocalRuns:
    """Runs the unfinished runs of a sweep.

    Args:
        launcher: the words before the arguments of launch/pretrain.py.
        say: receives a line about each run.
        show_output: let the runs write to the terminal; else to `SweepFolder.log`.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: SweepFolder,
        launcher: Sequence[str],
        say: Callable[[str], None],
        show_output: bool = False,
    ) -> None:
        self._sweep, self._folder, self._launcher = sweep, folder, list(launcher)
        self._say, self._show_output = say, show_output
        self._process: subprocess.Popen[bytes] | None = None
        self.interrupted = False

    def run(self, stop_at_failure: bool = False) -> list[Outcome]:
        """Start the runs one after another until all are done, or a signal asks to stop.

        Raises:
            ConfigError: the launcher cannot be started.
        """
        states = {run.name: state_of(self._sweep.root / run.name) for run in self._sweep.runs}
        todo = [run for run in self._sweep.runs if states[run.name] not in ("finished", "running")]
        for run in self._sweep.runs:
            if states[run.name] == "running":
                self._say(f"skipped {run.name}: another job trains it")
        outcomes = []
        with self._signals(), self._progress(len(todo)) as bar:
            for number, run in enumerate(todo):
                outcome = self._run(run, number, bar)
                outcomes.append(outcome)
                bar.update(number + 1)
                self._say(f"[{number + 1}/{len(todo)}] {_described(outcome)}")
                if self.interrupted or (stop_at_failure and outcome.state == "failed"):
                    break
        return outcomes

    def _progress(self, count: int) -> ProgressBar:
        shown: Callable[[float, float], str] = lambda done, total: f"{int(done)}/{int(total)} runs done"  # noqa: E731
        if self._show_output:  # a bar would stand among the runs' own lines
            return ProgressBar(f"sweep {self._sweep.name}", count, say=lambda line: None, shown=shown)
        return ProgressBar(f"sweep {self._sweep.name}", count, shown=shown)

    def _run(self, run: SweptRun, number: int, bar: ProgressBar) -> Outcome:
        folder = self._sweep.root / run.name
        before, next_line = read_status(folder).step, time.monotonic()
        with self._start(run) as process:
            while process.poll() is None:
                now = read_status(folder)
                if now.steps and now.step > before and time.monotonic() >= next_line:
                    next_line = time.monotonic() + (0.0 if sys.stderr.isatty() else _LINE_SECONDS)
                    values = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in run.values.items())
                    bar.update(number + min(1.0, now.step / now.steps), f"{values}: step {now.step}/{now.steps}")
                time.sleep(_POLL_SECONDS)
            self._wait_for_ranks(process.pid)
        code = process.returncode
        state = state_of(folder)
        if self.interrupted and state != "finished":
            state = "stopped"
        elif code != 0 and state in ("waiting", "finished"):  # refused before it had a folder
            state = "failed"
        why = self._failure(run, folder) if state == "failed" else ""
        return Outcome(run, state, code, why)

    @contextlib.contextmanager
    def _start(self, run: SweptRun) -> Iterator[subprocess.Popen[bytes]]:
        words = [*self._launcher, *self._sweep.arguments_of(run)]
        with contextlib.ExitStack() as opened:
            log = None if self._show_output else opened.enter_context(self._folder.log(run.name).open("ab"))
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log and subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(
                    f"{words[0]}: cannot be started ({error.strerror}); give the launcher after --, such as "
                    "-- deepspeed launch/pretrain.py"
                ) from None
            self._process = process
            if self.interrupted:  # while it was being started
                self._interrupt(process)
            try:
                yield process
            finally:
                self._process = None

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        """Pass each stop signal on to the run as a Ctrl-C, at which its launcher waits until it has saved."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            if self._process is not None:
                self._interrupt(self._process)

        return handled_stop_signals(handle)

    @staticmethod
    def _interrupt(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)

    @staticmethod
    def _wait_for_ranks(group: int) -> None:
        """Wait for what the launcher has left behind: a rank may still be saving."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while True:
                os.killpg(group, 0)
                time.sleep(_POLL_SECONDS)

    def _failure(self, run: SweptRun, folder: Path) -> str:
        """Return the error of a failed run in one line: of its report, else the last one that it printed."""
        if (reported := read_status(folder).failure) is not None:
            return reported[:_LONGEST_LINE]
        path = self._folder.log(run.name)
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
            errors = [line for line in lines if "error:" in line.lower() or "Error" in line]
            return errors[-1].strip()[:_LONGEST_LINE] if errors else ""
        return ""


def _described(outcome: Outcome) -> str:
    text = f"{outcome.run.name}: {outcome.state}"
    if outcome.state == "failed":
        text += f" (exit code {outcome.code})" + (f": {outcome.why}" if outcome.why else "")
    return text
