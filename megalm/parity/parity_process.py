"""The process in which miniatures train: it imports torch and deepspeed once, and forks the ranks of each layout.

The parent calls `run_parity`. The case goes in and the report comes out as pickles: both sides are this code. When a
process ends, however that comes, the kernel ends those that it started: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megalm.errors import EXIT_DONE, MegalmError, TrainingError
from megalm.parity.miniature import ParityCase
from megalm.parity.parity_report import ParityReport
from megalm.planning.engine_checks import ALLOW_CPU_FP16
from megalm.utils.child_process import child_command, child_environment
from megalm.utils.process_setup import end_with_parent
from megalm.utils.stop_signals import handled_stop_signals

PARTS = 10  # imports, and what three launches report
_PATIENCE_SECONDS = 600.0  # for the next part: beyond it ranks wait for each other


def run_parity(case: ParityCase, advance: Callable[[], None]) -> ParityReport:
    """Train the miniature and one rank, and compare.

    Args:
        advance: called `PARTS` times.

    Raises:
        TrainingError: the process ended without findings.
        ConfigError: an extension that the run needs cannot be compiled here.
        SystemExit: at a stop signal, when all processes have ended.
    """
    folder = Path(tempfile.mkdtemp(prefix="megalm-parity-"))
    with handled_stop_signals(_leave):
        try:
            return _run(case, advance, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _run(case: ParityCase, advance: Callable[[], None], folder: Path) -> ParityReport:
    command = child_command("megalm.parity.parity_process", [str(folder), str(os.getpid())])
    errors = folder / "stderr"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=child_environment() | _ENVIRONMENT,
            start_new_session=True,  # a terminal's Ctrl-C is this process's to answer
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # its end tells why
                stdin.write(pickle.dumps(case))
            for _ in process.stdout:
                advance()
            process.wait()
        finally:
            _kill(process)
    if process.returncode != EXIT_DONE:
        printed = errors.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        raise TrainingError(f"the process that compares ended with {process.returncode}: {printed[0]}")
    report: ParityReport | MegalmError = pickle.loads((folder / "report").read_bytes())
    if isinstance(report, MegalmError):
        raise report
    return report


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and all that it started; a compiler has a process group of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(process.pid)
        others = child.children(recursive=True)
        for each in (child, *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(others, timeout=10)  # they write to a folder that is removed next
    process.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


# One thread: sums are then in the same order in every layout. Ranks meet on this machine, whatever its name means.
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOO_LOG_LEVEL": "ERROR",
    ALLOW_CPU_FP16: "1",
}


class _RankFailed(Exception):
    """A rank of a launch ended with an error, or all wait; the message is for the report."""


def main() -> None:
    """Run in the child: a folder and the parent's number in sys.argv, the case on stdin; a line on stdout a part."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    case: ParityCase = pickle.loads(sys.stdin.buffer.read())
    progress = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no progress

    def advance() -> None:
        progress.write(b".\n")

    report: ParityReport | MegalmError
    try:
        _import_first(case)
        advance()
        report = _compare(case, folder, advance)
    except _RankFailed as error:
        report = ParityReport(failure=str(error))
    except MegalmError as error:
        report = error
    (folder / "report").write_bytes(pickle.dumps(report))
    os._exit(EXIT_DONE)


def _import_first(case: ParityCase) -> None:
    """Import and compile what takes long, before any fork.

    No backward pass may run before one: its threads would be missing.
    """
    from megalm.engine.deepspeed_patches import decompose_tanh, limit_openmp_spin

    decompose_tanh()
    limit_openmp_spin()
    import torch
    import torch._dynamo

    import megalm.engine.pipeline.pipeline_engine
    import megalm.engine.zero_engine
    import megalm.parity.miniature_training  # noqa: F401
    from megalm.engine.deepspeed_patches import import_muon_uncompiled

    import_muon_uncompiled()
    torch.set_num_threads(1)
    offload = case.run.deepspeed_source.settings.zero_optimization.offload_optimizer
    if offload is not None and offload.device != "none":
        from megalm.engine.cpp_extensions import load_cpu_adam

        load_cpu_adam()


def _compare(case: ParityCase, folder: Path, advance: Callable[[], None]) -> ParityReport:
    from megalm.parity.miniature_training import SAVED, load_and_train, train_and_resume
    from megalm.parity.parity_report import allowed, compare

    one, many = folder / "one-rank", folder / "miniature"
    name = f"step-{SAVED:08d}"
    launch = partial(_launch, folder=folder, advance=advance)
    (alone,) = launch(
        1, lambda comm, device, say: train_and_resume(comm, device, case.reference, case.shape, one, say=say)
    )
    ranks = launch(
        case.run.topology.world_size,
        lambda comm, device, say: train_and_resume(comm, device, case.run, case.shape, many, one / name, say),
    )
    (on_one,) = launch(
        1, lambda comm, device, say: load_and_train(comm, device, case.reference, case.shape, many / name)
    )
    advance()
    report = compare(alone, ranks, on_one, allowed(case.run.precision, case.run.config.train.optimizer_state))
    advance()
    return report


def _launch(size: int, work: Callable[[Any, Any, Callable[[], None]], Any], folder: Path, advance: Any) -> list[Any]:
    """Return `work(comm, device, say)` of each of `size` forked ranks, in their order; `say` of rank 0 is `advance`."""
    context = get_context("fork")
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    processes, receivers = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, store, work, sender, os.getpid()))
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return _results(size, receivers, advance)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(size: int, receivers: list[Connection], advance: Callable[[], None]) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(results) < size:
        ready = wait([receivers[rank] for rank in range(size) if rank not in results], deadline - time.monotonic())
        if not ready:
            raise _RankFailed(f"{size} ranks wait for each other: no progress in {_PATIENCE_SECONDS:.0f} s")
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                kind, value = pickle.loads(receivers[rank].recv_bytes())
            except EOFError:
                raise _RankFailed(f"rank {rank} of {size} was killed: too little memory?") from None
            if kind == "failed":
                raise _RankFailed(f"rank {rank} of {size} ends with an error: {value}")
            deadline = time.monotonic() + _PATIENCE_SECONDS
            if kind == "part":
                advance()
            else:
                results[rank] = value
    return [results[rank] for rank in range(size)]


def _rank(
    rank: int,
    size: int,
    store: Path,
    work: Callable[[Any, Any, Callable[[], None]], Any],
    sender: Connection,
    parent: int,
) -> None:
    end_with_parent(parent)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # nobody listens there: ranks meet by a file
    }

    def send(kind: str, value: object = None) -> None:
        sender.send_bytes(pickle.dumps((kind, value)))

    try:
        import torch
        from torch._C._distributed_c10d import FileStore

        from megalm.engine.distributed import start_distributed
        from megalm.rank_environment import rank_facts

        device = torch.device("cpu")
        comm = start_distributed(rank_facts(), device, store=FileStore(str(store), size))
        send("done", work(comm, device, partial(send, "part") if rank == 0 else lambda: None))
    except BaseException as error:
        traceback.print_exc()
        send("failed", "".join(traceback.format_exception_only(error)).strip().splitlines()[-1])
        time.sleep(1.0)  # the others would report a lost connection
    os._exit(EXIT_DONE)  # gloo's threads may abort a normal exit
