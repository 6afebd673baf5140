"""The mirror: a process that reads metrics.jsonl and feeds trackers, so that none ever delays a training step.

The training process calls `start_mirror` and `MirrorHandle.finish`; `megalm track sync` calls `sync_trackers`. Both
drive one `Feed` (sink.py) for each tracker. This module imports nothing heavy: only the mirror process loads MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megalm.errors import EXIT_FAILED, ConfigError, MegalmError
from megalm.runs.metrics_log import METRICS_FILE
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.mlflow_sink import MlflowSink
from megalm.tracking.mlflow_mirror.sink import Feed, Sink
from megalm.tracking.mlflow_mirror.system_metrics import FOLDER, NodeSampler
from megalm.utils.addresses import hide_credentials
from megalm.utils.file_lock import HeldLock, take_lock
from megalm.utils.formatting import printable
from megalm.utils.parent_watch import ParentWatch, start_beside, stdin_is_closed
from megalm.utils.process_setup import require_extra
from megalm.utils.stop_signals import STOP_SIGNALS

_MODULE = "megalm.tracking.mlflow_mirror.mirror_process"
LOG_FILE = "mlflow.log"
LOCK_FILE = "mlflow.lock"

_POLL_SECONDS = 2.0
_LONGEST_BACK_OFF_SECONDS = 30.0
# How long the mirror keeps trying after its training process has ended.
_DEADLINE_SECONDS = 60.0
# Slurm sends a job's signals to all its processes; the mirror ignores them, since it must still report the run's end.
_SIGNALS_OF_THE_JOB = (*STOP_SIGNALS, signal.SIGUSR2)

logger = logging.getLogger(__name__)


@dataclass
class MirrorHandle:
    """The training process's handle of its mirror."""

    process: subprocess.Popen[bytes]

    def finish(self, timeout_seconds: float) -> bool:
        """Wait until the mirror has sent everything; call after the `end` event is written.

        Returns False if it failed or did not finish in time (it then continues alone for a bounded time);
        RUN_DIR/mlflow.log says why, and `megalm track sync RUN_DIR` sends the rest later. Never raises.
        """
        if self.process.stdin is not None:
            self.process.stdin.close()  # signals that no more files follow
        try:
            return self.process.wait(timeout=max(0.0, timeout_seconds)) == 0
        except subprocess.TimeoutExpired:
            return False


def start_mirror(
    run_dir: str | os.PathLike[str], node: int = 0, system_metrics: bool = False, feeds_trackers: bool = True
) -> MirrorHandle:
    """Start the mirror of a run folder, which runs as long as this process; returns at once.

    Of a job on several nodes one process feeds the trackers; those of the other nodes only sample system metrics.

    The mirror has its own session, so that a terminal's Ctrl-C and a launcher's group signals do not reach it: it must
    outlive the trainer by a few seconds to send the last rows.
    """
    run_dir = Path(run_dir).resolve()
    words = [str(run_dir), "--parent-pid", str(os.getpid()), "--since", str(time.time())]
    words += ["--follow"] if feeds_trackers else []
    words += ["--sample-node", str(node)] if system_metrics else []
    log_file = run_dir / LOG_FILE if feeds_trackers else run_dir / FOLDER / f"node-{node}.log"
    log_file.parent.mkdir(exist_ok=True)
    return MirrorHandle(start_beside(_MODULE, words, log_file))


def sync_trackers(
    run_dir: str | os.PathLike[str], trackers: Sequence[str] = (), deadline_seconds: float = 30.0
) -> list[Sink]:
    """Send the rows and files of a run folder that trackers do not have yet, each row once.

    Args:
        trackers: none: those of the run's settings, and MLflow where it has none.

    Raises:
        ConfigError: the folder is not of a run that has trained, or its own mirror is running.
        MegalmError: a tracker could not be reached within the deadline.
    """
    run_dir = Path(run_dir)
    if run_dir.is_dir() and not (run_dir / METRICS_FILE).is_file():  # any other folder would become an MLflow run
        raise ConfigError(f"{run_dir}: has no {METRICS_FILE}, so no run has trained there; name a run under run.root")
    with _only_mirror(run_dir, wait_seconds=0.0):
        names = tuple(trackers) or run_facts.trackers(run_dir) or ("mlflow",)
        sinks = [open_sink(name, run_dir) for name in names]
        _deliver_rest([Feed(sink, run_dir) for sink in sinks], time.monotonic() + deadline_seconds)
    return sinks


def follow(run_dir: Path, parent: ParentWatch, since: float = 0.0, sampler: NodeSampler | None = None) -> None:
    """Send until the run's end event (at unix time `since` or later) or until the parent ends.

    Args:
        sampler: of this node, if it is to be sampled.

    Raises:
        MegalmError: something was not sent within the deadline after the parent's end.
    """
    with _only_mirror(run_dir, wait_seconds=_DEADLINE_SECONDS):
        sinks = [open_sink(name, run_dir) for name in run_facts.trackers(run_dir)]
        feeds = [_RetriedFeed(Feed(sink, run_dir, since)) for sink in sinks]
        while not parent.ended.is_set() and not all(one.feed.run_has_ended for one in feeds):
            for one in feeds:
                one.deliver_if_due()
            parent.ended.wait(_sample(sampler, min(one.due for one in feeds)))
        if sampler is not None:
            sampler.close()
        _wait_for_last_files(parent)
        _deliver_rest([one.feed for one in feeds], time.monotonic() + _DEADLINE_SECONDS, parent.ended.is_set())


