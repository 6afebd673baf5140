"""The page about a run that the run itself leaves: made when all is trained and saved, at no risk to either."""

from __future__ import annotations

import threading
from pathlib import Path

from megalm.tracking.report import write_report
from megalm.train.report import Reporter
from megalm.train.run_folder import RunFolder

# Half a million steps take some seconds. What takes longer, a sick file system for instance, is not waited for.
_PATIENCE_SECONDS = 60.0


def leave_page(folder: RunFolder, reporter: Reporter, patience_seconds: float = _PATIENCE_SECONDS) -> Path | None:
    """Write report.html, on rank 0; None where that failed or took too long, which is told in a line.

    A thread of its own, which the end of the process does not wait for; the file is there whole or not at all.
    """
    done: list[Path] = []
    why = [f"not done within {patience_seconds:.0f} s"]

    def write() -> None:
        try:
            done.append(write_report(folder.path))
        except Exception as error:  # whatever it is: the run is done, and nothing of it is at stake
            why.insert(0, " ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=write, name="page", daemon=True)
    thread.start()
    thread.join(patience_seconds)
    if done:
        return done[0]
    reporter.say(f"no page about this run ({why[0]}); later: megalm report {folder.path}")
    return None
