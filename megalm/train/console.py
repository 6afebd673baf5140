"""Console output of a run, on rank 0 only: facts, progress, results. A terminal gets a bar, a file plain lines.

Everything printed is also written to log.txt, with the time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from megalm.utils.atomic_files import still_names
from megalm.utils.formatting import PrintableFormatter, printable
from megalm.utils.progress import ProgressBar, counts

log = logging.getLogger("megalm")


class _Console(Console):
    """A console that ignores a full disk or a terminal that has gone: log.txt has everything.

    `keep_standard_streams` has made standard output one that drops later text.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **options)


class _LogFile(logging.FileHandler):
    """log.txt: on a full disk lines are left out, which is said once.

    Args:
        notice: shows a line to the person.
    """

    def __init__(self, path: Path, notice: Callable[[str], None]) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
        self._path, self._notice = path, notice
        self._has_failed = False
        self._can_compare = not self._is_gone()

    def reopen_if_gone(self) -> None:
        """Continue in a new file if the file was deleted or replaced."""
        if not self._can_compare or not self._is_gone():
            return
        try:
            deleted = self.setStream(self._open())
        except OSError as error:
            self._report_once(error)
            return
        if deleted is not None:
            deleted.close()
        self._notice(f"WARNING: {self._path} was deleted or replaced; the log continues in a new file")

    def _is_gone(self) -> bool:
        return self.stream is not None and not still_names(self._path, self.stream.fileno())

    def handleError(self, record: logging.LogRecord) -> None:
        self._report_once(sys.exc_info()[1])

    def _report_once(self, error: BaseException | None) -> None:
        if isinstance(error, OSError) and not self._has_failed:
            self._has_failed = True
            self._notice(f"WARNING: cannot write {self._path} ({error.strerror}); it lacks lines from here on")


class RunConsole:
    """Progress and messages of a run.

    Args:
        active: true on rank 0 only; otherwise all methods do nothing.
        log_file: log.txt of the run folder.
    """

    def __init__(self, active: bool, log_file: Path | None = None) -> None:
        self._active = active
        self._console = _Console(highlight=False, markup=False)
        self._bar: ProgressBar | None = None
        self._log_file: _LogFile | None = None
        if active and log_file is not None:
            self._log_file = _LogFile(log_file, lambda line: self._console.print(line, soft_wrap=True))
            log.addHandler(self._log_file)
            log.setLevel(logging.INFO)
            log.propagate = False

    def info(self, text: str = "") -> None:
        """Print a line or several."""
        if not self._active:
            return
        text = printable(text)
        self._console.print(text, soft_wrap=True)
        if text:
            log.info("%s", text)

    def reopen_log_if_gone(self) -> None:
        """Continue log.txt in a new file if it was deleted or replaced. Call while the run folder has its name."""
        if self._log_file is not None:
            self._log_file.reopen_if_gone()

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print aligned `name  value` lines."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.info(f"  {name:<{width}}  {value}")

    def start(self, first_step: int, total_steps: int, work: Callable[[int], int] = lambda steps: steps) -> None:
        """Start the progress display; `first_step` steps are already done.

        Args:
            work: steps -> what they take together, in any unit, from which the time left follows.
        """
        if self._active:
            self._step, self._last_step, self._counted, self._work = first_step, total_steps, False, work
            self._bar = ProgressBar(
                "step",
                work(total_steps),
                done=work(first_step),
                console=self._console,
                shown=lambda *_: counts(self._step, self._last_step),
                transient=False,
            )
            self._bar.start()

    def step(self, step: int, text: str) -> None:
        """Show a step's numbers. A log file gets the first step, the last one, and one every few seconds."""
        if self._bar is None:
            return
        self._step = step
        self._bar.update(self._work(step), text, line_now=not self._counted or step == self._last_step)
        self._counted = True
        log.info("%s", self._bar.line)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
