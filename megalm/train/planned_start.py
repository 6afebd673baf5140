"""Where a run would go on, and on which schedules, without a process group: for `--dry-run` beside `--resume`."""

from __future__ import annotations

from pathlib import Path

from megalm.alone import Alone
from megalm.config.resolve import ResolvedRun
from megalm.train.course import find_start, plan_steps
from megalm.train.request import Resume
from megalm.train.run_folder import RunFolder
from megalm.train.schedule import ScheduleSegment


def planned_start(run: ResolvedRun, resume: Resume) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """The run with the last step that it will have, and all schedules that it then has had.

    Raises:
        CheckpointError, ConfigError: as when it is started; files are hashed as they are then.
    """
    section = run.config.run
    folder = RunFolder(Path(section.root).expanduser() / (section.name or "-"))
    found, resume = find_start(folder, resume, Alone())
    run, position = plan_steps(run, found, resume)
    return run, position.schedule
