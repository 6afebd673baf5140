"""copies.json of a run folder: what the process that copies checkpoints has done, for the trainer and for commands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.utils.atomic_files import write_json

STATUS_FILE = "copies.json"
LOCK_FILE = "copies.lock"


class Copied(BaseModel):
    """A verified copy.

    Attributes:
        bytes: of its files.
        seconds: it took; 0 if it was there already.
        at: unix seconds.
    """

    model_config = ConfigDict(frozen=True)

    bytes: int
    seconds: float
    at: float


class CopyStatus(BaseModel):
    """The state of a run's copies.

    Attributes:
        address: where they are, ADDRESS/RUN.
        copied: those that are complete and verified there, by name.
        due: names of the checkpoints that are still to be copied, the newest first.
        copying: the one in work, which local retention leaves alone; bytes_done of bytes_total.
        problem: why the last try failed; "" if it did not.
        notices: what is not tried again, such as a damaged checkpoint.
    """

    model_config = ConfigDict(frozen=True)

    address: str = ""
    copied: dict[str, Copied] = {}
    due: tuple[str, ...] = ()
    copying: str | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    problem: str = ""
    notices: tuple[str, ...] = ()

    @classmethod
    def read(cls, run_dir: Path) -> CopyStatus:
        """Return the status in a run folder; an empty one where there is none, or none that can be read."""
        try:
            return cls.model_validate_json((run_dir / STATUS_FILE).read_bytes())
        except (OSError, ValidationError):
            return cls()

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / STATUS_FILE, self.model_dump(mode="json"), durable=False)


_READ_INTERVAL_SECONDS = 1.0
_REMIND_SECONDS = 3600.0


@dataclass
class CopyReader:
    """Reads copies.json at most once a second, and tells what is new in it. A time in the future is of a later file.

    Args:
        since: unix time from which on a copy is new.
    """

    run_dir: Path
    since: float = 0.0
    status: CopyStatus = field(default_factory=CopyStatus)
    _next_read: float = 0.0
    _reported: set[str] = field(default_factory=set)
    _remind_at: float = 0.0

    def read(self, now: bool = False) -> CopyStatus:
        if now or time.monotonic() >= self._next_read:
            self._next_read = time.monotonic() + _READ_INTERVAL_SECONDS
            self.status = CopyStatus.read(self.run_dir)
        return self.status

    def new_copies(self) -> dict[str, Copied]:
        """Return the new copies that were not returned before."""
        found = {
            name: copied
            for name, copied in self.read().copied.items()
            if copied.at >= self.since and f"{name} {copied.at}" not in self._reported
        }
        self._reported |= {f"{name} {copied.at}" for name, copied in found.items()}
        return found

    def new_warnings(self) -> list[str]:
        """Return what is to be warned of: a problem at once and then once an hour, a notice once."""
        status = self.read()
        found = [notice for notice in status.notices if notice not in self._reported]
        self._reported |= {*found}
        if not status.problem:
            self._remind_at = 0.0
        elif time.monotonic() >= self._remind_at:
            self._remind_at = time.monotonic() + _REMIND_SECONDS
            found.append(
                f"checkpoints are not copied to {status.address}: {status.problem}; training continues, and copying is "
                f"tried again (copies.log)"
            )
        return found
