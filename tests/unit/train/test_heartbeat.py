"""Heartbeats over torch's own store in memory: which ranks are gone, stopped, silent or late, and the words for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import HashStore

from megalm.engine.interface import StalledCollective
from megalm.errors import is_lost_connection
from megalm.rank_environment import RankPlace
from megalm.train.lifecycle import heartbeat as module
from megalm.train.lifecycle.first_cause import describe_consequence, describe_lost, describe_stuck
from megalm.train.lifecycle.heartbeat import Beat, Heartbeat, LostRank, memory_kills
from tests.messages import assert_names

PLACES = [RankPlace(rank, f"n{1 + rank // 2}", f"cuda:{rank % 2}", 2**30 + rank, 1) for rank in range(4)]


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty beats a second."""
    for name in ("BEAT_SECONDS", "_SILENT_SECONDS", "_GONE_GRACE_SECONDS", "_FIRST_NOTICE_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(module, name, getattr(module, name) / 20)
    monkeypatch.setattr(module, "_LATE_SECONDS", 0.5)


class Job:
    """Rank 0 is real, the others say what a test lets them say."""

    def __init__(self, start_timeout_seconds: float | None) -> None:
        self.store = HashStore()
        self.said = {rank: Beat() for rank in (1, 2, 3)}
        self.lost: list[LostRank] = []
        self.notices: list[str] = []
        self.rank_0 = Heartbeat(self.store, PLACES, 0, start_timeout_seconds, self.lost.extend, self.notices.append)

    def beat(self, over: threading.Event) -> None:
        number = 0
        while not over.wait(module.BEAT_SECONDS):
            number += 1
            for rank, beat in list(self.said.items()):
                fields = {**vars(beat), "number": number}
                self.store.set(f"beat/{rank}", Beat(**fields).model_dump_json())


@contextmanager
def job(start_timeout_seconds: float | None = None) -> Iterator[Job]:
    started, over = Job(start_timeout_seconds), threading.Event()
    others = threading.Thread(target=started.beat, args=(over,))
    others.start()
    started.rank_0.start()
    time.sleep(0.3)
    try:
        yield started
    finally:
        started.rank_0.stop()
        over.set()
        others.join()


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_are_well() -> None:
    with job() as here:
        assert here.rank_0.find_lost(0.6) == []
    assert (here.lost, here.notices) == ([], [])


def test_a_neighbor_s_word_is_surer_than_silence() -> None:
    """Rank 3 was killed and rank 2, on its node, has seen it; rank 1 is only late."""
    with job() as here:
        here.rank_0.progress(7)
        here.said[2] = Beat(step=7, seen={3: "gone"}, memory_kills=1)
        del here.said[3], here.said[1]
        time.sleep(0.4)
        (lost,) = here.rank_0.find_lost(3.0)
        assert (lost.place.rank, lost.condition, lost.memory_kills) == (3, "gone", 1)
        assert_names(describe_lost([lost]), "rank 3 on n2", "cuda:1", "step 7", "vanished", "memory")
        until(lambda: here.lost)  # where no rank notices by itself, as under NCCL
    assert [each.place.rank for each in here.lost] == [3]


def test_a_node_that_is_gone_is_silent() -> None:
    with job() as here:
        del here.said[2], here.said[3]
        lost = here.rank_0.find_lost(3.0)
    assert [(each.place.rank, each.condition) for each in lost] == [(2, "silent"), (3, "silent")]
    assert_names(describe_lost(lost), "rank 2 on n2 (cuda:0)", "rank 3 on n2 (cuda:1)")
    assert_names(describe_lost(4 * lost), "on n2")


def test_a_silent_rank_before_the_first_step_has_a_limit() -> None:
    with job(start_timeout_seconds=2.0) as here:
        here.said[3] = Beat(stage=2, doing="opening the data")
        time.sleep(0.2)
        del here.said[3]
        until(lambda: here.lost)
    assert [each.place.rank for each in here.lost] == [3]
    assert_names(here.notices[0], "3 of 4", "rank 3 on n2", "train.start_timeout_seconds")
    assert "opening the data" in describe_lost(here.lost)


def test_a_rank_that_never_said_anything_is_silent_too() -> None:
    alone = Job(start_timeout_seconds=1.0)
    alone.rank_0.start()
    until(lambda: alone.lost)
    alone.rank_0.stop()
    assert [each.place.rank for each in alone.lost] == [1, 2, 3]


def test_in_training_a_silent_rank_is_the_watchdog_s() -> None:
    with job(start_timeout_seconds=0.5) as here:
        here.rank_0.progress(1)
        del here.said[3]
        until(lambda: here.notices)
        time.sleep(0.5)
    assert here.lost == []
    assert_names(here.notices[0], "rank 3 on n2")


def test_the_rank_that_others_wait_for_at_the_start() -> None:
    with job() as here:
        here.rank_0.enter("building the engine")
        for rank in (1, 2):
            here.said[rank] = Beat(stage=1, doing="building the engine", since_seconds=9)
        here.said[3] = Beat(stage=0, doing="opening the data", since_seconds=9)
        until(lambda: here.notices)
    assert_names(here.notices[0], "3 of 4", "rank 3 on n2")
    assert "opening the data" in here.notices[0]


def test_all_ranks_may_be_late_together() -> None:
    """As in a first step that never ends."""
    with job() as here:
        here.rank_0.enter("in the first step")
        here.said = {rank: Beat(stage=1, doing="in the first step", since_seconds=9) for rank in (1, 2, 3)}
        until(lambda: here.notices)
    assert "in the first step" in here.notices[-1]
    assert_names(here.notices[-1], 4)


def test_ranks_that_are_behind() -> None:
    with job() as here:
        here.rank_0.progress(5)
        here.said = {1: Beat(step=5), 2: Beat(step=4), 3: Beat(step=5)}
        until(lambda: [place.rank for place, _ in here.rank_0.behind()] == [2])


def test_the_words_name_what_others_wait_in() -> None:
    stalled = StalledCollective("all_reduce", "data", 15, (0, 1, 3), (2,), "broadcast")
    text = describe_stuck([(PLACES[2], Beat(step=4))], "no progress for 8 s", stalled)
    assert_names(text, "rank 2 on n2", "step 4", "all_reduce 15", "data", "broadcast", "ranks 0-1", "rank 3")
    lost = [LostRank(PLACES[2], "stopped", 9.0, Beat(step=4))]
    assert_names(describe_lost(lost, "", stalled), "rank 2 on n2", "SIGSTOP", "all_reduce 15")


LOST_CONNECTIONS = (
    "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38058. This is typically ...",
    "[/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:39115: Connection reset by peer. This",
    "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.21.5",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)


@pytest.mark.parametrize("text", LOST_CONNECTIONS)
def test_a_lost_connection_is_no_cause(text: str) -> None:
    assert is_lost_connection(RuntimeError(text), closed=True)
    folded = describe_consequence(PLACES[0], RuntimeError(text))
    assert_names(folded, "rank 0 on n1")
    assert "gloo/transport" not in folded


def test_a_timeout_says_nothing_of_the_process() -> None:
    error = RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
    assert is_lost_connection(error)
    assert not is_lost_connection(error, closed=True)


@pytest.mark.parametrize("error", [IndexError("connection closed by peer"), RuntimeError("mat1 and mat2 shapes")])
def test_other_errors_are_causes(error: Exception) -> None:
    assert not is_lost_connection(error)


def test_kills_for_memory_are_the_kernel_s_to_count(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    assert memory_kills(counters) == 0
    counters.write_text("nr_free_pages 5\noom_kill 3\nnuma_hit 7\n")
    assert memory_kills(counters) == 3