def sample_node(parent: ParentWatch, sampler: NodeSampler) -> None:
    """Sample this node until the training process closes this process's stdin, or ends."""
    while not parent.ended.is_set() and not stdin_is_closed(_sample(sampler, time.monotonic() + _POLL_SECONDS)):
        pass
    sampler.close()


def _sample(sampler: NodeSampler | None, until: float) -> float:
    """Sample if it is time to; return the seconds to wait for that, or until a monotonic time if it comes first."""
    if sampler is not None:
        sampler.sample_if_due()
        until = min(until, sampler.due)
    return max(0.0, until - time.monotonic())


def open_sink(tracker: str, run_dir: Path) -> Sink:
    """Return a tracker of `TRACKERS` for a run folder.

    Raises:
        ConfigError: its package is missing, or its notes in the folder are damaged.
    """
    if tracker == "tensorboard":
        require_extra(tracker)
        from megalm.tracking.sinks.tensorboard_sink import TensorBoardSink

        return TensorBoardSink(run_dir)
    if tracker == "wandb":
        require_extra(tracker)
        from megalm.tracking.sinks.wandb_sink import WandbSink

        return WandbSink(run_dir)
    return MlflowSink(run_dir)


def _deliver_rest(feeds: Sequence[Feed], deadline: float, parent_ended: bool = False) -> None:
    """Send everything to each tracker, and close it.

    Raises:
        MegalmError: a tracker did not accept it within the deadline; the others have theirs.
    """
    errors: list[MegalmError] = []
    for feed in feeds:
        try:
            _deliver_until(feed, deadline, parent_ended)
        except MegalmError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise MegalmError("; ".join(map(str, errors)))


@dataclass
class _RetriedFeed:
    """A feed that is tried again after ever longer pauses.

    Attributes:
        due: when it is tried next, as `time.monotonic`.
    """

    feed: Feed
    failures: int = 0
    due: float = 0.0

    def deliver_if_due(self) -> None:
        if self.feed.run_has_ended or time.monotonic() < self.due:
            return
        try:
            self.feed.deliver()
            self.failures = 0
        except Exception as error:  # also a file that is only partly written
            self.failures += 1
            logger.warning("%s: sending failed, trying again: %s", self.feed.sink.name, _one_line(error))
        self.due = time.monotonic() + _back_off(self.failures)


def _parent_watch(pid: int) -> ParentWatch:
    def report() -> None:
        logger.error("MLflow does not answer: the mirror stops; send the rest with `megalm track sync`")

    return ParentWatch(pid, _DEADLINE_SECONDS + 30.0, report)


def _wait_for_last_files(parent: ParentWatch) -> None:
    """Wait until the trainer closes this process's stdin: it has then written everything, including report.html."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not parent.ended.is_set() and time.monotonic() < deadline and not stdin_is_closed(0.2):
        pass


def _deliver_until(feed: Feed, deadline: float, parent_ended: bool = False) -> None:
    failures = 0
    while True:
        try:
            feed.deliver(parent_ended=parent_ended)
            feed.sink.close()
            return
        except MegalmError:
            raise
        except Exception as error:
            failures += 1
            delay = min(_back_off(failures), 5.0)
            if time.monotonic() + delay > deadline:
                raise MegalmError(
                    f"{feed.run_dir}: {feed.sink.name} did not accept the run ({_one_line(error)}); "
                    f"{feed.sink.remedy(feed.run_dir)}"
                ) from error
            time.sleep(delay)


def _back_off(failures: int) -> float:
    return min(_POLL_SECONDS * 2.0**failures, _LONGEST_BACK_OFF_SECONDS)


def _only_mirror(run_dir: Path, wait_seconds: float) -> HeldLock:
    """Allow one mirror per run folder: two would send the same rows and overwrite each other's state."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run folder; name one under run.root")
    try:
        return take_lock(run_dir / LOCK_FILE, wait_seconds)
    except BlockingIOError:
        raise ConfigError(
            f"{run_dir}: its mirror is running and sends everything when training ends; wait for it"
        ) from None


def _one_line(error: BaseException) -> str:
    return run_facts.shorten(_hidden(" ".join(str(error).split())) or type(error).__name__, 300)


def _hidden(text: str) -> str:
    """Return a text without the credentials in the tracking address."""
    return hide_credentials(text, os.environ.get(run_facts.URI_VARIABLE))


class _HidingStream(io.TextIOBase):
    """Passes text on without credentials: libraries quote addresses in their warnings and tracebacks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(_hidden(text)))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def main(arguments: list[str] | None = None) -> int:
    """What `start_mirror` starts, see utils/child_process.py; exit code 0: all is sent."""
    parser = argparse.ArgumentParser(prog=_MODULE, description="Feed the trackers of a run folder.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", action="store_true", help="send until the process --parent-pid ends")
    parser.add_argument("--sample-node", type=int, help="sample this node's system metrics under this number")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--since", type=float, default=0.0, help="unix time at which this attempt began")
    options = parser.parse_args(arguments)
    os.nice(19)
    stream = _HidingStream(sys.stderr)
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    for number in _SIGNALS_OF_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    try:
        parent, node = _parent_watch(options.parent_pid), options.sample_node
        sampler = None if node is None else NodeSampler(options.run_dir, node)
        if options.follow:
            follow(options.run_dir, parent, options.since, sampler)
            logger.info("everything is sent")
        elif sampler is not None:
            sample_node(parent, sampler)
    except MegalmError as error:
        logger.error("%s", error)
        return error.exit_code
    except Exception:  # written here, where the stream hides credentials
        logger.exception("the mirror failed; run `megalm track sync %s`", options.run_dir)
        return EXIT_FAILED
    return 0
