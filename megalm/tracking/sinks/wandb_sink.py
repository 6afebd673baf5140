"""Weights & Biases as a sink: one of its runs, in a group with those that came before it, or with those of its sweep.

It cannot take values back, and an offline run cannot be continued: where a resume or a rollback takes rows back, and
where an offline run resumes, a new run of the same group gets all rows that count. Its own variables (WANDB_MODE,
WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_NAME, WANDB_RUN_ID, WANDB_DIR, ...) come before megalm's values.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from pydantic import Field

from megalm.runs.metrics_log import Row
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sink import FINISHED, KILLED, RUNNING, seconds
from megalm.tracking.mlflow_mirror.sync_state import Owner
from megalm.tracking.sinks.append_sink import AppendSink, AppendState, Fact

_START_SECONDS = 30.0  # the mirror's own loop does the waiting
_EXIT_CODES = {RUNNING: 0, FINISHED: 0, KILLED: 75}


class WandbState(AppendState):
    """RUN_DIR/wandb/megalm.json.

    Attributes:
        run_ids: of all runs of this folder; the last one has the rows that count.
        is_offline: whether the last one is in a folder of this machine, for `wandb sync`.
        is_open: whether a process has it open. One that is killed takes the values of its last step along.
        owner: the folder when the last one began.
    """

    run_ids: list[str] = Field(default_factory=list)
    is_offline: bool = False
    is_open: bool = False
    owner: Owner | None = None


class WandbSink(AppendSink):
    state: WandbState
    folder_name = "wandb"
    state_type = WandbState

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._run: Any = None
        self._files: dict[str, list[int] | None] = {}  # as sent last

    @property
    def name(self) -> str:
        return "Weights & Biases"

    def remedy(self, run_dir: Path) -> str:
        return (
            f"check `wandb status` and the variables WANDB_*, or set WANDB_MODE=offline, and run `megalm track sync "
            f"{run_dir}`"
        )

    @property
    def outcome(self) -> str:
        state = self.state
        what = f"{self.sent} values to run {state.run_ids[-1]} of Weights & Biases"
        return f"{what}; to upload it, run wandb sync {self.folder}/offline-run-*" if state.is_offline else what

    def open(self) -> None:
        if self._run is None:
            state = self.state
            is_here = state.owner is None or Owner.of(self.run_dir).inode == state.owner.inode
            if not state.run_ids or state.is_offline or state.is_open or not is_here:
                self._begin_run()
            else:
                self._start()

    def forget(self) -> None:
        """Go on in a new run of the group, which gets all rows."""
        before, self._run = self._run, None
        if before is not None:
            before.finish(exit_code=_EXIT_CODES[KILLED])
        self._begin_run()

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            numbers = self.numbers_of(row)
            self._run.log({**numbers, "_timestamp": seconds(row)}, step=row["step"])
            self.sent += len(numbers)

    def finish(self) -> None:
        for name in run_facts.artifact_names(self.run_dir):
            mark = run_facts.signature(self.run_dir / name)
            if self._files.get(name) != mark:
                self._run.save(str(self.run_dir / name), base_path=str(self.run_dir.parent), policy="now")
                self._files[name] = mark

    def close(self) -> None:
        """End the run; returns when everything is uploaded, or in the offline folder."""
        if self._run is None:
            return
        status = self.state.status
        if status == KILLED:
            self._run.mark_preempting()
        self._run.finish(exit_code=_EXIT_CODES.get(status, 1))
        self._run, self.state.is_open = None, False
        self._write_state()

    def write_facts(self, facts: Mapping[str, Fact]) -> None:
        self._run.config.update(dict(facts), allow_val_change=True)

    def _begin_run(self) -> None:
        """Begin a new run; all rows that count go there."""
        state = self.state
        state.begin_again()
        state.reached = 0
        first = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        stem = state.run_ids[0] if state.run_ids else first
        number = len(state.run_ids) + 1
        state.run_ids.append(stem if number == 1 else f"{stem}-{number}")
        state.owner = Owner.of(self.run_dir)
        self._start()

    def _start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        name, number = self.run_dir.resolve().name, len(self.state.run_ids)
        sweep = run_facts.settings(self.run_dir).get("tracking.sweep", "null")
        given = {
            "WANDB_PROJECT": ("project", run_facts.experiment(self.run_dir)),
            "WANDB_RUN_GROUP": ("group", name if sweep == "null" else Path(sweep).name),
            "WANDB_NAME": ("name", name if number == 1 else f"{name} ({number})"),
            "WANDB_DIR": ("dir", str(self.run_dir)),
            "WANDB_RESUME": ("resume", "allow"),
        }
        own = {option: value for variable, (option, value) in given.items() if not os.environ.get(variable)}
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, init_timeout=_START_SECONDS, reinit="create_new"
        )
        self._run = wandb.init(id=self.state.run_ids[-1], settings=settings, **own)
        self.state.is_offline, self.state.is_open = bool(self._run.offline), True
        self._facts, self._files = {}, {}
        self._write_state()
