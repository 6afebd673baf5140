"""The command that started a run, to be said again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

# Said once: the name is the folder's, and what may differ from a checkpoint is meant for one resume.
_NOT_AGAIN = ("run.name", "resume.allow")


@dataclass(frozen=True)
class Invocation:
    """What a person said, with the name that the run got.

    Attributes:
        ranks: on this machine; `deepspeed` is told of more than one.
    """

    deepspeed_config: str
    config: str | None
    overrides: tuple[str, ...]
    name: str
    ranks: int = 1

    def again(self, *words: str) -> str:
        """A command line for a shell: everything as it was but for `words`, flags and `key=value` alike."""
        replaced = {word.partition("=")[0] for word in words} | set(_NOT_AGAIN)
        kept = [word for word in self.overrides if word.partition("=")[0] not in replaced]
        launch = ["deepspeed", *(["--num_gpus", str(self.ranks)] if self.ranks > 1 else []), "launch/pretrain.py"]
        files = ["--deepspeed_config", self.deepspeed_config, *(["--config", self.config] if self.config else [])]
        return shlex.join([*launch, *files, *kept, f"run.name={self.name}", *words])
