"""The node check and the straggler watch on three ranks, each of which stands for a node."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.config.schema import RunConfig
from megalm.engine.distributed import DistributedCommunicator
from megalm.errors import ConfigError
from megalm.nodes.collective_clock import CollectiveClock
from megalm.nodes.node_check import check_nodes
from megalm.nodes.straggler_watch import SlowTimes, StragglerWatch
from megalm.rank_environment import RankFacts, RankPlace
from megalm.runs.run_folder import RunFolder
from tests.messages import assert_names
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

RANKS = 3
SLOW, STARVED = 1, 2  # a rank that computes slowly, and one that waits for its data


def _on_nodes(comm: DistributedCommunicator, device: torch.device, folders: list[Path]) -> dict[str, Any]:
    places = [RankPlace(rank, f"n{rank}", "cpu", 0, 0) for rank in range(RANKS)]
    facts = RankFacts(comm.rank, RANKS, local_rank=0, local_world_size=1, threads=1)
    refused = _refusal(comm, device, facts, places, folders[comm.rank])
    run: Any = SimpleNamespace(config=RunConfig(train={"slow_factor": 100}))  # type: ignore[arg-type]
    found = check_nodes(run, RunFolder(folders[0]), 1, facts, device, comm, places, lambda line: None)
    return {"refused": refused, "fact": found.fact, **_train(comm, device, places)}


def _refusal(
    comm: DistributedCommunicator, device: torch.device, facts: RankFacts, places: list[RankPlace], folder: Path
) -> str:
    run: Any = SimpleNamespace(config=RunConfig())
    with pytest.raises(ConfigError) as caught:
        check_nodes(run, RunFolder(folder), 1, facts, device, comm, places, lambda line: None)
    return str(caught.value)


def _train(comm: DistributedCommunicator, device: torch.device, places: list[RankPlace]) -> dict[str, Any]:
    """Steps of some sleep and collectives, in which the fast ranks wait for the slow one."""
    clock = CollectiveClock()
    clock.install()
    watch = StragglerWatch(comm, device, clock, places, [0] * RANKS, SlowTimes(factor=1.5, seconds=0.2))
    told = []
    for step in range(1, 16):
        watch.begin_step()
        start = time.perf_counter()
        time.sleep(0.1 if comm.rank == STARVED else 0.0)
        data_seconds = time.perf_counter() - start
        time.sleep(0.1 if comm.rank == SLOW else 0.02)
        work = dist.all_reduce(torch.ones(1000), async_op=True)
        assert work is not None
        work.wait()
        dist.all_reduce(torch.ones(1000))
        watch.end_step(time.perf_counter() - start, data_seconds)
        told += [straggler.fields() for straggler in watch.exchange(step)]
    return {"waited": clock.seconds, "told": told}


def test_nodes_and_ranks_are_compared(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    results = run_ranks(RANKS, _on_nodes, [shared, shared, other])

    for result in results:
        assert_names(result["refused"], "n2", other, "--exclude=n2", "train.check_nodes=false")
        assert_names(result["fact"], 3, "all-reduce")
    check = json.loads((shared / "node_check.json").read_text())
    assert [(report["rank"], report["node"]) for report in check["ranks"]] == [(0, "n0"), (1, "n1"), (2, "n2")]
    measured = ("product_flops", "copy_bytes", "link_bytes", "free_bytes")
    assert all(report[name] > 0 for report in check["ranks"] for name in measured)
    assert all(abs(report["clock_seconds"]) < 1 for report in check["ranks"]), "one machine has one clock"
    assert len({report["code"] for report in check["ranks"]}) == 1
    assert check["all_reduce_bytes"] > 0
    assert not (other / "node_check.json").exists()
    assert [path.name for path in other.iterdir()] == []

    assert results[0]["waited"] > 0.5, "in collectives, for the two that are late"
    told = {(event["rank"], event["host"], event["quantity"]) for event in results[0]["told"]}
    assert told == {(SLOW, "n1", "compute"), (STARVED, "n2", "data")}
