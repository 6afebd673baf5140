"""What became of a run, in one sentence."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

from megalm.tracking.history import ATTEMPT_EVENTS
from megalm.tracking.metrics import Row
from megalm.tracking.report.account import Account, Failure

Kind = Literal["finished", "stopped", "failed", "running", "unknown", "waiting"]


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    sentence: str


def outcome(account: Account, now: float) -> Outcome:
    """As of unix time `now`."""
    begun = max((int(row.get("attempt") or 1) for row in account.events(*ATTEMPT_EVENTS)), default=0)
    failure = account.failures[-1] if account.failures else None
    if failure is not None and failure.attempt > begun:
        again = f" Before that it was {progress(account)}." if begun else ""
        return Outcome("failed", f"Failed before it began to train: {failure.last_line}{again}")
    if not begun:
        starting = Outcome("running", "Is starting: nothing is trained yet.")
        return starting if account.is_held else Outcome("waiting", "Has not begun to train.")
    last = _since_last_begin(account.history.events)
    ends = [row for row in last if row.get("event") == "end"]
    return _ended(account, ends[-1], last, failure) if ends else _without_end(account, now)


def progress(account: Account) -> str:
    """`at step 30 of 60`."""
    step, planned = account.results.steps, account.planned_steps
    of = f" of {planned:,}" if planned is not None else ""
    return f"at step {step or 0:,}{of}"


def moment(seconds: float) -> str:
    """Unix seconds in this machine's time."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def ago(seconds: float) -> str:
    """`0.4 s`, `3 s`, `5 min`, `2.5 h`, `4 days`."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}" if seconds >= 100 * unit else f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{max(0.0, seconds):.1f} s"


def _ended(account: Account, end: Row, last: list[Row], failure: Failure | None) -> Outcome:
    where = progress(account)
    if end.get("status") == "finished":
        early = any(row.get("event") == "early_stop" for row in last)
        why = ", because the validation loss fell no more (evaluate.patience)" if early else ""
        return Outcome("finished", f"Finished {where}{why}.")
    if end.get("status") == "stopped":
        return Outcome("stopped", f"Stopped {where}{_why_stopped(last)}. It is saved, and wants to go on.")
    why = f": {failure.last_line}" if failure is not None and failure.last_line else "; the error was not kept"
    return Outcome("failed", f"Failed {where}{why}")


def _without_end(account: Account, now: float) -> Outcome:
    seen = account.history.last_time
    last_row = "" if seen is None else f"; last row {ago(now - seen)} before this page, {moment(seen)}"
    if account.is_held:
        return Outcome("running", f"Running, {progress(account)}{last_row}.")
    return Outcome(
        "unknown", f"Killed, or on a machine that is gone: no end was written. It was {progress(account)}{last_row}."
    )


def _why_stopped(last: list[Row]) -> str:
    for row in reversed(last):
        if row.get("event") == "signal":
            return f" by signal {row.get('signal', '')}".rstrip()
        if row.get("event") == "wall_time":
            return f", its time (train.max_wall_time={row.get('limit')}) being up"
    return ""


def _since_last_begin(events: list[Row]) -> list[Row]:
    begins = [index for index, row in enumerate(events) if row.get("event") in ("start", "resume")]
    return events[begins[-1] :] if begins else events
