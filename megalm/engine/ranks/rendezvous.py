"""How the ranks of a job find each other: a store that all of them see, and a roll call that says who is missing."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from megalm.errors import ConfigError, OtherRankFailed, TrainingError
from megalm.rank_environment import RankFacts, RankPlace, describe_ranks, exclude_advice, host_of_rank

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_FIRST_NOTICE_SECONDS = 15.0
_LONGEST_PAUSE_SECONDS = 60.0  # between two notices
# Between two looks: a twentieth of the time waited so far, within these seconds.
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.01, 0.5
# Rank 1 speaks first about a rank 0 that is not there; a launcher then ends the others.
_SPEAKER_LEAD_SECONDS = 5.0
# For the other ranks to read that the job has failed, before rank 0 ends with the store.
_LAST_WORD_SECONDS = 2.0


@dataclass(frozen=True)
class Meeting:
    """All ranks of a job have met.

    Attributes:
        store: of this start alone: what earlier workers of the same torchrun agent left behind is not in it.
        places: of all ranks, in their order.
    """

    store: Store
    places: tuple[RankPlace, ...]

    def second_store(self) -> Store:
        """Return the store by another connection, for a thread: one that waits occupies its own."""
        return self.store.clone()  # type: ignore[attr-defined]  # not in torch's stubs


class _Patience:
    """Time that is waited: when it is over, and when to say so."""

    def __init__(self, limit_seconds: float | None, notice: Callable[[str], None]) -> None:
        self._began = time.monotonic()
        self._limit, self.tell = limit_seconds, notice
        self._next_notice = _FIRST_NOTICE_SECONDS
        self.has_spoken = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def is_over(self, extra_seconds: float = 0.0) -> bool:
        return self._limit is not None and self.seconds > self._limit + extra_seconds

    def pause(self) -> None:
        time.sleep(min(max(self.seconds / 20, _SHORTEST_POLL_SECONDS), _LONGEST_POLL_SECONDS))

    def say(self, text: str) -> None:
        """Give notice, unless the last one was a short while ago."""
        if self.seconds < self._next_notice:
            return
        self._next_notice = self.seconds + min(self.seconds, _LONGEST_PAUSE_SECONDS)
        self.has_spoken = True
        until = (
            "" if self._limit is None else f"; the job fails after {self._limit:.0f} s (train.start_timeout_seconds)"
        )
        self.tell(f"{text}; waiting for {self.seconds:.0f} s{until}")


def meet(
    ranks: RankFacts,
    place: RankPlace,
    limit_seconds: float | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Meeting:
    """Return once all ranks of the job are there; the store is served by rank 0 or by torchrun's agent.

    Args:
        limit_seconds: `train.start_timeout_seconds`; None: wait for ever.
        notice: gets a line about ranks that are late, on rank 0, or on rank 1 where that is rank 0.

    Raises:
        TrainingError: a rank was not there in time.
        OtherRankFailed: rank 0 has reported that.
        ConfigError: rank 0 cannot serve the store at this address.
    """
    patience = _Patience(limit_seconds, notice)
    store = _connect(ranks, place, patience)
    token = uuid.uuid4().hex
    _append(store, "arrivals", token)
    try:
        if ranks.rank == 0:
            return _call_the_roll(ranks, place, store, token, patience)
        return _answer(ranks, place, store, token, patience)
    except dist.DistNetworkError as error:
        raise TrainingError(f"{place} lost its connection to rank 0 while the job started: {error}") from error


def count_restarts(ranks: RankFacts) -> None:
    """Let TORCHELASTIC_RESTART_COUNT count all starts of this rank, if torchrun's agent keeps a store for all of them.

    The agent counts only those after a failure on its own node, so that the nodes' counts differ.
    """
    if not _is_agents():
        return
    store = _connect(ranks, RankPlace.of_this_process(ranks.rank, ""), _Patience(None, lambda text: None))
    starts = store.add(f"starts/{ranks.rank}", 1)
    counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(max(int(counted) if counted.isdecimal() else 0, starts - 1))


def _is_agents() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _connect(ranks: RankFacts, place: RankPlace, patience: _Patience) -> Store:
    address, port = _address()
    serves = ranks.rank == 0 and not _is_agents()
    if not serves:
        _wait_for_server(ranks, place, patience)
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            ranks.world_size,
            is_master=serves,
            timeout=timedelta(minutes=60),
            wait_for_workers=False,
            multi_tenant=not _is_agents(),
        )
    except dist.DistNetworkError as error:
        raise unreachable(ranks.rank, error) from error


def unreachable(rank: int, error: Exception) -> ConfigError:
    """Return the error of a rank that cannot listen at, or connect to, the job's address."""
    return ConfigError(
        f"rank {rank} cannot reach the other ranks: {error}; check MASTER_ADDR and MASTER_PORT; if another "
        "job of this machine uses the port, choose another one with --master_port=29501"
    )


