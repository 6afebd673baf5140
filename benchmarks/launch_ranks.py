"""Starts this program again as the ranks of a job on one machine."""

from __future__ import annotations

import os
import subprocess
import sys

import torch.distributed as dist


def launch_ranks(count: int, words: list[str], name: str) -> str:
    """Run this program with more `words` on each rank; return what the first one prints. If a rank fails, exit."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    processes = []
    for rank in range(count):
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        # The store is here already, under a port that is held: the first rank is not to start one.
        meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
        environment = os.environ | {key: str(value) for key, value in (here | meet).items()}
        command = [sys.executable, *sys.orig_argv[1:], *words]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:  # else the profiler's own lines are all there is
            sys.exit(f"{name}: a rank failed\n{errors}")
    return outputs[0][0]
