"""The words for the first cause of a failure: which ranks, on which nodes, and what happened to them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megalm.engine.interface import StalledCollective
from megalm.rank_environment import RankPlace, describe_ranks, exclude_advice
from megalm.train.lifecycle.heartbeat import Beat, LostRank

_SHOWN_ERROR = 160
_SHOWN_PLACES = 4  # with their devices; more are summed up by node
_SOURCE_PLACE = re.compile(r"^\[\S+:\d+\] ")  # with which gloo's errors begin


def describe_lost(lost: Sequence[LostRank], consequence: str = "", stalled: StalledCollective | None = None) -> str:
    """Return a line on ranks that are lost, all in the same condition.

    Args:
        consequence: what the rank that reports has noticed of it.
        stalled: the collective that other ranks wait in.
    """
    first, who = lost[0], _who([each.place for each in lost])
    has, its, stands = ("has", "its process", "stands")
    if len(lost) > 1:
        has, its, stands = ("have", "their processes", "stand")
    at = _where(first.beat)
    if first.condition == "gone":
        kills = sum({it.place.host: it.memory_kills for it in lost}.values())
        memory = f"; the kernel has killed {kills} process(es) there for memory since the job began" if kills else ""
        what = (
            f"{has} vanished{at}: {its} ended without a message, killed from outside (as for memory) or crashed{memory}"
        )
    elif first.condition == "stopped":
        what = f"{has} stopped{at}: {its} {stands} still (SIGSTOP, a debugger)"
    else:
        what = (
            f"{has} given no sign of life for {max(it.seconds for it in lost):.0f} s{at}: the node or its network is "
            f"gone, or {its} {stands} still (SIGSTOP, swapping)"
        )
    noticed = f" ({consequence})" if consequence else ""
    if stalled is not None and {it.place.rank for it in lost} <= set(stalled.missing):
        what += _not_joined(stalled)
    return f"{who} {what}{noticed}{exclude_advice(it.place.host for it in lost)}"


def describe_consequence(reporter: object, error: BaseException) -> str:
    """Return the failure of a rank that only lost its connection, folded into a few words."""
    text = _SOURCE_PLACE.sub("", " ".join(str(error).split())).partition(". ")[0]
    text = text if len(text) <= _SHOWN_ERROR else text[:_SHOWN_ERROR] + "..."
    return f"noticed by {reporter}: {text}"


def describe_stuck(
    stuck: Sequence[tuple[RankPlace, Beat]], noticed: str, stalled: StalledCollective | None = None
) -> str:
    """Return a line on ranks that are alive and that the others wait for."""
    who = _who([place for place, _ in stuck])
    verb = "is" if len(stuck) == 1 else "are"
    why = _not_joined(stalled) if stalled is not None else ": further behind than all others"
    advice = exclude_advice(place.host for place, _ in stuck)
    return f"{who} {verb} stuck{_where(stuck[0][1])}{why} ({noticed}){advice}"


def _who(places: Sequence[RankPlace]) -> str:
    if len(places) <= _SHOWN_PLACES:
        return ", ".join(map(str, places))
    return describe_ranks((place.rank, place.host) for place in places)


def _not_joined(stalled: StalledCollective) -> str:
    """Return which collective the others wait in, for a rank or several."""
    name = f"{stalled.collective} {stalled.number} of process group {stalled.group}"
    instead = f" but {stalled.instead}" if stalled.instead else ""
    waiting = describe_ranks((rank, None) for rank in stalled.waiting)
    it_has = "it has" if len(stalled.missing) == 1 else "they have"
    return f"; {it_has} not joined {name}{instead}, where {waiting} {'waits' if len(stalled.waiting) == 1 else 'wait'}"


def _where(beat: Beat | None) -> str:
    if beat is None:
        return ""
    return f" after step {beat.step}" if beat.step is not None else f" while {beat.doing}"
