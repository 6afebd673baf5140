"""The control channel: who waits for whom, and how long."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalm.engine.distributed import DistributedCommunicator
from megalm.errors import ConfigError, DataError, OtherRankFailed
from tests.distributed.training import Case, make_dataset, start, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _slow_once(comm: DistributedCommunicator, device: torch.device) -> str:
    # What an hour is to a build of datasets, a second is here.
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))

    def work() -> str:
        time.sleep(3)
        return "built"

    return comm.once(work)


def _dead_rank_0(comm: DistributedCommunicator, device: torch.device) -> float:
    """Seconds until the others notice."""
    told = comm.gather(comm.rank)
    assert told == [0, 1]
    if comm.is_main:
        dist.destroy_process_group()  # closes its connections, as the kernel does for a killed process
        return 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        comm.broadcast(None)
    return time.monotonic() - began


def _codes(comm: DistributedCommunicator, device: torch.device) -> list[int]:
    """What this rank leaves with where rank 0 was refused, and where it failed."""

    def leave_with(error: Exception) -> int:
        def work() -> None:
            raise error

        with pytest.raises((type(error), OtherRankFailed)) as caught:
            comm.once(work)
        assert isinstance(caught.value, OtherRankFailed) != comm.is_main
        return getattr(caught.value, "exit_code", 1)

    return [leave_with(ConfigError("no")), leave_with(OSError("disk")), leave_with(DataError("none"))]


def test_all_ranks_leave_with_the_code_of_the_one_that_tells(tmp_path: Path) -> None:
    assert run_ranks(2, _codes) == [[2, 1, 2]] * 2


def _loaded(comm: DistributedCommunicator, device: torch.device, prefix: Path, folder: Path) -> set[str]:
    engine, run, loader = start(comm, device, Case("zero1.json"), prefix, folder)
    steps(engine, run, loader, 1, 1)
    loader.close()
    return {"deepspeed", "mlflow", "torch._inductor.compile_fx"} & set(sys.modules)


def test_a_rank_loads_nothing_that_only_the_autotuner_and_muon_need(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    assert run_ranks(1, _loaded, tmp_path / "data", tmp_path) == [{"deepspeed"}]


def test_ranks_wait_longer_than_a_collective_may_take() -> None:
    assert run_ranks(2, _slow_once) == ["built", "built"]


def test_a_rank_0_that_is_gone_is_not_waited_for() -> None:
    assert run_ranks(2, _dead_rank_0)[1] < 30
