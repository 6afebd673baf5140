"""Pretrain a language model: what `deepspeed`, `torchrun`, `srun` or a plain `python` starts on every rank.

Only parses; megalm.train.setup does the work. Flags are unlike the launchers' own, which they would swallow.
"""

from __future__ import annotations

import logging
import os
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

import typer

from megalm.cli.options import RANKS_PER_NODE, Config, DeepSpeedJson, ExtendSteps, Overrides, RanksPerNode
from megalm.errors import MegalmError


class Strategy(str, Enum):
    """How `--extend-steps` goes on."""

    schedule = "schedule"
    weights = "weights"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    epilog="Exit codes: 0 done, 2 refused configuration or input, 75 saved and wants to be started again, 1 failed."
)
def main(
    overrides: Overrides = None,
    deepspeed_config: DeepSpeedJson = None,
    config: Config = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="auto (the newest checkpoint, or the start), a step, or a checkpoint's path."),
    ] = None,
    extend_steps: ExtendSteps = None,
    extend_strategy: Annotated[
        Strategy,
        typer.Option(
            "--extend-strategy",
            help="schedule: a cosine from the rate of now to a tenth; weights: a new run from step 0 with its weights.",
        ),
    ] = Strategy.schedule,
    skip_steps: Annotated[
        int, typer.Option("--skip-steps", min=0, help="With --resume: pass over the data of so many steps.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the run amounts to, with memory and topology, and leave.")
    ] = False,
    world_size: Annotated[
        int,
        typer.Option(
            "--world-size", help="With --dry-run: plan for so many ranks; default: this job's.", show_default=False
        ),
    ] = 0,
    ranks_per_node: RanksPerNode = RANKS_PER_NODE,
    verbose: Annotated[bool, typer.Option("--verbose", help="Let DeepSpeed and torch log what they like.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Pretrain a language model with DeepSpeed.

    Without anything else it makes a corpus from this Python's standard library, trains a tokenizer and a
    small model on it, validates, samples, checkpoints and tracks, in a few minutes on two cores.

    \b
    deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json
    deepspeed --num_gpus 2 launch/pretrain.py --deepspeed_config ds_configs/zero3.json train.steps=1000
    python launch/pretrain.py --deepspeed_config ds_configs/bf16.json --config my.yaml --dry-run
    """
    arguments: dict[str, Any] = {
        "deepspeed_config": deepspeed_config,
        "config": config,
        "overrides": tuple(overrides or ()),
        "resume": resume,
        "extend_steps": extend_steps,
        "extend_strategy": extend_strategy.value,
        "skip_steps": skip_steps,
    }
    if dry_run:
        _dry_run(arguments, world_size, ranks_per_node)
        return
    from megalm.engine.deepspeed_patches import limit_openmp_spin, silence

    limit_openmp_spin()  # this and the next before torch is imported
    if verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        silence()
    from megalm.runs.run_settings import Arguments
    from megalm.train.lifecycle.shutdown import RankSupervisor
    from megalm.train.setup import pretrain

    supervisor = RankSupervisor(rank=int(os.environ.get("RANK", "0")))
    supervisor.run(lambda: pretrain(Arguments(**arguments), supervisor))


def _dry_run(arguments: dict[str, Any], world_size: int, ranks_per_node: int) -> None:
    """What the run amounts to; of one that goes on, with the schedules of its past.

    Args:
        arguments: of `Arguments`.
    """
    from megalm.cli.plan import show_plan
    from megalm.runs.run_settings import Arguments
    from megalm.train.resume.resume_plan import planned_start

    if int(os.environ.get("RANK", "0")) > 0:
        return  # under a launcher one rank tells it
    ranks = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    try:
        options, files = Arguments(**arguments).read(ranks)
        going_on = partial(planned_start, resume=options) if options.wanted is not None else None
        show_plan(files, ranks, None, ranks_per_node, going_on)
    except MegalmError as error:
        sys.stderr.write(f"megalm: {error}\n")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    app()
