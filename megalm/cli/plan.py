"""`megalm plan` and `--dry-run`: what a run amounts to, with the origin of every value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from megalm.checkpoint.manifest import read_manifest, require_training_state
from megalm.cli.find_run import checkpoint_at
from megalm.cli.options import RANKS_PER_NODE, Config, DeepSpeedJson, ExtendSteps, Overrides, RanksPerNode
from megalm.cli.plan_text import plan_text
from megalm.config.precision import DeviceFacts
from megalm.errors import ConfigError
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.resolve import UNKNOWN_VOCAB_SIZE, ResolvedRun, expected_vocab_size, resolve
from megalm.planning.run_plan import Plan, draw_rates, make_plan
from megalm.runs.saved_config import ConfigFiles, read_settings
from megalm.train.datasets import known_vocab_size
from megalm.train.resume.compatibility import with_last_step, with_schedule
from megalm.train.run_summary import planned_data
from megalm.utils.atomic_files import refuse_overwriting_inputs

# From a run to what it will be after its checkpoint: its last step, and all its schedules.
GoingOn = Callable[[ResolvedRun], tuple[ResolvedRun, tuple[ScheduleSegment, ...]]]

_GIB = 2**30


def command(
    overrides: Overrides = None,
    config: Config = None,
    deepspeed_config: DeepSpeedJson = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="Ranks in all; default: a recipe's documented GPUs, else 1."),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory",
            min=0.1,
            max=1e6,
            help="Plan for GPUs of so many GiB with bf16; default: a recipe's documented ones, else this machine.",
        ),
    ] = None,
    ranks_per_node: RanksPerNode = RANKS_PER_NODE,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw the learning rate of every step."),
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(
            "--after", metavar="CHECKPOINT", help="The run goes on from there, or from a run folder's newest."
        ),
    ] = None,
    extend_steps: ExtendSteps = None,
) -> None:
    """What a run amounts to before it is started: size, tokens, memory, schedule. Nothing is started; --plot alone
    writes a file.

    \b
    megalm plan train.steps=1000
    megalm plan --config a100x4-300m --plot rate.png
    """
    if extend_steps is not None and after is None:
        raise ConfigError("--extend-steps: says nothing alone; name the checkpoint with --after")
    files = read_settings(config, overrides or [], deepspeed_config, resume=False, ranks=ranks or 1)
    documented = files.loaded.config.documented
    plan = planned(
        files,
        ranks or documented.devices or 1,
        gpu_memory or documented.device_memory_gib,
        ranks_per_node,
        None if after is None else partial(_after, after, extend_steps),
    )
    if plot is not None:
        refuse_overwriting_inputs([plot], [path for path in (config, files.deepspeed.path) if path is not None])
        draw_rates(plan.schedules, plot)
    typer.echo(plan_text(plan, ranks_per_node, *planned_data(plan.resolved)))
    if plot is not None:
        typer.echo(f"\nlearning rate of every step: {plot}")


def show_plan(
    files: ConfigFiles,
    ranks: int,
    gpu_memory: float | None,
    ranks_per_node: int,
    going_on: GoingOn | None = None,
) -> None:
    """Write the plan to the terminal."""
    plan = planned(files, ranks, gpu_memory, ranks_per_node, going_on)
    typer.echo(plan_text(plan, ranks_per_node, *planned_data(plan.resolved)))


def planned(
    files: ConfigFiles,
    ranks: int,
    gpu_memory: float | None,
    ranks_per_node: int,
    going_on: GoingOn | None = None,
) -> Plan:
    """The plan for so many ranks of GPUs of `gpu_memory` GiB; None: of this machine's device.

    Args:
        going_on: of a run that does; None: it starts at step 0.

    Raises:
        ConfigError, CheckpointError: what the run itself would be refused for, but for missing data.
    """
    vocab_size = known_vocab_size(files.loaded.config.data)
    ranks_per_node = min(ranks, ranks_per_node)
    device = _device(ranks_per_node, gpu_memory)
    resolved = resolve(files.loaded, files.deepspeed, ranks, device, vocab_size, ranks_per_node, data_needed=False)
    schedules: tuple[ScheduleSegment, ...] = ()
    if going_on is not None:
        resolved, schedules = going_on(resolved)
    expected = expected_vocab_size(resolved.config, vocab_size) or UNKNOWN_VOCAB_SIZE
    return make_plan(resolved, expected, schedules)


def _after(checkpoint: Path, more: int | None, run: ResolvedRun) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """The run as it goes on from a checkpoint, by `more` steps on a schedule of their own, or on what is stated."""
    folder = checkpoint_at(checkpoint)
    manifest = read_manifest(folder)
    require_training_state(folder, manifest)
    schedule = with_schedule(run, manifest, more)
    return with_last_step(run, schedule), schedule.segments


def _device(local_ranks: int, gpu_memory: float | None) -> DeviceFacts:
    if gpu_memory is not None:
        return DeviceFacts(kind="cuda", bf16=True, memory_bytes=int(gpu_memory * _GIB))
    try:
        from megalm.engine.device import device_facts  # imports torch, which a plan for a cluster does not need
    except ImportError as error:
        raise ConfigError(
            f"a plan for this machine asks torch for its device ({error}); "
            "plan for GPUs of so many GiB with --gpu-memory"
        ) from None
    return device_facts(local_ranks)
