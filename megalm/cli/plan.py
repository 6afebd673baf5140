"""`megalm plan` and `--dry-run`: a run's plan, with the origin of every value."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.checkpoint.manifest import read_manifest, require_training_state
from megalm.cli.find_run import checkpoint_at, find_run
from megalm.cli.options import RANKS_PER_NODE, Config, DeepSpeedJson, ExtendSteps, Gpu, Overrides, RanksPerNode
from megalm.cli.plan_text import fit_text, plan_text
from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.config.loading import parse_override
from megalm.config.schema import DocumentedSection
from megalm.cost_model.gpu_specs import data_sheet_peak, gpu_by_name, known_gpus
from megalm.errors import EXIT_FAILED, ConfigError
from megalm.planning.largest_model import FitRequest, free_stem, largest_model, refuse_existing
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.resolve import UNKNOWN_VOCAB_SIZE, ResolvedRun, expected_vocab_size, known_vocab_size, resolve
from megalm.planning.run_plan import ASSUMED_RATE, Plan, Rate, draw_rates, make_plan
from megalm.runs.run_settings import Arguments, ConfigFiles, read_settings
from megalm.tracking.compare_runs import read_run, results
from megalm.train.resume.compatibility import grid_notes, with_last_step, with_schedule
from megalm.train.run_summary import planned_data
from megalm.utils.atomic_files import refuse_overwriting_inputs, writing_to
from megalm.utils.formatting import parse_bytes
from megalm.utils.progress import ProgressBar, percent
from megalm.utils.terminal import echo

if TYPE_CHECKING:
    from megalm.data.sampling.samples import Samples

# Turns a run into its continuation after a checkpoint: with its last step, and with all its schedules.
Continuation = Callable[[ResolvedRun], tuple[ResolvedRun, tuple[ScheduleSegment, ...]]]

_GIB = 2**30


def command(
    overrides: Overrides = None,
    config: Config = None,
    deepspeed_config: DeepSpeedJson = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks", "--gpus", min=1, help="The number of ranks. Default: the recipe's documented GPUs, else 1."
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
    gpu: Gpu = None,
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
    mfu: Annotated[
        str | None,
        typer.Option("--mfu", metavar="SHARE", help="The share of the GPUs' peak that the run reaches, such as 0.35."),
    ] = None,
    rate_of: Annotated[
        str | None,
        typer.Option("--rate-of", metavar="RUN", help="Plan with the speed that this run has measured."),
    ] = None,
    every_key: Annotated[
        bool, typer.Option("--all", help="Show every key of the configuration, defaults and the preset's too.")
    ] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Find the largest model that fits the GPUs and ends in time, and write its files."),
    ] = False,
    days: Annotated[float | None, typer.Option("--days", help="With --fit: the time that training may take.")] = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option("--tokens-per-parameter", help="With --fit: how long to train. Default: 20.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", metavar="NAME", help="With --fit: write NAME.yaml and NAME.json. Default: by size and GPU."
        ),
    ] = None,
    coordinate_check: Annotated[
        bool,
        typer.Option(
            "--coordinate-check",
            help="Train a small model with the run's settings at four widths on this CPU, and say whether activations "
            "and their changes depend on the width (model.mup_base_width); --plot: default coordinate-check.png.",
        ),
    ] = False,
) -> None:
    """Show a run before it starts: size, tokens, memory, schedule. It starts no run; only --plot, --fit and
    --coordinate-check write files.

    \b
    megalm plan --ranks 64 --gpu H100 model.hidden_size=2048 train.tokens_per_parameter=20
    megalm plan --config a100x4-300m --plot rate.png
    megalm plan --fit --gpu rtx-5090 --days 7
    megalm plan --coordinate-check model.mup_base_width=256
    """
    if coordinate_check:
        _refuse_options("--coordinate-check", {"--fit": fit or None, "--after": after, "--extend-steps": extend_steps})
    if fit:
        unused = {"--config": config, "--deepspeed_config": deepspeed_config, "--plot": plot, "--after": after}
        _refuse_options("--fit", {**unused, "--extend-steps": extend_steps})
    else:
        _refuse_options(None, {"--days": days, "--tokens-per-parameter": tokens_per_parameter, "--write": write})
    if extend_steps is not None and after is None:
        raise ConfigError("--extend-steps needs a checkpoint; name it with --after")
    device = planned_gpu(gpu, None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory", "GiB"))
    if fit:
        if device is None or gpu is None:
            raise ConfigError(f"--fit needs the GPU: add --gpu NAME; known: {', '.join(known_gpus())}")
        ranks = ranks or 1
        request = FitRequest(
            _with_host_memory(device, host_memory, min(ranks, ranks_per_node)),
            ranks,
            ranks_per_node,
            24 * _positive("--days", days),
            _positive("--tokens-per-parameter", 20.0 if tokens_per_parameter is None else tokens_per_parameter),
            _rate(mfu, rate_of, device),
            {key: value for override in overrides or [] for key, value in parse_override(override)},
        )
        options = {"--gpu-memory": gpu_memory, "--host-memory": host_memory, "--mfu": mfu, "--rate-of": rate_of}
        words = [word for name, value in options.items() if value is not None for word in (name, value)]
        _fit(request, write, every_key, [*words, *(overrides or [])])
        return
    files = read_settings(config, overrides or [], deepspeed_config, resume=False, ranks=ranks or 1)
    documented = files.loaded.config.documented
    ranks = ranks or documented.devices or 1
    per_node = min(ranks, ranks_per_node)
    device = device or _documented_gpu(documented) or own_device(per_node)
    device = _with_host_memory(device, host_memory, per_node)
    continuation = None if after is None else partial(_after, after, extend_steps)
    plan = planned(files, ranks, device, ranks_per_node, continuation)
    if coordinate_check:
        plot = plot or Path("coordinate-check.png")
        refuse_overwriting_inputs([plot], [path for path in (config, files.deepspeed.path) if path is not None])
        _check_coordinates(plan, plot)
        return
    plan = replace(plan, rate=_rate(mfu, rate_of, plan.resolved.device))
    show_plan(plan, ranks_per_node, every_key)
    if plot is not None:
        refuse_overwriting_inputs([plot], [path for path in (config, files.deepspeed.path) if path is not None])
        draw_rates(plan.schedules, plot)
        echo(f"\nlearning rate of every step: {plot}")


def _with_host_memory(device: DeviceFacts, host_memory: str | None, per_node: int) -> DeviceFacts:
    """The device with its share of a node's CPU memory, if that is given."""
    if host_memory is None:
        return device
    node = parse_bytes(host_memory, "--host-memory", "GiB")
    if device.kind == "cpu":
        raise ConfigError(f"--host-memory {host_memory} is for a plan of GPUs; add --gpu NAME or --gpu-memory SIZE")
    return replace(device, host_memory_bytes=node // per_node)


def _refuse_options(flag: str | None, options: dict[str, object]) -> None:
    """Refuse options that only a plan without `--fit` takes, or only one with it (`flag` is None)."""
    given = [name for name, value in options.items() if value is not None]
    if given and flag is None:
        raise ConfigError(f"{', '.join(given)}: only --fit takes it; add --fit")
    if given:
        raise ConfigError(f"{flag} takes no {', '.join(given)}: it makes a run of its own")


def _positive(option: str, value: float | None) -> float:
    if value is None or not 0 < value < math.inf:
        given = "" if value is None else f" {value:g}"
        raise ConfigError(f"{option}{given}: --fit needs a number above 0, such as {option} 7")
    return value


def _fit(request: FitRequest, write: Path | None, every_key: bool, words: list[str]) -> None:
    """Search, write both files, and show the plan that they give.

    Args:
        words: of the command line, beside the request's.

    Raises:
        ConfigError: nothing fits, or a file of `write` exists.
    """
    if write is not None:
        write = write.with_suffix("") if write.suffix in (".yaml", ".json") else write
        refuse_existing(write)
    found = largest_model(request)
    stem = write or free_stem(Path(found.name))
    gpu, ranks, days = str(request.device.name), request.ranks, request.hours / 24
    length = ["--days", f"{days:g}", "--tokens-per-parameter", f"{request.tokens_per_parameter:g}"]
    made_by = shlex.join(["megalm", "plan", "--fit", "--gpu", gpu, "--gpus", str(ranks), *length, *words])
    with writing_to(stem):
        yaml_file, json_file = found.write(stem, made_by)
    files = read_settings(str(yaml_file), [], str(json_file), resume=False, ranks=ranks)
    plan = replace(planned(files, ranks, request.device, request.ranks_per_node), rate=request.rate)
    echo(fit_text(plan, found.limit))
    echo(f"\nfiles  {yaml_file}, {json_file}")
    echo(f"start  launch/pretrain.py --config {yaml_file} --deepspeed_config {json_file} data.train=PREFIX ...\n")
    show_plan(plan, request.ranks_per_node, every_key)


def _check_coordinates(plan: Plan, plot: Path) -> None:
    """Show the check and draw it.

    Raises:
        Exit: with 1, if an activation depends on the width.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's own detection warns about missing devices
    from megalm.parity.coordinate_check import LENGTH, check_coordinates  # imports torch
    from megalm.parity.miniature import VOCABULARY
    from megalm.parity.miniature_training import SyntheticSamples
    from megalm.train.datasets import find_data, open_data

    run, data = plan.resolved, plan.resolved.config.data
    if data.train is None:
        given: tuple[Samples, int, str] = SyntheticSamples(LENGTH, False), VOCABULARY, "synthetic tokens"
    else:
        given = open_data(run, find_data(data, echo)).train, plan.shape.vocab_size, "data.train"
    with ProgressBar("coordinate check", 1.0, shown=percent) as bar:
        check = check_coordinates(run, *given[:2], advance=bar.advance)
    check.draw(plot)
    rate = run.schedule.peak_learning_rate
    echo(f"{check.setting}, at learning rate {rate:g}, {run.optimizer}, {given[2]}\n\n{check.text()}\n\nplot: {plot}\n")
    if not check.failures:
        echo("holds: sizes and changes do not depend on the width, so learning rate and initial weights transfer")
        return
    found = ", ".join(f"{it.name} ({it.slope:+.2f})" for it in check.failures)
    echo(f"does not hold: depends on the width: {found}")
    if run.config.model.mup_base_width is None:
        echo("model.mup_base_width is not set: set it to the hidden_size at which the learning rate was chosen")
    raise typer.Exit(EXIT_FAILED)


def show_plan(plan: Plan, ranks_per_node: int, every_key: bool = True) -> None:
    echo(plan_text(plan, ranks_per_node, *planned_data(plan.resolved), every_key))


def _rate(mfu: str | None, rate_of: str | None, device: DeviceFacts) -> Rate:
    """The speed by --mfu or --rate-of; without both the assumed one.

    Raises:
        ConfigError: both are given, `mfu` is no share, or the run has no rate for this device.
    """
    if mfu is not None and rate_of is not None:
        raise ConfigError("--mfu and --rate-of both give the rate; keep one")
    if rate_of is not None:
        return measured_rate(find_run(rate_of), device)
    if mfu is None:
        return ASSUMED_RATE
    try:
        share = float(mfu[:-1]) / 100 if mfu.endswith("%") else float(mfu)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ConfigError(f"--mfu {mfu}: not a share of the peak; write 0.35 or 35%")
    if device.name is None:
        raise ConfigError(f"--mfu {mfu} is a share of a GPU's peak; name the GPU with --gpu NAME")
    return Rate(share, "--mfu")


def planned_run(
    arguments: Arguments, ranks: int, device: DeviceFacts, ranks_per_node: int, data_needed: bool = False
) -> Plan:
    """Make the plan of a start of launch/pretrain.py; of one that resumes with its earlier schedules.

    Raises:
        MegalmError: the start would be refused; for missing data if `data_needed`.
    """
    from megalm.train.resume.resume_plan import planned_start  # imports torch
    from megalm.train.run_copies import check_copies

    options, files = arguments.read(ranks, device, data_needed)
    check_copies(files.loaded.config, options)
    resumed = partial(planned_start, resume=options) if options.wanted is not None else None
    return planned(files, ranks, device, ranks_per_node, resumed, data_needed)


def planned(
    files: ConfigFiles,
    ranks: int,
    device: DeviceFacts | None,
    ranks_per_node: int,
    continuation: Continuation | None = None,
    data_needed: bool = False,
) -> Plan:
    """Make the plan for a number of ranks.

    Args:
        device: of each rank; None: this machine's.
        continuation: of a run that resumes; None: the run starts at step 0.
        data_needed: whether to refuse a run without data.

    Raises:
        ConfigError, CheckpointError: the run itself would be refused.
    """
    vocab_size = known_vocab_size(files.loaded.config.data)
    ranks_per_node = min(ranks, ranks_per_node)
    device = device or own_device(ranks_per_node)
    resolved = resolve(files.loaded, files.deepspeed, ranks, device, vocab_size, ranks_per_node, data_needed)
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
    run = replace(run, notices=(*run.notices, *grid_notes(manifest, run)))
    return with_last_step(run, schedule), schedule.segments


def planned_gpu(name: str | None, memory_bytes: int | None) -> DeviceFacts | None:
    """Return the GPU of a plan by its name, its memory or both; None without both.

    Raises:
        ConfigError: no such GPU.
    """
    if name is None and memory_bytes is None:
        return None
    gpu = DeviceFacts(kind="cuda", bf16=True, memory_bytes=0, float8=True) if name is None else gpu_by_name(name)
    return gpu if memory_bytes is None else replace(gpu, memory_bytes=memory_bytes)


def _documented_gpu(documented: DocumentedSection) -> DeviceFacts | None:
    gib = documented.device_memory_gib
    gpu = planned_gpu(None, None if gib is None else int(gib * _GIB))
    return None if gpu is None else replace(gpu, name=documented.device)


def own_device(local_ranks: int) -> DeviceFacts:
    """Return the device of each of the local ranks on this machine.

    Raises:
        ConfigError: torch is not installed.
    """
    try:
        from megalm.engine.device import device_facts  # imports torch, which a plan with --gpu-memory does not need
    except ImportError as error:
        raise ConfigError(
            f"a plan for this machine needs torch ({error}); plan for other GPUs with --gpu NAME or --gpu-memory SIZE"
        ) from None
    return device_facts(local_ranks)


def measured_rate(folder: Path, device: DeviceFacts) -> Rate:
    """Return the median speed of a run's steps: as MFU between GPUs with data sheets, else for the same device alone.

    Raises:
        ConfigError: the run has no measured speed, or another device without a data sheet.
        DataError: its metrics cannot be read.
    """
    run = read_run(folder)
    found, facts = results(run), run.environment
    flops, ranks = facts.get("flops_per_token"), facts.get("world_size")
    if not found.tokens_per_second or not isinstance(flops, int) or not isinstance(ranks, int):
        raise ConfigError(f"--rate-of {folder}: the run has not measured its speed; name a run that has trained steps")
    origin = f"the median of {folder}"
    theirs = str(facts.get("device"))
    if found.mfu and data_sheet_peak(theirs, low_precision=True) and data_sheet_peak(device.name or "", True):
        return Rate(found.mfu, origin)
    is_same = device.kind == "cpu" == facts.get("device_kind") or device.name == theirs
    if not is_same:
        here = device.name or device.kind
        raise ConfigError(
            f"--rate-of {folder}: its speed on {theirs} does not carry over to {here}: only between GPUs with a data "
            "sheet does it; state a share of the peak with --mfu"
        )
    return Rate(found.mfu or 0.0, origin, flops=found.tokens_per_second * flops / ranks)
