"""The process in which rehearsals run: it loads the fake CUDA library before torch, and forks for each rehearsal.

The parent calls `rehearse_all`. Cases and findings travel as pickles: both sides are this code.
"""

from __future__ import annotations

import importlib
import logging
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
from megalm.rehearsal.rehearsal_report import Rehearsal, RehearsalCase, extrapolated
from megalm.utils.child_process import child_command, child_environment

log = logging.getLogger(__name__)


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
        printed = done.stderr.decode(errors="replace").strip()
        log.info("%s", printed)
        last = printed.splitlines()[-1:] or ["it printed nothing"]
        raise TrainingError(f"the rehearsal's process ended with {done.returncode}: {last[0]}")
    found: list[Rehearsal] = pickle.loads(done.stdout)
    return found


def rehearse_run(case: RehearsalCase) -> Rehearsal:
    """Rehearse a case; one of many micro-batches in a step from two rehearsals of few, at once.

    Raises: as `rehearse_all`.
    """
    micro_batches = case.run.batch.accumulation
    fewest = max(2, case.run.topology.pipeline)  # from here on each further one is like the last
    if micro_batches <= fewest + 1:
        return rehearse_all([case])[0]
    fewer, more = rehearse_all([case.with_accumulation(number) for number in (fewest, fewest + 1)], jobs=2)
    return extrapolated(fewer, more, micro_batches - fewest)


def main() -> None:
    """Run in the child: library and jobs in sys.argv, cases on stdin; findings on stdout."""
    library, jobs = Path(sys.argv[1]), int(sys.argv[2])
    cases: list[RehearsalCase] = pickle.loads(sys.stdin.buffer.read())
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the findings
    load_library(library)
    _import_first()
    found = list(_forked(cases, jobs))
    results.write(pickle.dumps(found))
    results.flush()
    os._exit(EXIT_DONE)


# What takes seconds to import, before any fork; torch._dynamo reads the rules of torch.cuda's functions, which a
# rehearsal replaces. No backward pass may run before a fork: its threads would be missing after it.
_FIRST = (
    "torch._dynamo",
    "deepspeed.compile.backend",
    "deepspeed.module_inject.auto_ep_layer",
    "megalm.rehearsal.rehearsal",
    "megalm.engine.zero_engine",
    "megalm.engine.pipeline.pipeline_engine",
)


def _import_first() -> None:
    os.environ["DS_ACCELERATOR"] = "cuda"
    for module in _FIRST:
        importlib.import_module(module)


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
