"""Arguments and options that several commands share, each with one name and one help text."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

RANKS_PER_NODE = 8  # if no launcher gives the number

_TEXT_OPTIONS = ("--prompt", "--reason", "--name")  # their values are no paths
_OPTION = re.compile(r"(--[a-z_-]+=)?(~.*)", re.DOTALL)


def expand_home(words: Sequence[str]) -> list[str]:
    """Expand `~` at the start of the words of a command line, which a shell leaves in quotes and in `--option=~/x`.

    In `key=~/x` the configuration does it, where it knows that the key takes a path.
    """

    def expand(before: str, word: str) -> str:
        match = _OPTION.fullmatch(word)
        if match is None or (match[1] or f"{before}=").rstrip("=") in _TEXT_OPTIONS:
            return word
        return f"{match[1] or ''}{os.path.expanduser(match[2])}"

    return [expand(before, word) for before, word in zip(["", *words], words, strict=False)]


class Precision(str, Enum):
    """The dtype of weights."""

    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float32 if self is Precision.fp32 else torch.bfloat16


class Strategy(str, Enum):
    """How `--extend-steps` continues a run."""

    schedule = "schedule"
    weights = "weights"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any key of the run configuration, such as train.steps=1000."),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", help="A preset's name or a YAML file. Default: the run's own if it resumes, else quickstart."
    ),
]
DeepSpeedJson = Annotated[
    str | None,
    typer.Option(
        "--deepspeed_config",
        help="The DeepSpeed JSON: batch, precision, optimizer, ZeRO. Default: the run's own if it resumes, the "
        "recipe's, else ds_configs/zero2.json.",
    ),
]
ExtendSteps = Annotated[
    int | None,
    typer.Option("--extend-steps", min=1, help="Resume for this many more steps, on a new schedule."),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume", help="auto (the newest checkpoint; step 0 if there is none), a step, or a checkpoint's path."
    ),
]
ExtendStrategy = Annotated[
    Strategy,
    typer.Option(
        "--extend-strategy",
        help="schedule: a cosine from the current rate to a tenth of it; weights: a new run with its weights.",
    ),
]
SkipSteps = Annotated[int, typer.Option("--skip-steps", min=0, help="With --resume: skip the data of this many steps.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the log lines of DeepSpeed and torch.")]
RanksPerNode = Annotated[
    int, typer.Option("--ranks-per-node", min=1, help="For a plan: the consecutive ranks that share a node.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="For a plan: the GPU of each rank, such as H100 or A100-40GB; this machine needs none.",
    ),
]
Run = Annotated[str, typer.Argument(help="A run folder, or a run's name under runs/.")]
Place = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run (its path, or its name under runs/) for its newest good checkpoint, or a checkpoint.",
    ),
]
ModelPlace = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run (its path, or its name under runs/) for its newest good checkpoint, a checkpoint, or a folder "
        "with a model in Hugging Face format.",
    ),
]
StoredPrecision = Annotated[Precision, typer.Option("--dtype", help="fp32 is exact; bf16 rounds, at half the size.")]
Tokenizer = Annotated[str, typer.Option("--tokenizer", help="The tokenizer's path, if it has moved since training.")]
NewFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create; it may exist if empty.")]
