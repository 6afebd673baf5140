"""How a rank ends: stop signals, failures, hangs, a launcher that has died, and the exit itself.

gloo's threads can abort the interpreter at a normal exit, after correct results. So a rank flushes everything and calls
`os._exit`. A job reports one failure, that of the rank that failed first. It claims the job's failure file and prints
its traceback; the others, which then lose their connection, find the claim and exit silently. A rank that could not
report, because it was killed or stands still, is found by the others' heartbeats, and one of them reports it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

import psutil

from megalm.engine.interface import StalledCollective
from megalm.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_START_AGAIN,
    MegalmError,
    OtherRankFailed,
    is_lost_connection,
    message_of,
)
from megalm.rank_environment import RankPlace
from megalm.runs.run_folder import ERROR_OPENING, RunFolder, failure_line
from megalm.train.lifecycle.first_cause import describe_consequence, describe_lost, describe_stuck
from megalm.train.lifecycle.heartbeat import Heartbeat, LostRank
from megalm.train.lifecycle.time_limits import TimeLimits, write_stacks
from megalm.utils.atomic_files import is_stranger
from megalm.utils.formatting import printable
from megalm.utils.parent_watch import is_alive
from megalm.utils.process_setup import code_for_launcher
from megalm.utils.stop_signals import respected_stop_signals

log = logging.getLogger(__name__)

# DeepSpeed's launcher gives each of its children 30 s between SIGTERM and SIGKILL, one after the other.
_STOP_GRACE_SECONDS = 25.0
# How often a rank checks whether another has failed, and how long it may take to notice and exit by itself.
_CLAIM_POLL_SECONDS = 2.0
_FAILURE_GRACE_SECONDS = 5.0
# A rank that has lost its connection looks for the first cause; launchers leave it 15 s (slurm/rank.sh) or more.
_FIRST_CAUSE_SECONDS = 9.0
# The grace period is at least this many times the longest gap so far: a step that was slow once may be slow again.
_GRACE_OF_LONGEST = 2.0
_WATCH_POLL_SECONDS = 0.2
# Errors that more space, other permissions or limits fix: a traceback adds nothing. The second need a file's name.
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
_FILE_TROUBLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO)
# Rank 0 reports a refusal that all ranks share; a rank still running after this time has a refusal of its own.
_REFUSAL_GRACE_SECONDS = 4.0
_CODE_LINE = "exit code "  # opens the report of a failure
_LONGEST_CODE_LINE = 32
# A second SIGINT sooner than this is the launcher forwarding the first.
_SECOND_INTERRUPT_SECONDS = 1.0


class FailureClaim:
    """Lets at most one rank of a job report why it failed; the job ends with that rank's exit code.

    Args:
        path: a file in the run folder that all ranks see; the claiming rank writes its exit code and its report there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = RunFolder(self.run_folder).log
        self.began = False  # the run folder is permanent

    @property
    def run_folder(self) -> Path:
        return self._path.parent.parent

    def take(self, report: str, code: int, details: str = "") -> bool:
        """Return True for the first rank that asks; False if rank 0 was refused and has removed the run folder.

        The report goes to the run's log too, whichever rank writes it. If the file cannot be written, for instance on a
        full disk, every rank that asks may report.

        Args:
            details: for the file only.
        """
        if is_stranger(self._path.parent, folder=True):
            return True
        try:
            self._path.parent.mkdir(exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return self.began  # a run folder that was permanent has been moved away
        except OSError:
            return True
        with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as file:
            file.write(f"{_CODE_LINE}{code}\n{report}{details and chr(10)}{details}")
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="backslashreplace") as log_file:
            log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 {printable(report).rstrip()}\n")
        return True

    def exit_code(self) -> int | None:
        """Return the exit code of the rank that reported; None if none did, or its file is cut short."""
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                code = file.readline(_LONGEST_CODE_LINE).removeprefix(_CODE_LINE)
        except OSError:
            return None
        return int(code) if code.endswith("\n") and code[:-1].isdecimal() else None

    def report(self) -> str:
        """Return the report in a line, as `failure_line`; "" if there is none."""
        return failure_line(self._path) or ""

    def is_taken(self) -> bool:
        try:
            return self._path.exists() or not (self.began or self.run_folder.is_dir())
        except OSError:  # a temporary failure of a network file system proves nothing
            return False


