"""Runs a function on N gloo ranks, as processes forked from one that has imported torch and deepspeed already.

A launcher costs ten seconds for two ranks; this costs a fraction of one after the first call.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

FORK_SERVER = mp.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.ranks_preload"])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank of one node; the store at `port` is the caller's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there: rank 0 starts none
        "TORCHELASTIC_RESTART_COUNT": "0",
        "DS_ACCELERATOR": "cpu",
    }


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 300
) -> list[Any]:
    """`function(comm, device, *arguments)` on each of `world_size` ranks; their results in the order of ranks.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # keeps its port, so that nobody takes it
    queue: Any = FORK_SERVER.Queue()
    processes = [
        FORK_SERVER.Process(target=_rank, args=(rank, world_size, store.port, queue, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, error, value = queue.get(timeout=timeout_seconds)
            assert not error, f"rank {rank} of {world_size} failed:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            if len(results) < world_size:
                process.kill()
            process.join(timeout=30)
    return [results[rank] for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= rank_environment(rank, world_size, port)
    error, value = "", None
    try:
        import torch

        from megalm.engine.distributed import start_distributed
        from megalm.rank_environment import rank_facts

        torch.set_num_threads(1)  # the same for every world size: sums are then in the same order
        comm = start_distributed(rank_facts(), torch.device("cpu"))
        value = function(comm, torch.device("cpu"), *arguments)
    except BaseException:
        error = traceback.format_exc()
    queue.put((rank, error, value))
    queue.close()
    queue.join_thread()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a normal exit
