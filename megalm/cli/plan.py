"""`megalm plan` and `--dry-run`: a run's plan, with the origin of every value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from megalm.checkpoint.manifest import read_manifest, require_training_state
from megalm.cli.find_run import checkpoint_at
from megalm.cli.options import RANKS_PER_NODE, Config, DeepSpeedJson, ExtendSteps, Overrides, RanksPerNode
from megalm.cli.plan_text import plan_text
from megalm.config.precision import DeviceFacts
from megalm.cost_model.gpu_specs import KNOWN_GPUS, data_sheet_memory
from megalm.errors import ConfigError
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.resolve import UNKNOWN_VOCAB_SIZE, ResolvedRun, expected_vocab_size, known_vocab_size, resolve
from megalm.planning.run_plan import Plan, draw_rates, make_plan
from megalm.runs.run_settings import ConfigFiles, read_settings
from megalm.train.resume.compatibility import with_last_step, with_schedule
from megalm.train.run_summary import planned_data
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.formatting import parse_bytes

# Turns a run into its continuation after a checkpoint: with its last step, and with all its schedules.
Continuation = Callable[[ResolvedRun], tuple[ResolvedRun, tuple[ScheduleSegment, ...]]]

_GIB = 2**30


def command(
    overrides: Overrides = None,
    config: Config = None,
    deepspeed_config: DeepSpeedJson = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="The number of ranks. Default: the recipe's documented GPUs, else 1."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="MODEL",
            help=f"Plan for these GPUs, also the time: {', '.join(KNOWN_GPUS)}. Default: the recipe's documented "
            "GPUs, else this machine.",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            help="Plan for GPUs with bf16 and this much memory: 80 (GiB), 80GiB or 80GB. Default: that of --gpu.",
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory", metavar="SIZE", help="The CPU memory of a node, for offload: 512 (GiB), 512GiB or 512GB."
        ),
    ] = None,
    ranks_per_node: RanksPerNode = RANKS_PER_NODE,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Plot the learning rate of every step."),
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(
            "--after", metavar="CHECKPOINT", help="Resume from this checkpoint, or from a run folder's newest."
        ),
    ] = None,
    extend_steps: ExtendSteps = None,
) -> None:
    """Show a run before it starts: size, tokens, memory, schedule. Starts nothing; only --plot writes a file.

    \b
    megalm plan --ranks 64 --gpu H100 model.hidden_size=2048 train.tokens_per_parameter=20
    megalm plan --config a100x4-300m --plot rate.png
    """
    if extend_steps is not None and after is None:
        raise ConfigError("--extend-steps needs a checkpoint; name it with --after")
    files = read_settings(config, overrides or [], deepspeed_config, resume=False, ranks=ranks or 1)
    documented = files.loaded.config.documented
    documented_memory = None if documented.device_memory_gib is None else int(documented.device_memory_gib * _GIB)
    bytes_given = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory", "GiB")
    ranks = ranks or documented.devices or 1
    plan = planned(
        files,
        ranks,
        _given_gpu(gpu, bytes_given, documented.device, documented_memory),
        ranks_per_node,
        None if host_memory is None else parse_bytes(host_memory, "--host-memory", "GiB"),
        None if after is None else partial(_after, after, extend_steps),
    )
    show_plan(plan, ranks_per_node)
    if plot is not None:
        draw_rates(plan.schedules, plot)
        typer.echo(f"\nlearning rate of every step: {plot}")


def show_plan(plan: Plan, ranks_per_node: int) -> None:
    typer.echo(plan_text(plan, ranks_per_node, *planned_data(plan.resolved)))


def planned(
    files: ConfigFiles,
    ranks: int,
    gpu: DeviceFacts | None,
    ranks_per_node: int,
    host_memory: int | None = None,
    continuation: Continuation | None = None,
) -> Plan:
    """Make the plan for a number of ranks.

    Args:
        gpu: of each rank; None: this machine's device.
        host_memory: bytes of a node's CPU memory; None: as the device says.
        continuation: of a run that resumes; None: the run starts at step 0.

    Raises:
        ConfigError, CheckpointError: the run itself would be refused; missing data is no reason here.
    """
    vocab_size = known_vocab_size(files.loaded.config.data)
    ranks_per_node = min(ranks, ranks_per_node)
    device = gpu or _this_device(ranks_per_node)
    if host_memory is not None and device.kind == "cuda":
        device = replace(device, host_memory_bytes=host_memory // ranks_per_node)
    resolved = resolve(files.loaded, files.deepspeed, ranks, device, vocab_size, ranks_per_node, data_needed=False)
    schedules: tuple[ScheduleSegment, ...] = ()
    if continuation is not None:
        resolved, schedules = continuation(resolved)
    expected = expected_vocab_size(resolved.config, vocab_size) or UNKNOWN_VOCAB_SIZE
    return make_plan(resolved, expected, schedules)


def _after(checkpoint: Path, more: int | None, run: ResolvedRun) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """The run resumed from a checkpoint, for `more` steps on a schedule of their own, or as configured."""
    folder = checkpoint_at(checkpoint)
    manifest = read_manifest(folder)
    require_training_state(folder, manifest)
    schedule = with_schedule(run, manifest, more)
    return with_last_step(run, schedule), schedule.segments


def _given_gpu(
    model: str | None, memory: int | None, documented: str | None, documented_memory: int | None
) -> DeviceFacts | None:
    """Return the GPU of the options, else the recipe's; None: neither says any.

    Raises:
        ConfigError: no such model is known.
    """
    if model is not None:
        known = data_sheet_memory(model)
        if known is None:
            raise ConfigError(
                f"--gpu {model}: no such GPU is known{did_you_mean(model, KNOWN_GPUS)}; use "
                f"--gpu-memory alone, or one of {', '.join(KNOWN_GPUS)}"
            )
        return DeviceFacts("cuda", True, memory or known, name=model)
    if memory is not None:
        return DeviceFacts("cuda", True, memory)
    return None if documented_memory is None else DeviceFacts("cuda", True, documented_memory, name=documented)


def _this_device(local_ranks: int) -> DeviceFacts:
    try:
        from megalm.engine.device import device_facts  # imports torch, which a plan with --gpu does not need
    except ImportError as error:
        raise ConfigError(
            f"a plan for this machine needs torch ({error}); plan for other GPUs with --gpu or --gpu-memory"
        ) from None
    return device_facts(local_ranks)