class CollectiveRecorder(Protocol):
    """Remembers the last collectives of this rank."""

    def dump(self) -> None:
        """Write them for all ranks to read."""

    def stalled(self) -> StalledCollective | None:
        """Return the collective in which ranks wait for others, by all ranks' dumps."""


@dataclass(frozen=True)
class RunHooks:
    """What a rank does when it fails, at the current stage of its run.

    Attributes:
        claim: set once the run folder is known.
        on_refusal: for example, remove what was created for a run that never started.
        on_failure: for example, write the end event to metrics.jsonl; called once, with the exit code and the report.
        stacks: file for this rank's stacks when it hangs or exits because another rank failed.
        recorder: of the last collectives; dumps them beside the stacks.
        began: the run folder is permanent; from then on a missing folder does not mean that rank 0 was refused.
    """

    claim: FailureClaim | None = None
    on_refusal: Callable[[], None] = lambda: None
    on_failure: Callable[[int, str], None] = lambda code, report: None
    stacks: Path | None = None
    recorder: CollectiveRecorder | None = None
    began: bool = False


class RankSupervisor:
    """Runs a rank's work and turns every outcome into an exit code, a message and a clean exit."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.place: RankPlace | None = None
        self.heartbeat: Heartbeat | None = None  # once the ranks have met
        self._hooks = RunHooks()
        self._closed = threading.Event()

    def run(self, work: Callable[[], int]) -> NoReturn:
        try:
            code = work()
        except OtherRankFailed as error:
            code = error.exit_code  # a launcher reports the exit code of the first rank it finds
        except MegalmError as error:
            code = error.exit_code
            text = f"{ERROR_OPENING}{message_of(error)}"
            if self._hooks.claim is None and self.rank > 0:
                _wait_for_rank_0(code)
                text = f"{text} (on {self._who})"
            elif self._hooks.claim is not None and self.heartbeat is not None:
                text = f"{text} (reported by {self._who})"
            self._print_failure(text, code, all_ranks=True)
            if code == EXIT_REFUSED:
                self._hooks.on_refusal()
        except KeyboardInterrupt:
            code = EXIT_FAILED
            self._print_failure(f"{ERROR_OPENING}interrupted", code)
        except Exception as error:
            code = EXIT_FAILED
            if self.heartbeat is None or not is_lost_connection(error) or not self._report_first_cause(error):
                self._print_failure(self._describe(error), code, all_ranks=True)
        if code not in (EXIT_DONE, EXIT_START_AGAIN):  # these have written their own end event
            code = self._end_failed(code)
        exit_process(code)

    def _describe(self, error: Exception) -> str:
        if isinstance(error, OSError) and (
            error.errno in _DISK_TROUBLE or (error.errno in _FILE_TROUBLE and error.filename is not None)
        ):
            where = f", run folder {self._hooks.claim.run_folder}" if self._hooks.claim is not None else ""
            return f"{ERROR_OPENING}{error} ({self._who}{where}); fix this, then resume with --resume auto"
        return f"{ERROR_OPENING}{self._who} failed:\n{traceback.format_exc()}"

    @property
    def _who(self) -> str:
        return f"rank {self.rank}" if self.place is None else str(self.place)

    def _report_first_cause(self, error: Exception) -> bool:
        """Report the rank whose loss this rank's error comes from, unless another rank does; False: none is lost."""
        assert self.heartbeat is not None
        lost = self.heartbeat.find_lost(_FIRST_CAUSE_SECONDS, self._is_reported)
        if self._is_reported():
            return True
        if not lost:
            return False
        if is_lost_connection(error, closed=True):  # a node that is gone, or a rank that is frozen, closes nothing
            lost = [replace(each, condition="gone") for each in lost]
        self._report_lost(lost, describe_consequence(self._who, error), traceback.format_exc())
        return True

    def _report_lost(self, lost: list[LostRank], consequence: str = "", details: str = "") -> None:
        """Report ranks that are lost; as long as there is no claim, the first rank that is left does."""
        gone = {each.place.rank for each in lost}
        if self._hooks.claim is None and any(rank not in gone for rank in range(self.rank)):
            time.sleep(_REFUSAL_GRACE_SECONDS)
            return
        text = f"{ERROR_OPENING}{describe_lost(lost, consequence)}"
        self._print_failure(text, EXIT_FAILED, all_ranks=True, details=details)

    def _is_reported(self) -> bool:
        return self._hooks.claim is not None and self._hooks.claim.is_taken()

    def stage(self, name: str) -> None:
        """Let the other ranks know how far this one has come with its start."""
        if self.heartbeat is not None:
            self.heartbeat.enter(name)

    def let_ranks_leave(self) -> None:
        """From here on a rank may be done before others: that it ends is no failure."""
        if self.heartbeat is not None:
            self.heartbeat.stop()

    def abort_without(self, lost: list[LostRank]) -> NoReturn:
        """End the job because it cannot continue without these ranks; report it, unless another rank did."""
        self._write_stacks()
        self._report_lost(lost)
        _leave(self._end_failed(EXIT_FAILED))

    def enter(self, hooks: RunHooks) -> None:
        """Use these hooks from now on: the run has reached its next stage.

        With a claim, the first rank to fail reports and the others exit with it. A rank may wait for the failed one
        inside a collective that never ends and cannot handle signals, so a thread ends the process a few seconds after
        another rank's claim.
        """
        before, self._hooks = self._hooks, hooks
        if hooks.claim is None:
            return
        hooks.claim.began = hooks.began
        if before.claim is None:
            threading.Thread(
                target=self._exit_with_others, args=(hooks.claim,), name="failure-watch", daemon=True
            ).start()

    def close(self) -> None:
        """No longer end this process with the others; for one that lives on after the run."""
        self._closed.set()

    def _exit_with_others(self, claim: FailureClaim) -> None:
        while not claim.is_taken():
            if self._closed.wait(_CLAIM_POLL_SECONDS):
                return
        time.sleep(_FAILURE_GRACE_SECONDS)
        self._write_stacks()
        _leave(self._end_failed(EXIT_FAILED))

    def _write_stacks(self) -> None:
        """Write where this rank stands: its threads, and the last collectives."""
        if self._hooks.stacks is not None:
            write_stacks(self._hooks.stacks)
        if self._hooks.recorder is not None:
            self._hooks.recorder.dump()

    def abort_hung_rank(self, silent_seconds: float) -> NoReturn:
        """End the job because this rank made no progress for `silent_seconds`; report it, unless another rank did."""
        self._write_stacks()
        stacks, recorder = self._hooks.stacks, self._hooks.recorder
        noticed = f"no progress for {silent_seconds:.0f} s, train.hang_timeout_seconds"
        where = f"; the stacks of all other ranks are in {stacks.parent}" if stacks is not None else ""
        lost = [] if self.heartbeat is None else self.heartbeat.find_lost(_FIRST_CAUSE_SECONDS, self._is_reported)
        stalled = recorder.stalled() if recorder is not None else None  # the others have dumped meanwhile
        cause = describe_lost(lost, noticed, stalled) if lost else self._describe_hang(noticed, stalled)
        self._print_failure(f"{ERROR_OPENING}{cause}{where}", EXIT_FAILED)
        time.sleep(_FAILURE_GRACE_SECONDS)  # time for the others to notice and write their stacks
        _leave(self._end_failed(EXIT_FAILED))

    def _describe_hang(self, noticed: str, stalled: StalledCollective | None) -> str:
        """Return who is stuck where all ranks are alive."""
        if self.heartbeat is not None:
            stuck = self.heartbeat.known(stalled.missing) if stalled is not None else self.heartbeat.behind()
            if stuck:
                return describe_stuck(stuck, noticed, stalled)
        return f"{self._who} made {noticed}, so it or a rank that it waits for hangs"

    def _print_failure(self, text: str, code: int, all_ranks: bool = False, details: str = "") -> None:
        """Print a failure unless another rank has; before a claim exists, only rank 0 prints, or all if `all_ranks`."""
        if self._hooks.claim.take(text, code, details) if self._hooks.claim else (all_ranks or self.rank == 0):
            _flush()
            with contextlib.suppress(OSError, ValueError):  # stderr is closed; the claim's file has the text
                sys.stderr.write(printable(text).rstrip("\n") + "\n")
                sys.stderr.flush()

    def _end_failed(self, code: int) -> int:
        """Close the run; return the job's exit code: of the rank that reported, or else this rank's `code`."""
        claimed = self._hooks.claim.exit_code() if self._hooks.claim is not None else None
        code = code if claimed is None else claimed
        report = self._hooks.claim.report() if self._hooks.claim is not None else ""
        hooks = self._hooks
        self._hooks = replace(hooks, on_failure=lambda code, report: None)  # once, in whichever thread
        try:
            hooks.on_failure(code, report)
        except Exception:  # the failure that is being reported matters more
            log.debug("closing the run failed", exc_info=True)
        return code


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP as a flag that the loop reads at step boundaries.

    Args:
        grace_seconds: after a signal, a rank without progress for this long (or twice its longest gap so far, if that
            is more) waits for a dead peer: it exits without a checkpoint.
        limits: gives the time of the last progress and the longest gap.
    """

    def __init__(self, grace_seconds: float = _STOP_GRACE_SECONDS, limits: TimeLimits | None = None) -> None:
        self.signal: int | None = None
        self._grace_seconds = grace_seconds
        self._limits = limits or TimeLimits()
        self._since = 0.0
        self._saving = False
        self._heard = threading.Event()

    def install(self) -> None:
        for number in respected_stop_signals():
            signal.signal(number, self._handle)

    def reached_boundary(self) -> None:
        """Stop watching for hangs: all ranks know of the signal, or the last step is done. A checkpoint may take long.

        From now on no signal forces an exit, except a second Ctrl-C.
        """
        self._heard.set()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Suspend the grace period during a checkpoint, which may take long and detects dead ranks itself."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()
        elif number == signal.SIGINT and time.monotonic() - self._since > _SECOND_INTERRUPT_SECONDS:
            _exit_without_cleanup()

    def _watch(self) -> None:
        quiet_since = self._since
        while not self._heard.wait(_WATCH_POLL_SECONDS):
            now = time.monotonic()
            quiet_since = now if self._saving else max(quiet_since, self._limits.last_beat)
            if now - quiet_since > max(self._grace_seconds, _GRACE_OF_LONGEST * self._limits.longest_silence):
                self._heard.set()
                _exit_without_cleanup()


def _wait_for_rank_0(code: int) -> None:
    """Wait for rank 0 to report a refusal that all ranks share; the launcher then ends this one, with the same code.

    If this rank exited at once, the launcher could end rank 0 before it has reported.
    """
    signal.signal(signal.SIGTERM, lambda *_: _leave(code))
    time.sleep(_REFUSAL_GRACE_SECONDS)


def exit_process(code: int) -> NoReturn:
    """Flush and end this process without interpreter shutdown."""
    logging.shutdown()
    _flush()
    _leave(code)


def _leave(code: int) -> NoReturn:
    os._exit(code_for_launcher(code))


def _flush() -> None:
    """Flush stdout and stderr; a closed terminal or pipe is not an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _exit_without_cleanup() -> NoReturn:
    os.write(2, b"megalm: error: exiting without a last checkpoint\n")
    os._exit(EXIT_FAILED)


