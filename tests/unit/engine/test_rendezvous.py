"""The roll call at the start of a job, over a real store: who is missing is named, and a restart meets afresh."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from torch.distributed import TCPStore

from megalm.engine.ranks import rendezvous
from megalm.engine.ranks.rendezvous import Meeting, count_restarts, meet
from megalm.errors import OtherRankFailed, TrainingError
from megalm.rank_environment import RankFacts, RankPlace
from tests.messages import assert_names

# Four ranks on two nodes, as Slurm tells it.
LAYOUT = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
}


@pytest.fixture(autouse=True)
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of torchrun's agent: all ranks are its clients."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**LAYOUT, **variables}.items():
        monkeypatch.setenv(name, value)
    return store


def starts(
    *ranks: int,
    limit_seconds: float | None = 30.0,
    notices: list[str] | None = None,
    before_last: Callable[[], None] = lambda: None,
) -> dict[int, object]:
    """What comes of the start of these ranks of four: a meeting or an error each.

    `before_last` runs before the last of them starts.
    """
    results: dict[int, object] = {}

    def start(rank: int) -> None:
        place = RankPlace(rank, f"n{1 + rank // 2}", "cpu", 100 + rank, 1)
        try:
            told = (lambda text: None) if notices is None else notices.append
            results[rank] = meet(RankFacts(rank, 4, rank % 2, 2, 1), place, limit_seconds, told)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=start, args=(rank,)) for rank in ranks]
    for thread in threads:
        if thread is threads[-1]:
            before_last()
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def meeting(result: object) -> Meeting:
    assert isinstance(result, Meeting), result
    return result


def test_all_ranks_know_where_each_is(agent: TCPStore) -> None:
    results = starts(2, 0, 3, 1)
    hosts = {tuple((place.rank, place.host) for place in meeting(each).places) for each in results.values()}
    assert hosts == {((0, "n1"), (1, "n1"), (2, "n2"), (3, "n2"))}
    meeting(results[1]).store.set("key", "value")
    assert meeting(results[2]).second_store().get("key") == b"value"


def test_a_restart_shares_nothing_with_what_was_killed(agent: TCPStore) -> None:
    """torchrun's agents count restarts differently, and keep one store."""
    first, second = starts(0, 1, 2, 3), starts(3, 2, 1, 0)
    meeting(first[0]).store.set("key", "old")
    assert not meeting(second[1]).store.check(["key"])


def test_every_start_counts_whichever_agent_began_it(agent: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent of a node whose ranks were well counts no restart."""
    counted = []
    for told in ("0", "0", "0", "7"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", told)
        count_restarts(RankFacts(2, 4, 0, 2, 1))
        counted.append(os.environ["TORCHELASTIC_RESTART_COUNT"])
    assert counted == ["0", "1", "2", "7"]


def test_missing_ranks_are_named_again_and_again_and_end_the_job(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine without name servers waits five seconds for a name whenever a rank connects: rank 0 starts when the
    # others have, and the others wait for it longer than that.
    def others_have_arrived() -> None:
        while not agent.check(["arrivals"]) or agent.get("arrivals").count(b"\n") < 2:
            time.sleep(0.01)

    for name, seconds in (("FIRST_NOTICE", 0.1), ("LONGEST_PAUSE", 0.1), ("LAST_WORD", 1.0), ("SPEAKER_LEAD", 30.0)):
        monkeypatch.setattr(rendezvous, f"_{name}_SECONDS", seconds)
    notices: list[str] = []
    results = starts(1, 2, 0, limit_seconds=8.0, notices=notices, before_last=others_have_arrived)
    assert isinstance(results[0], TrainingError)
    assert_names(results[0], "3 of 4", "rank 3 on n2", "train.start_timeout_seconds", "--exclude=n2")
    assert len(notices) >= 2
    assert_names(notices[-1], "3 of 4", "rank 3 on n2", "train.start_timeout_seconds")
    assert isinstance(results[1], OtherRankFailed)
    assert isinstance(results[2], OtherRankFailed), "one rank speaks"


def test_a_missing_rank_0_is_named_by_rank_1(agent: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "9")  # nobody listens there
    monkeypatch.setattr(rendezvous, "_FIRST_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "_SPEAKER_LEAD_SECONDS", 0.5)
    notices: list[str] = []
    results = starts(1, 2, limit_seconds=0.5, notices=notices)
    assert all(isinstance(each, TrainingError) for each in results.values())
    assert_names(results[1], "rank 0 on n1", "rank 1 on n1", "127.0.0.1:9", "train.start_timeout_seconds")
    assert notices
    assert all("rank 1 on n1" in notice for notice in notices), "not one line a rank"
