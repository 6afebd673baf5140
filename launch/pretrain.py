"""Pretrain a language model: what `deepspeed`, `torchrun`, `srun` or a plain `python` starts on every rank.

Only parses; megalm.train.setup does the work. Flags are unlike the launchers' own, which they would swallow.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

# A checkout works without being installed, and beside another one that is. It is then no place for other imports.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import megalm  # noqa: F401

sys.path.pop(0)

import typer

from megalm.cli.options import (
    RANKS_PER_NODE,
    Config,
    DeepSpeedJson,
    ExtendSteps,
    ExtendStrategy,
    Gpu,
    Overrides,
    RanksPerNode,
    Resume,
    SkipSteps,
    Strategy,
    Verbose,
    expand_home,
)
from megalm.errors import MegalmError, message_of
from megalm.rank_environment import is_other_rank, launched_ranks, rank_in_messages
from megalm.utils.formatting import printable
from megalm.utils.process_setup import begin_under_launcher, code_for_launcher, keep_standard_streams, require_system

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Exit codes: 0 done, 1 failed, 2 refused configuration or input, 75 saved, to be started again.")
def main(
    overrides: Overrides = None,
    deepspeed_config: DeepSpeedJson = None,
    config: Config = None,
    resume: Resume = None,
    extend_steps: ExtendSteps = None,
    extend_strategy: ExtendStrategy = Strategy.schedule,
    skip_steps: SkipSteps = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan of the run, its memory and topology, and exit.")
    ] = False,
    world_size: Annotated[
        int,
        typer.Option(
            "--world-size",
            help="With --dry-run: the number of ranks to plan for; default: this job's.",
            show_default=False,
        ),
    ] = 0,
    ranks_per_node: RanksPerNode = RANKS_PER_NODE,
    gpu: Gpu = None,
    verbose: Verbose = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Pretrain a language model with DeepSpeed.

    Without arguments it builds a corpus from this Python's standard library, trains a tokenizer and a small
    model on it, validates, samples, saves checkpoints and tracks the run: minutes on two CPU cores.

    \b
    deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json
    deepspeed --num_gpus 2 launch/pretrain.py --deepspeed_config ds_configs/zero3.json train.steps=1000
    python launch/pretrain.py --deepspeed_config ds_configs/zero1.json --config my.yaml --dry-run
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
        _dry_run(arguments, world_size, ranks_per_node, gpu)
        return
    if gpu is not None:
        raise typer.BadParameter("only a plan takes it; add --dry-run", param_hint="--gpu")
    from megalm.engine.deepspeed_patches import (
        decompose_tanh,
        limit_openmp_spin,
        silence,
        use_expandable_segments,
    )

    limit_openmp_spin()  # this and the next three before torch is imported
    decompose_tanh()
    use_expandable_segments()
    if verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        silence()
    from megalm.runs.run_settings import Arguments
    from megalm.train.lifecycle.shutdown import RankSupervisor
    from megalm.train.setup import pretrain

    supervisor = RankSupervisor(rank=rank_in_messages())
    supervisor.run(lambda: pretrain(Arguments(**arguments), supervisor))


def _dry_run(arguments: dict[str, Any], world_size: int, ranks_per_node: int, gpu: str | None) -> None:
    """Print the plan of the run; for a resumed run, with its earlier schedules."""
    from megalm.cli.plan import own_device, planned_gpu, planned_run, show_plan
    from megalm.runs.run_settings import Arguments

    try:
        require_system()
        if is_other_rank():
            return  # only rank 0 prints
        ranks = world_size or launched_ranks()
        device = planned_gpu(gpu, None) or own_device(min(ranks, ranks_per_node))
        show_plan(planned_run(Arguments(**arguments), ranks, device, ranks_per_node), ranks_per_node)
    except MegalmError as error:
        sys.stderr.write(f"megalm: error: {printable(message_of(error))}\n")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    begin_under_launcher()
    keep_standard_streams()
    try:
        app(args=expand_home(sys.argv[1:]))
    except SystemExit as end:
        sys.exit(code_for_launcher(end.code) if isinstance(end.code, int) else end.code)