def _wait_for_server(ranks: RankFacts, place: RankPlace, patience: _Patience) -> None:
    """Wait until somebody listens at the job's address. torch's own client fills the log with stacks meanwhile."""
    address, port = _address()
    missing = f"rank 0 on {host_of_rank(0, ranks) or address} is not here: {place} finds nobody at {address}:{port}"
    while True:
        try:
            socket.create_connection((address, port), timeout=10.0).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        if patience.is_over(0.0 if ranks.rank == 1 else _SPEAKER_LEAD_SECONDS):
            raise TrainingError(f"{missing} ({why}) within {patience.seconds:.0f} s (train.start_timeout_seconds)")
        if ranks.rank == 1:
            patience.say(f"{missing} ({why})")
        patience.pause()


def _call_the_roll(ranks: RankFacts, place: RankPlace, store: Store, token: str, patience: _Patience) -> Meeting:
    """Welcome each rank of this start, and wait until all have answered.

    Tokens of workers that were killed before a restart are still in the agent's store. They are welcomed too, and never
    answer.
    """
    own = dist.PrefixStore(token, store)  # type: ignore[attr-defined]
    _append(own, "here", _as_line(place))
    welcomed: set[str] = set()
    while True:
        for other in _lines(store, "arrivals"):
            if other not in welcomed:
                welcomed.add(other)
                store.set(f"welcome/{other}", token)
        places = {each.rank: each for each in map(_from_line, _lines(own, "here"))}
        missing = [rank for rank in range(ranks.world_size) if rank not in places]
        if not missing:
            break
        hosts = [(rank, host_of_rank(rank, ranks)) for rank in missing]
        if patience.is_over():
            own.set("places", "")
            time.sleep(_LAST_WORD_SECONDS)
            raise TrainingError(
                f"{len(places)} of {ranks.world_size} ranks have started within {patience.seconds:.0f} s "
                f"(train.start_timeout_seconds); missing: {describe_ranks(hosts)}; look at what they and "
                f"their launchers say{exclude_advice(host for _, host in hosts)}"
            )
        patience.say(f"{len(places)} of {ranks.world_size} ranks are here; missing: {describe_ranks(hosts)}")
        patience.pause()
    if patience.has_spoken:
        patience.tell(f"all {ranks.world_size} ranks are here after {patience.seconds:.0f} s")
    in_order = tuple(places[rank] for rank in range(ranks.world_size))
    own.set("places", "\n".join(map(_as_line, in_order)))
    return Meeting(own, in_order)


def _answer(ranks: RankFacts, place: RankPlace, store: Store, token: str, patience: _Patience) -> Meeting:
    def wait_for(in_store: Store, key: str) -> str:
        while not in_store.check([key]):
            if patience.is_over(_SPEAKER_LEAD_SECONDS + _LAST_WORD_SECONDS):
                raise TrainingError(
                    f"rank 0 on {host_of_rank(0, ranks) or _address()[0]} has not answered {place} within "
                    f"{patience.seconds:.0f} s (train.start_timeout_seconds)"
                )
            patience.pause()
        return in_store.get(key).decode()

    own = dist.PrefixStore(wait_for(store, f"welcome/{token}"), store)  # type: ignore[attr-defined]
    _append(own, "here", _as_line(place))
    text = wait_for(own, "places")
    if not text:
        raise OtherRankFailed
    return Meeting(own, tuple(map(_from_line, text.splitlines())))


def _append(store: Store, key: str, line: str) -> None:
    store.append(key, f"{line}\n")  # type: ignore[attr-defined]  # not in torch's stubs


def _lines(store: Store, key: str) -> list[str]:
    return store.get(key).decode().splitlines()


def _as_line(place: RankPlace) -> str:
    return json.dumps(asdict(place))


def _from_line(line: str) -> RankPlace:
    return RankPlace(**json.loads(line))
