"""Arguments and options that several commands take, each with one name and one explanation."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

RANKS_PER_NODE = 8  # where a launcher has not said how many there are


class Precision(str, Enum):
    """Of weights that are written or computed with."""

    fp32 = "fp32"
    bf16 = "bf16"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any key of the run configuration, such as train.steps=1000."),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", help="A preset's name or a YAML file; default: of a run that resumes its own, else quickstart."
    ),
]
DeepSpeedJson = Annotated[
    str | None,
    typer.Option(
        "--deepspeed_config",
        help="The DeepSpeed JSON: batch, precision, optimizer, ZeRO; default: of a run that resumes its own, a "
        "recipe's own, else ds_configs/zero2.json.",
    ),
]
ExtendSteps = Annotated[
    int | None,
    typer.Option("--extend-steps", min=1, help="Of a run that goes on: so many steps more, on a new schedule."),
]
RanksPerNode = Annotated[
    int, typer.Option("--ranks-per-node", min=1, help="For a plan: consecutive ranks that share a node.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="For a plan: each rank has this GPU, such as H100 or A100-40GB; none is needed here.",
    ),
]
Place = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run (its path, or its name under runs/), for its newest good checkpoint, or a checkpoint.",
    ),
]
Tokenizer = Annotated[str, typer.Option("--tokenizer", help="Where the checkpoint's tokenizer is now, if it moved.")]
NewFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Made new; one with files in it is refused.")]
