"""The mirror's persistent state, and the numbers it sends. Imports no MLflow, which takes seconds: client.py does."""

from __future__ import annotations

import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field, ValidationInfo, model_validator

from megalm.errors import ConfigError
from megalm.tracking.mlflow_mirror.sink import FeedState

STATE_FILE = "mlflow.json"


@dataclass(frozen=True)
class MetricValue:
    """One number of one series; `time_ms` is unix milliseconds."""

    key: str
    value: float
    step: int
    time_ms: int


class Owner(BaseModel, frozen=True):
    """The folder that an MLflow run belongs to. A move keeps the inode, a copy does not."""

    folder: str
    inode: int
    host: str

    @classmethod
    def of(cls, run_dir: Path) -> Owner:
        here = run_dir.resolve()
        return cls(folder=str(here), inode=here.stat().st_ino, host=platform.node())


class MirrorState(FeedState):
    """RUN_DIR/mlflow.json: which MLflow run this folder is, and how much of it is there.

    Attributes:
        owner: the folder when it was last sent; None in files of 0.1.0.
        name: of the MLflow run, once it is another than the folder's.
        given_run: MLFLOW_RUN_ID when `run_id` was begun.
        earlier_runs: the MLflow runs with rows that a later attempt took back; children of `run_id`.
        description: as last sent; a person's own stays.
        system: file of a node's samples -> offset of the next one, and its number.
    """

    key: str = Field(default_factory=lambda: uuid.uuid4().hex)
    owner: Owner | None = None
    tracking_uri: str = ""
    default_store: bool = True
    experiment: str = ""
    experiment_id: str = ""
    given_run: str | None = None
    name: str = ""
    run_id: str | None = None
    earlier_runs: list[str] = Field(default_factory=list)
    status_sent: str | None = None
    description: str = ""
    artifacts: dict[str, list[int]] = Field(default_factory=dict)
    system: dict[str, list[int]] = Field(default_factory=dict)

    after_deletion: ClassVar[str] = "send the run to a new MLflow run"

    @model_validator(mode="before")
    @classmethod
    def _names_its_run(cls, content: Any, info: ValidationInfo) -> Any:
        if info.mode == "json" and isinstance(content, dict) and "key" not in content:
            raise ValueError("key is missing")
        return content

    def original_of(self, run_dir: Path, claimed: str | None = None) -> Path | None:
        """Return the folder that `run_dir` is a copy of; None if the MLflow run of this state is its own.

        A moved folder keeps its run: no other folder is left with the same key. A default store moves or is copied with
        its run root, so that only folders of the same root share it.

        Args:
            claimed: the folder that the MLflow run names as its own.
        """
        here, mine = run_dir.resolve(), Owner.of(run_dir)
        places = [place for place in (self.owner and self.owner.folder, claimed) if place]
        for place in map(Path, places):
            other = here.parent / place.name if self.default_store else place
            if self._is_shared_with(other, here, mine):
                return other
        owner = self.owner
        if self.default_store or owner is None or owner.folder == mine.folder or owner.inode == mine.inode:
            return None
        # On another host a folder that cannot be seen may still be there: its run is left alone.
        seen = owner.host == mine.host or Path(owner.folder).parent.is_dir()
        return None if seen else Path(owner.folder)

    def _is_shared_with(self, other: Path, here: Path, mine: Owner) -> bool:
        """Whether another folder has the same key and is the one that keeps it."""
        try:
            if other == here or os.path.samefile(other, here):
                return False
            state, theirs = MirrorState.load(other / STATE_FILE), Owner.of(other)
        except (OSError, ConfigError):
            return False
        is_moved_here = self.owner is not None and self.owner.inode == mine.inode
        is_copied_there = state.owner is not None and state.owner.inode != theirs.inode
        return state.key == self.key and not (is_moved_here and is_copied_there)


def copied_from(run_dir: Path) -> Path | None:
    """Return the folder that `run_dir` is a copy of, as far as the files show; None without a readable mlflow.json."""
    try:
        return MirrorState.load(run_dir / STATE_FILE).original_of(run_dir)
    except (OSError, ConfigError):
        return None
