"""Which ranks are alive: each tells the others through the job's store, and what it sees of its node's processes.

A rank that hangs in a collective still tells, since a thread does it. One that does not is gone, stopped, or cut off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from megalm.communicator import SharedStore
from megalm.rank_environment import ProcessState, RankPlace

BEAT_SECONDS = 1.0
# A beat may be late: Python's lock is held, or the machine is busy. Then a rank is silent.
_SILENT_SECONDS = 10.0
# A watch that comes back after this long has itself been suspended.
_SUSPENDED_SECONDS = 5.0
# Whoever diagnoses a failure at once counts a rank as silent sooner, if others beat meanwhile.
_SILENT_BEATS = 4
# The others' own failures come first, if they notice at all: NCCL waits for a rank that is gone until it times out.
_GONE_GRACE_SECONDS = 12.0
_FIRST_NOTICE_SECONDS = 20.0
_LATE_SECONDS = 60.0  # at one stage of the start
_SHOWN_RANKS = 4
_POLL_SECONDS = 0.5

Condition = Literal["gone", "stopped", "silent"]
_BY_CERTAINTY: tuple[Condition, ...] = ("gone", "stopped", "silent")


class Beat(BaseModel, frozen=True):
    """What a rank last said of itself.

    Attributes:
        number: grows from beat to beat.
        step: the last one that is done; None before the first step.
        stage, doing: the number and the name of its stage of the start.
        since_seconds: how long it has been there without progress.
        seen: rank -> state of the processes of its node that are not alive.
        memory_kills: processes that the kernel has killed for memory on its node since the job began.
    """

    number: int = 0
    step: int | None = None
    stage: int = 0
    doing: str = "starting"
    since_seconds: float = 0.0
    seen: Mapping[int, ProcessState] = {}
    memory_kills: int = 0


@dataclass(frozen=True)
class LostRank:
    """A rank that is gone, stopped, or gives no sign of life for `seconds`; `beat` is the last that is known of it."""

    place: RankPlace
    condition: Condition
    seconds: float = 0.0
    beat: Beat | None = None
    memory_kills: int = 0


@dataclass
class _Heard:
    beat: Beat
    at: float  # time.monotonic() of this rank when it was new


class Heartbeat:
    """Tells the job's store that this rank is alive, and finds out which others are.

    Args:
        store: with a connection of its own, because the main thread may wait in the other one.
        places: of all ranks.
        start_timeout_seconds: before the first step, a rank that is silent for so long is lost; None: it is waited for.
        on_lost: called in a thread, once, with ranks without which the job cannot continue.
        notice: gets lines about ranks that are silent or late.
    """

    def __init__(
        self,
        store: SharedStore,
        places: Sequence[RankPlace],
        rank: int,
        start_timeout_seconds: float | None,
        on_lost: Callable[[list[LostRank]], None],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.place = places[rank]
        self._store, self._places = store, places
        self._start_timeout, self._on_lost, self.notice = start_timeout_seconds, on_lost, notice
        self._beat = Beat()
        self._progress_at = time.monotonic()
        others = [each for each in places if each.host == self.place.host and each is not self.place]
        self._neighbors = [each for each in others if each.process_state() != "gone"]  # else a container hides it
        self._kills_before = memory_kills()
        self._heard: dict[int, _Heard] = {}
        self._listens = threading.Event()  # reads the beats of all ranks, besides writing its own
        if rank == 0:
            self._listen()
        self._exchanged_at = time.monotonic()
        self._store_is_gone = False
        self._lost_since: dict[int, float] = {}
        self._next_notice = _FIRST_NOTICE_SECONDS
        self._stopped = threading.Event()

    def start(self) -> None:
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, name=f"heartbeat{work.__name__}", daemon=True).start()

    def _listen(self) -> None:
        if not self._listens.is_set():
            now = time.monotonic()
            self._heard = {place.rank: _Heard(Beat(), now) for place in self._places}
            self._listens.set()

    def stop(self) -> None:
        """From here on ranks may leave; its threads end."""
        self._stopped.set()

    def enter(self, stage: str) -> None:
        """Say at which stage of the start this rank is."""
        self._beat = self._beat.model_copy(update={"doing": stage, "stage": self._beat.stage + 1})
        self._progress_at = time.monotonic()

    def progress(self, step: int | None = None) -> None:
        """Say that something was done; `step` is the last complete one."""
        self._progress_at = time.monotonic()
        if step is not None:
            self._beat = self._beat.model_copy(update={"step": step, "doing": "training"})

    # --- the exchange through the store

    def _exchange(self) -> None:
        number = 0
        silent = {place.rank for place in self._places}  # that have never said anything
        try:
            while not self._stopped.is_set():
                number += 1
                self._store.set(f"beat/{self.place.rank}", self._own_beat(number).model_dump_json())
                self._store.add("beats", 1)  # is answered, so that a server that stands still is noticed
                if self._listens.is_set():
                    silent -= {rank for rank in silent if self._store.check([f"beat/{rank}"])}
                    speaking = [place.rank for place in self._places if place.rank not in silent]
                    texts = self._store.multi_get([f"beat/{rank}" for rank in speaking])
                    now = time.monotonic()
                    for rank, beat in zip(speaking, map(Beat.model_validate_json, texts), strict=True):
                        if self._heard[rank].beat.number != beat.number:
                            self._heard[rank] = _Heard(beat, now)
                self._exchanged_at = time.monotonic()
                self._stopped.wait(BEAT_SECONDS)
        except RuntimeError:  # of torch's store: its server has ended
            self._store_is_gone = True

    def _own_beat(self, number: int) -> Beat:
        now = {
            "number": number,
            "since_seconds": round(time.monotonic() - self._progress_at, 1),
            "seen": {each.rank: state for each in self._neighbors if (state := each.process_state()) != "alive"},
            "memory_kills": memory_kills() - self._kills_before,
        }
        return self._beat.model_copy(update=now)

    # --- who is lost

    def lost(self, silent_seconds: float | None = None) -> dict[int, LostRank]:
        """Return the ranks that are not well as far as this one knows now."""
        silent_seconds = _SILENT_SECONDS if silent_seconds is None else silent_seconds
        now = time.monotonic()
        found: dict[int, Condition] = {}
        own = self._own_beat(0)
        witnesses = {self.place.rank: own}
        silences = {rank: now - heard.at for rank, heard in self._heard.items() if rank != self.place.rank}
        if self._listens.is_set():
            witnesses |= {
                rank: self._heard[rank].beat for rank, seconds in silences.items() if seconds < silent_seconds
            }
            found |= {rank: "silent" for rank, seconds in silences.items() if seconds >= silent_seconds}
        if self.place.rank != 0:
            silences[0] = max(silences.get(0, 0.0), now - self._exchanged_at)
            if self._store_is_gone:
                found[0] = "gone"
            elif now - self._exchanged_at >= silent_seconds:
                found = {0: "silent"}  # nobody else can be heard
        kills: dict[str, int] = {}
        for witness, beat in witnesses.items():
            found |= {rank: state for rank, state in beat.seen.items() if state != "alive"}
            host = self._places[witness].host
            kills[host] = max(kills.get(host, 0), beat.memory_kills)
        return {
            rank: LostRank(
                self._places[rank],
                condition,
                silences.get(rank, 0.0),
                self._last_known(rank),
                kills.get(self._places[rank].host, 0),
            )
            for rank, condition in found.items()
            if rank != self.place.rank
        }

    def _last_known(self, rank: int) -> Beat | None:
        """Return a rank's last beat; its step is this rank's, if that is later: they train together."""
        beat = self._heard[rank].beat if rank in self._heard else None
        if self._beat.step is None or (beat is not None and (beat.step or 0) > self._beat.step):
            return beat
        return (beat or Beat()).model_copy(update={"step": self._beat.step})

    def find_lost(self, patience_seconds: float, is_reported: Callable[[], bool] = lambda: False) -> list[LostRank]:
        """Wait for the first cause of a failure to show: the ranks that are lost, of the surest kind only; or none.

        Args:
            is_reported: whether another rank has reported meanwhile.
        """
        self._listen()
        began = time.monotonic()
        found_at: float | None = None
        lost: dict[int, LostRank] = {}
        while time.monotonic() - began < patience_seconds and not is_reported():
            lost = self.lost(_SILENT_BEATS * BEAT_SECONDS)
            if lost and found_at is None:
                found_at = time.monotonic()
            if found_at is not None and time.monotonic() - found_at > 2 * BEAT_SECONDS:
                break  # others of the same node have shown, too
            if not lost and time.monotonic() - began > (_SILENT_BEATS + 1) * BEAT_SECONDS and self._all_are_fresh():
                break
            time.sleep(_POLL_SECONDS)
        surest = next((kind for kind in _BY_CERTAINTY if any(it.condition == kind for it in lost.values())), None)
        return [lost[rank] for rank in sorted(lost) if lost[rank].condition == surest]

    def _all_are_fresh(self) -> bool:
        now = time.monotonic()
        return all(now - heard.at < 2 * BEAT_SECONDS for heard in self._heard.values())

    def behind(self) -> list[tuple[RankPlace, Beat]]:
        """Return the ranks that are furthest behind; none if all have come equally far, or are not known."""
        beats = {rank: heard.beat for rank, heard in self._heard.items()}
        steps = {rank: -1 if beat.step is None else beat.step for rank, beat in beats.items()}
        if len(set(steps.values())) < 2:
            return []
        return self.known([rank for rank in beats if steps[rank] == min(steps.values())])

    def known(self, ranks: Iterable[int]) -> list[tuple[RankPlace, Beat]]:
        """Return what was last heard of these ranks."""
        return [(self._places[rank], self._last_known(rank) or Beat()) for rank in sorted(ranks)]

    # --- the watch

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - looked_at > _SUSPENDED_SECONDS:
                self._forgive(now)  # this process was suspended, and the others with it perhaps
            looked_at = now
            lost = self.lost()
            self._lost_since = {rank: self._lost_since.get(rank, now) for rank in lost}
            if fatal := [each for rank, each in lost.items() if self._is_fatal(each, now - self._lost_since[rank])]:
                if not self._stopped.is_set():
                    self._on_lost(fatal)
                return
            self._give_notice(lost, now)

    def _forgive(self, now: float) -> None:
        for heard in self._heard.values():
            heard.at = now
        self._exchanged_at = now
        self._lost_since = {}

    def _is_fatal(self, lost: LostRank, seconds: float) -> bool:
        if lost.condition == "gone":
            return seconds > _GONE_GRACE_SECONDS
        if self._beat.step is not None or self._start_timeout is None:
            return False  # the watchdog's business
        # Before there is a run folder all ranks speak: the first one first.
        return max(seconds, lost.seconds) > self._start_timeout + min(max(self.place.rank - 1, 0), 3)

    def _give_notice(self, lost: Mapping[int, LostRank], now: float) -> None:
        """Say which ranks are silent, or late at the start; again after twice the time."""
        if self.place.rank != 0 and not (self.place.rank == 1 and 0 in lost):
            return
        seconds, text = 0.0, ""
        if lost:
            seconds = now - min(self._lost_since.values())
            ranks = ", ".join(f"{each.place} ({each.condition})" for each in lost.values())
            limit = self._start_timeout if self._beat.step is None else None
            until = "" if limit is None else f"; the job fails after {limit:.0f} s (train.start_timeout_seconds)"
            answer = f"{len(self._places) - len(lost)} of {len(self._places)} ranks answer"
            text = f"{answer}; no sign of life for {seconds:.0f} s: {ranks}{until}"
        elif self._beat.step is None and (late := self._late_ranks()):
            seconds = min(beat.since_seconds for _, beat in late)
            stage = late[0][1].doing
            if len(late) == len(self._places):
                text = f"all {len(late)} ranks are still {stage}, for {seconds:.0f} s"
            else:
                ranks = ", ".join(str(place) for place, _ in late[:_SHOWN_RANKS])
                waiting = f"{len(self._places) - len(late)} of {len(self._places)} ranks wait for {ranks}"
                text = f"{waiting}, still {stage}, for {seconds:.0f} s"
        first = _FIRST_NOTICE_SECONDS if lost else _LATE_SECONDS
        if seconds < first:
            self._next_notice = first
        elif seconds >= self._next_notice:
            self._next_notice = 2 * seconds
            self.notice(text)

    def _late_ranks(self) -> list[tuple[RankPlace, Beat]]:
        """Return the ranks at the earliest stage of the start; all, if they are at the same one."""
        beats = {rank: heard.beat for rank, heard in self._heard.items()}
        earliest = min((beat.stage for beat in beats.values()), default=0)
        return [(self._places[rank], beats[rank]) for rank in sorted(beats) if beats[rank].stage == earliest]


def memory_kills(counters: Path = Path("/proc/vmstat")) -> int:
    """Return how many processes the kernel of this node has killed for memory since it started; 0 if it is not said."""
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
