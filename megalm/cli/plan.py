"""`megalm plan` and `--dry-run`: what a run amounts to, with the origin of every value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from megalm.checkpoint.layout import followed
from megalm.checkpoint.manifest import read_manifest
from megalm.cli import show
from megalm.cli.grid import grid_text
from megalm.config.checks_data import what_data_to_bring
from megalm.config.deepspeed_json import DeepSpeedConfig
from megalm.config.loading import LoadedConfig, spelling
from megalm.config.precision import DeviceFacts
from megalm.config.resolve import UNKNOWN_VOCAB_SIZE, ResolvedRun, expected_vocab_size, resolve
from megalm.config.schema import RunConfig
from megalm.config.strict import leaf_fields, shown
from megalm.errors import ConfigError
from megalm.estimate.memory import MemoryPlan
from megalm.planning.documented import changed_keys, judge, tolerances
from megalm.planning.plan import Plan, checkpoint_bytes, make_plan
from megalm.planning.rate_picture import draw_rates
from megalm.train.continuing import with_last_step, with_schedule
from megalm.train.data_facts import planned_data
from megalm.train.own_config import read_settings
from megalm.train.position import Position
from megalm.train.schedule import ScheduleSegment

# From a run to what it will be after its checkpoint: its last step, and all its schedules.
GoingOn = Callable[[ResolvedRun], tuple[ResolvedRun, tuple[ScheduleSegment, ...]]]

_GIB = 2**30
RANKS_PER_NODE = 8  # where a launcher has not said how many there are


def command(
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the run YAML."),
    ] = None,
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--config", help="A preset's name or a YAML file; default quickstart."),
    ] = None,
    deepspeed_config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--deepspeed_config", help="The DeepSpeed JSON; default: a recipe's own, else ds_configs/zero2.json."
        ),
    ] = None,
    ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--ranks", min=1, help="Ranks in all; default: a recipe's documented GPUs, else 1."),
    ] = None,
    gpu_memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--gpu-memory",
            min=0.1,
            max=1e6,
            help="Plan for GPUs of so many GiB with bf16; default: a recipe's documented ones, else this machine.",
        ),
    ] = None,
    ranks_per_node: Annotated[
        int, typer.Option("--ranks-per-node", min=1, help="Consecutive ranks that share a node.")
    ] = RANKS_PER_NODE,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plot", metavar="FILE.png", help="Draw the learning rate of every step."),
    ] = None,
    after: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--after", metavar="CHECKPOINT", help="Of a run that goes on from there: with past schedules."),
    ] = None,
    extend_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--extend-steps", min=1, help="With --after: so many steps more, on a schedule of their own."),
    ] = None,
) -> None:
    """What a run amounts to before it is started: size, tokens, memory, schedule. Nothing is started; --plot alone
    writes a file.

    \b
    megalm plan train.steps=1000
    megalm plan --config a100x4-300m --plot rate.png
    """
    if extend_steps is not None and after is None:
        raise ConfigError("--extend-steps: says nothing alone; name the checkpoint with --after")
    loaded, deepspeed = read_settings(config, overrides or [], deepspeed_config, resume=False, ranks=ranks or 1)
    documented = loaded.config.documented
    plan = planned(
        loaded,
        deepspeed,
        ranks or documented.devices or 1,
        gpu_memory or documented.device_memory_gib,
        ranks_per_node,
        None if after is None else partial(_after, after, extend_steps),
    )
    if plot is not None:
        draw_rates(plan.schedules, plot)
    typer.echo(plan_text(plan, ranks_per_node, *planned_data(plan.resolved)))
    if plot is not None:
        typer.echo(f"\nlearning rate of every step: {plot}")


def show_plan(
    loaded: LoadedConfig,
    deepspeed: DeepSpeedConfig,
    ranks: int,
    gpu_memory: float | None,
    ranks_per_node: int,
    going_on: GoingOn | None = None,
) -> None:
    """Write the plan to the terminal."""
    plan = planned(loaded, deepspeed, ranks, gpu_memory, ranks_per_node, going_on)
    typer.echo(plan_text(plan, ranks_per_node, *planned_data(plan.resolved)))


def planned(
    loaded: LoadedConfig,
    deepspeed: DeepSpeedConfig,
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
    vocab_size = _vocab_size(loaded.config)
    ranks_per_node = min(ranks, ranks_per_node)
    device = _device(ranks_per_node, gpu_memory)
    resolved = resolve(loaded, deepspeed, ranks, device, vocab_size, ranks_per_node, data_needed=False)
    schedules: tuple[ScheduleSegment, ...] = ()
    if going_on is not None:
        resolved, schedules = going_on(resolved)
    expected = expected_vocab_size(resolved.config, vocab_size) or UNKNOWN_VOCAB_SIZE
    return make_plan(resolved, expected, schedules)


def _after(checkpoint: Path, more: int | None, run: ResolvedRun) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """The run as it goes on from a checkpoint, by `more` steps on a schedule of their own, or on what is stated."""
    position = Position()
    with_schedule(position, run, read_manifest(followed(checkpoint)), more)
    return with_last_step(run, position), position.schedule


def plan_text(
    plan: Plan, ranks_per_node: int, data_rows: Sequence[tuple[str, str]] = (), warnings: Sequence[str] = ()
) -> str:
    """The whole plan as text for a terminal or a pipe.

    Args:
        data_rows, warnings: what `planned_data` says.
    """
    sections = {
        "Configuration": _configuration(plan),
        "DeepSpeed": _deepspeed(plan),
        "Ranks": grid_text(plan.resolved, plan.shape, ranks_per_node),
        "Parameters": _parameters(plan),
        "Tokens and work": _tokens(plan),
        "Data": "\n".join(text for _, text in data_rows) or _no_data(plan),
        "Memory of one rank (estimate)": _memory(plan),
        "Learning rate": _learning_rate(plan),
        **({"Documented against computed": _documented(plan)} if plan.resolved.config.documented.claims else {}),
        "Notices": "\n".join(
            [*plan.resolved.notices, *(f"WARNING: {text}" for text in (*_memory_warnings(plan), *warnings))]
        )
        or "none",
    }
    width = show.terminal_width()
    return "\n\n".join(f"{title}\n{show.wrapped(text, width)}" for title, text in sections.items())


def _configuration(plan: Plan) -> str:
    values = plan.resolved.config.model_dump(mode="json")
    rows = []
    for key in leaf_fields(RunConfig):
        if key.startswith("documented."):
            continue  # no setting: it has a table of its own
        value: Any = values
        for part in key.split("."):
            value = value[part]
        if value is not None or plan.resolved.sources[key] != "default":
            rows.append([spelling(key), shown(value), plan.resolved.sources[key]])
    return show.table(["key", "value", "from"], rows)


def _deepspeed(plan: Plan) -> str:
    run = plan.resolved
    optimizer, zero = run.optimizer, run.deepspeed_source.settings.zero_optimization
    offloads = [
        f"{what} to {section.device}"
        for what, section in (("optimizer", zero.offload_optimizer), ("parameters", zero.offload_param))
        if section is not None and section.device != "none"
    ]
    return show.table(
        ["fact", "value"],
        [
            ["file", run.deepspeed_source.path],
            ["global batch", f"{run.batch.global_batch} sequences a step"],
            ["micro-batch x accumulation x data ranks", " x ".join(map(str, _triple(plan)))],
            ["precision", run.precision],
            ["ZeRO stage", zero.stage],
            ["offload", ", ".join(offloads) or "none"],
            ["gradient clipping", run.deepspeed["gradient_clipping"] or "off"],
            [
                "optimizer",
                f"{optimizer.kind}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
                f"eps {optimizer.epsilon:g}, weight decay {optimizer.weight_decay:g}",
            ],
        ],
    )


def _triple(plan: Plan) -> tuple[int, int, int]:
    batch = plan.resolved.batch
    return batch.micro_batch, batch.accumulation, batch.data_parallel


def _parameters(plan: Plan) -> str:
    total = plan.parameter_count
    rows: list[list[object]] = [[part, f"{count:,}", f"{count / total:.1%}"] for part, count in plan.parameters.items()]
    return show.table(["part", "parameters", "share"], [*rows, ["total", f"{total:,}", ""]])


def _tokens(plan: Plan) -> str:
    run = plan.resolved
    return show.table(
        ["fact", "value"],
        [
            ["tokens a step", f"{run.tokens_per_step:,}"],
            ["steps", f"{run.config.train.steps:,}"],
            ["tokens in all", f"{plan.total_tokens:,}"],
            ["tokens a parameter", f"{plan.tokens_per_parameter:.2f}"],
            ["FLOPs a token", f"{plan.flops_per_token:.3e}"],
            ["FLOPs in all", f"{plan.total_flops:.3e}"],
            ["a checkpoint", show.size(checkpoint_bytes(plan.shape))],
        ],
    )


def _memory(plan: Plan) -> str:
    """Parts by stage where there are several kinds of stages, the fullest one marked."""
    stages = plan.memory_by_stage
    headings = ["part", *(_stage_words(plan, stage) for stage in stages)] if len(stages) > 1 else ["part", "size"]
    parts: list[list[object]] = [
        [part, *(show.size(stage.parts()[part]) for stage in stages)] for part in stages[0].parts()
    ]
    offloaded: list[list[object]] = [
        [f"{part} (CPU memory)", *(show.size(stage.host[part]) for stage in stages)]
        for part, count in stages[0].host.items()
        if count
    ]
    if any(stage.disk for stage in stages):
        offloaded.append(["optimizer states (NVMe)", *(show.size(stage.disk) for stage in stages)])
    total = ["total", *(show.size(stage.total) for stage in stages)]
    available = ["available", show.size(plan.resolved.device.memory_bytes), *[""] * (len(stages) - 1)]
    return show.table(headings, [*parts, *offloaded, total, available])


def _memory_warnings(plan: Plan) -> list[str]:
    needed, available = plan.memory.total, plan.resolved.device.memory_bytes
    if needed <= available:
        return []
    return [
        f"does not fit by the estimate: a rank needs {show.size(needed)} of {show.size(available)}; smaller "
        "micro-batches, train.checkpoint_activations_every=1, a higher ZeRO stage or offload need less"
    ]


def _no_data(plan: Plan) -> str:
    if plan.resolved.config.data.recipe is not None:
        return "unknown before the run prepares it"
    return f"none yet, and a run needs it: {what_data_to_bring(plan.resolved.config)}"


def _learning_rate(plan: Plan) -> str:
    rows = show.table(["step", "rate"], [[step, f"{rate:.3e}"] for step, rate in plan.learning_rates])
    return "\n".join([*map(str, plan.schedules), rows])


def _documented(plan: Plan) -> str:
    judgements = judge(plan)
    rows = [[it.claim, it.computed, it.verdict] for it in judgements]
    refuted = sum(it.refuted for it in judgements)
    lines = [show.table(["documented", "computed", "verdict"], rows)]
    lines.append(f"{refuted} of {len(judgements)} claims do not hold. {tolerances()}")
    others = changed_keys(plan)
    if others:
        lines.append(f"computed for this run, not for the document's: {', '.join(others)} stated otherwise")
    return "\n".join(lines)


def _stage_words(plan: Plan, stage: MemoryPlan) -> str:
    return f"stage {stage.stage}, the fullest" if stage is plan.memory else f"stage {stage.stage}"


def _device(local_ranks: int, gpu_memory: float | None) -> DeviceFacts:
    if gpu_memory is not None:
        return DeviceFacts(kind="cuda", bf16=True, memory_bytes=int(gpu_memory * _GIB))
    from megalm.engine.environment import device_facts  # imports torch, which a plan for a cluster does not need

    return device_facts(local_ranks)


def _vocab_size(config: RunConfig) -> int | None:
    """The tokenizer's vocabulary, where there is a tokenizer already."""
    tokenizer = config.data.tokenizer
    if tokenizer is None or (tokenizer != "bytes" and not Path(tokenizer).exists()):
        return None  # the checks say what is missing, better than a reader would
    from megalm.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer).vocab_size
