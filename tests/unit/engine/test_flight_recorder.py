"""Dumps of torch's flight recorder, in its format: the collective that ranks wait in, and who has not joined it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from megalm.engine.interface import StalledCollective
from megalm.engine.ranks.flight_recorder import FlightRecorder, find_stalled, read_dumps


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")  # a recorder sets it


GROUPS = {
    "0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"},
    "1": {"name": "1", "desc": "data", "ranks": "[0, 2]"},
    "2": {"name": "2", "desc": "tensor", "ranks": "[2, 3]"},
}


def entry(group: str, number: int, name: str, pending: bool = False, at: int = 0, **changes: Any) -> dict[str, Any]:
    """A record as NCCL's recorder of torch 2.13 writes it."""
    return {
        "record_id": number,
        "pg_id": int(group),
        "process_group": (group, GROUPS[group]["desc"]),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": f"nccl:{name}",
        "time_created_ns": 1_000 + at,
        "input_sizes": [[4]],
        "output_sizes": [[4]],
        "input_dtypes": ["Float"],
        "output_dtypes": ["Float"],
        "state": "scheduled" if pending else "completed",
        "retired": not pending,
        "is_p2p": False,
        "timeout_ms": 600_000,
        **changes,
    }


def dump(rank: int, *entries: dict[str, Any]) -> dict[str, Any]:
    own = {name: group for name, group in GROUPS.items() if str(rank) in group["ranks"]}
    return {"version": "2.10", "pg_config": own, "pg_status": {}, "entries": list(entries)}


def found(*of_ranks: dict[str, Any] | None) -> StalledCollective | None:
    return find_stalled({rank: each for rank, each in enumerate(of_ranks) if each is not None})


DONE = entry("0", 6, "all_reduce")
WAITS = entry("0", 7, "all_gather", pending=True)


def test_the_rank_that_has_not_joined() -> None:
    stalled = found(dump(0, DONE, WAITS), dump(1, DONE), dump(2, DONE, WAITS), dump(3, DONE, WAITS))
    assert stalled is not None
    assert (stalled.collective, stalled.group, stalled.number) == ("all_gather", "default_pg", 7)
    assert (stalled.waiting, stalled.missing) == ((0, 2, 3), (1,))


def test_a_rank_that_could_not_dump_is_missing() -> None:
    stalled = found(dump(0, DONE, WAITS), dump(1, DONE, WAITS), dump(2, DONE, WAITS), None)
    assert stalled is not None
    assert stalled.missing == (3,)


def test_the_first_that_is_not_joined_and_not_the_last_that_is_sent() -> None:
    """Rank 0 has more collectives under way than rank 2, which waits as it does."""
    later = entry("0", 8, "all_reduce", pending=True)
    stalled = found(dump(0, WAITS, later), dump(1, DONE), dump(2, WAITS), dump(3, WAITS, later))
    assert stalled is not None
    assert (stalled.number, stalled.missing) == (7, (1,))


def test_the_end_of_a_chain_is_the_cause() -> None:
    """0 waits for 2 in one group, 2 for 3 in another: 3 is the one to look at, though 0 has waited longer."""
    of_data = entry("1", 3, "reduce_scatter", pending=True, at=1)
    of_tensor = entry("2", 9, "all_reduce", pending=True, at=2)
    stalled = found(dump(0, DONE, of_data), dump(1, DONE), dump(2, DONE, of_tensor), dump(3, DONE))
    assert stalled is not None
    assert (stalled.group, stalled.waiting, stalled.missing) == ("tensor", (2,), (3,))


def test_another_collective_than_the_others() -> None:
    other = entry("0", 7, "broadcast", pending=True)
    stalled = found(dump(0, WAITS), dump(1, WAITS), dump(2, other), dump(3, WAITS))
    assert stalled is not None
    assert (stalled.collective, stalled.missing, stalled.instead) == ("all_gather", (2,), "broadcast")


def test_a_message_that_nobody_sends() -> None:
    """Ranks in a message are those of its group."""
    waits = entry("1", 0, "recv 1<-0", pending=True, is_p2p=True, p2p_seq_id=5)
    stalled = found(dump(0, DONE), dump(1, DONE), dump(2, DONE, waits), dump(3, DONE))
    assert stalled is not None
    assert (stalled.collective, stalled.number, stalled.waiting, stalled.missing) == ("recv", 5, (2,), (0,))


@pytest.mark.parametrize("pending", [False, True])
def test_what_all_have_joined_is_no_finding(pending: bool) -> None:
    assert found(*(dump(rank, entry("0", 7, "all_gather", pending=pending)) for rank in range(4))) is None


def test_files_are_read_by_torch_s_loader_and_a_torn_one_is_none(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"nccl_rank_{rank}").write_bytes(pickle.dumps(dump(rank, DONE, WAITS), protocol=2))
    assert sorted(read_dumps(tmp_path, "nccl_rank_")) == [0, 1]
    assert read_dumps(tmp_path, "nccl_rank_")[1]["entries"][-1]["profiling_name"] == "nccl:all_gather"
    recorder = FlightRecorder(tmp_path, 3)
    stalled = recorder.stalled()
    assert stalled is not None
    assert stalled.missing == (2, 3)
    (tmp_path / "nccl_rank_1").write_bytes(b"half")
    assert recorder.stalled() is None


def test_dumps_of_an_earlier_attempt_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "gloo_rank_2").write_bytes(b"old")
    (tmp_path / "gloo_rank_0").write_bytes(b"old")
    FlightRecorder(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["gloo_rank_0"]