# --- The launcher's death ---------------------------------------------------------------------------------------------
# `deepspeed` (0.19.8) does not forward SIGTERM to its processes before it dies, and no launcher survives a SIGKILL:
# ranks would train on, with nothing to stop them. So each rank watches its launchers.

_LAUNCHER_POLL_SECONDS = 1.0
_LAUNCHER_PROGRAMS = {"deepspeed", "ds", "torchrun"}
_LAUNCHER_MODULES = {
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
}
# Words of a command line to examine: the interpreter, its flags, and the program or module that it runs.
_LOOKED_AT_WORDS = 4


def watch_launchers() -> None:
    """Send this process SIGTERM (save and exit) as soon as one of its launchers has ended.

    A shell is not a launcher: a bare `python` in the background continues without it.
    """
    found = launchers(psutil.Process().parents())
    if found:
        threading.Thread(target=_watch_processes, args=(found,), name="launcher-watch", daemon=True).start()


def launchers(ancestors: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return the launchers among `ancestors` (parent first), up to the first process that is not one."""
    found = []
    for process in ancestors:
        try:
            words = process.cmdline()[:_LOOKED_AT_WORDS]
        except psutil.Error:
            break
        if not any(word in _LAUNCHER_MODULES or Path(word).name in _LAUNCHER_PROGRAMS for word in words):
            break
        found.append(process)
    return found


def _watch_processes(processes: Sequence[psutil.Process]) -> None:
    while all(map(is_alive, processes)):
        time.sleep(_LAUNCHER_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
