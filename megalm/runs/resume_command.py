"""The command that goes on with a run, for people to try."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megalm.config.schema import RunSection


@dataclass(frozen=True)
class ResumeCommand:
    """Which run, and how it is started; its own settings are in its folder.

    Attributes:
        folder: the run folder.
        ranks: on this machine; `deepspeed` is told of more than one.
    """

    folder: Path
    ranks: int = 1

    def shell(self, *words: str) -> str:
        """A command line for a shell, with `words` (`--resume auto`, `key=value`) at its end."""
        launch = ["deepspeed", *(["--num_gpus", str(self.ranks)] if self.ranks > 1 else []), "launch/pretrain.py"]
        root = str(self.folder.parent)
        elsewhere = [] if root == RunSection().root else [f"run.root={root}"]
        return shlex.join([*launch, *elsewhere, f"run.name={self.folder.name}", *words])
