"""What the person sees, on rank 0 only: facts, progress, results. A terminal gets a bar, a file gets plain lines.

Everything that is printed is in log.txt too, with the time.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("megalm")

_PLAIN_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class StepLine:
    """One training step in numbers."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.2f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  MFU {self.mfu:.1%}"
        )


class _Console(Console):
    """Nobody needs to look: what cannot be printed, because the terminal or a pipe has gone, is in log.txt."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """rich would end the process. Libraries that print meet no error either."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class RunConsole:
    """Progress and messages of a run.

    Args:
        active: false on every rank but the first: all methods do nothing then.
        log_file: log.txt of the run folder.
    """

    def __init__(self, active: bool, log_file: Path | None = None) -> None:
        self._active = active
        self._console = _Console(highlight=False, markup=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._started = time.monotonic()
        self._first_step = 0
        self._last_plain = 0.0
        if active and isinstance(sys.stdout, io.TextIOWrapper):  # a sample may have letters that the terminal lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        if active and log_file is not None:
            handler = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            log.addHandler(handler)
            log.setLevel(logging.INFO)
            log.propagate = False

    def info(self, text: str = "") -> None:
        """A line for the person."""
        if not self._active:
            return
        self._console.print(text, soft_wrap=True)
        if text:
            log.info("%s", text)

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Aligned `name  value` lines."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.info(f"  {name:<{width}}  {value}")

    def start(self, first_step: int, total_steps: int) -> None:
        """Begin to count steps; `first_step` are done already."""
        if not self._active:
            return
        self._total, self._first_step, self._started = total_steps, first_step, time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    def step(self, line: StepLine) -> None:
        if not self._active:
            return
        elapsed = time.monotonic() - self._started
        done = line.step - self._first_step
        remaining = elapsed / done * (self._total - line.step)
        plain = f"step {line.step}/{self._total}  {line}  elapsed {duration(elapsed)}  ETA {duration(remaining)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=line.step, description=str(line))
            log.info("%s", plain)
            return
        # A Slurm log is read by people: the first step, the last one, and one every few seconds.
        now = time.monotonic()
        if done == 1 or line.step == self._total or now - self._last_plain >= _PLAIN_INTERVAL_SECONDS:
            self._last_plain = now
            self.info(plain)
        else:
            log.info("%s", plain)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(number_of_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number_of_bytes < 1024:
            return f"{number_of_bytes:.0f} B" if unit == "B" else f"{number_of_bytes:.1f} {unit}"
        number_of_bytes /= 1024
    return f"{number_of_bytes:.1f} TiB"
