"""The process in which rehearsals run: it loads the fake CUDA library before torch, and forks for each rehearsal.

The parent calls `rehearse_all`. Cases and findings travel as pickles: both sides are this code.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from megalm.errors import EXIT_DONE, TrainingError
from megalm.rehearsal.fake_cuda_library import build_library, load_library
from megalm.rehearsal.rehearsal_report import Rehearsal, RehearsalCase
from megalm.utils.child_process import child_command, child_environment

_SHOWN_LINES = 60


def rehearse_all(cases: Sequence[RehearsalCase], jobs: int = 1) -> list[Rehearsal]:
    """Rehearse each case, `jobs` at a time, in processes of their own.

    Raises:
        ConfigError: the fake CUDA library cannot be compiled here.
        TrainingError: the process ended without findings.
    """
    command = child_command("megalm.rehearsal.rehearsal_process", [str(build_library()), str(jobs)])
    # Compiled blocks run uncompiled: their kernels would be compiled for the GPU.
    environment = {**child_environment(), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=pickle.dumps(list(cases)), capture_output=True, env=environment, check=False)
    if done.returncode != EXIT_DONE:
        lines = done.stderr.decode(errors="replace").splitlines()[-_SHOWN_LINES:]
        raise TrainingError(f"the rehearsal's process ended with {done.returncode}: {' | '.join(lines)}")
    found: list[Rehearsal] = pickle.loads(done.stdout)
    return found


def main() -> None:
    """Run in the child: library and jobs in sys.argv, cases on stdin; findings on stdout."""
    library, jobs = Path(sys.argv[1]), int(sys.argv[2])
    cases: list[RehearsalCase] = pickle.loads(sys.stdin.buffer.read())
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the findings
    load_library(library)
    _import_once()
    found = list(_forked(cases, jobs))
    results.write(pickle.dumps(found))
    results.flush()
    os._exit(EXIT_DONE)


def _import_once() -> None:
    """Import what takes seconds before any fork. No backward pass may run here: its threads would not be forked."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    import deepspeed  # noqa: F401
    import torch._dynamo  # reads the rules of torch.cuda's functions, each by its identity

    import megalm.rehearsal.rehearsal


def _forked(cases: Sequence[RehearsalCase], jobs: int) -> Iterator[Rehearsal]:
    """Run each case in a fork of this process; yield in order."""
    context = get_context("fork")
    running: list[tuple[object, Connection]] = []
    waiting = list(cases)
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rehearse, args=(waiting.pop(0), sender))
            process.start()
            sender.close()
            running.append((process, receiver))
        _, receiver = running.pop(0)
        yield pickle.loads(receiver.recv_bytes())


def _rehearse(case: RehearsalCase, sender: Connection) -> None:
    from megalm.rehearsal.rehearsal import rehearse

    sender.send_bytes(pickle.dumps(rehearse(case)))
    os._exit(EXIT_DONE)  # threads of autograd would abort a normal end
