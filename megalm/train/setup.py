"""Assembly: from arguments to a running loop. The one place that knows the concrete classes of all parts.

Order matters: everything that can be refused is refused before a process group exists; the run folder comes first
after it, so that a failure has a place to be told.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megalm.engine.build import build_engine
from megalm.engine.device import claim_device, device_facts, device_name, peak_flops, rank_facts
from megalm.engine.distributed import DistributedCommunicator, start_distributed
from megalm.engine.interface import Engine
from megalm.errors import EXIT_DONE
from megalm.model.flops import flops_per_token
from megalm.planning.checks.run_checks import wall_time_seconds
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.runs.metrics_log import MetricsWriter, read_metrics
from megalm.runs.resume_command import ResumeCommand
from megalm.runs.run_folder import RunFolder, write_facts
from megalm.runs.saved_config import config_changes, read_settings
from megalm.tracking.mlflow_mirror.mirror_process import MirrorHandle, start_mirror
from megalm.train.console import RunConsole
from megalm.train.datasets import batch_loader, find_data, known_vocab_size, rebuild_data, validation_loaders
from megalm.train.evaluator import Evaluator
from megalm.train.lifecycle.launcher_watch import watch_launchers
from megalm.train.lifecycle.open_run import OpenRun, open_run
from megalm.train.lifecycle.shutdown import RankSupervisor, StopRequest
from megalm.train.lifecycle.time_limits import TimeLimits, Watchdog, process_start
from megalm.train.preflight import memory_errors_named, run_preflight
from megalm.train.resume.resume_plan import ResumePlan, find_resume_checkpoint, plan_last_step, plan_resume
from megalm.train.resume.resume_request import ResumeOptions, describe_attempt, write_attempt
from megalm.train.run_checkpointer import RunCheckpointer
from megalm.train.run_summary import (
    data_warnings,
    environment_facts,
    final_summary,
    opening_facts,
    pipeline_facts,
    scale_facts,
    write_report_page,
)
from megalm.train.spikes.spike_guard import SpikeGuard
from megalm.train.spikes.spike_report import SpikeReportWriter, sample_text_reader
from megalm.train.text_samples import SampleWriter
from megalm.train.trainer import Trainer, TrainerComponents

# MLflow's first use of a store makes its tables; a run that ends sooner waits this long for its mirror.
_MIRROR_PATIENCE_SECONDS = 45.0


@dataclass(frozen=True)
class Arguments:
    """What a person may say on the command line of launch/pretrain.py.

    Attributes:
        deepspeed_config: None: the run's own where one goes on, else zero2.json.
    """

    deepspeed_config: str | None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    extend_steps: int | None = None
    extend_strategy: Literal["schedule", "weights"] = "schedule"
    skip_steps: int = 0


def resolve_run(arguments: Arguments, world_size: int, local_world_size: int) -> ResolvedRun:
    """Read and check both configurations for so many ranks of this machine's device; no process group.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
        DataError: a tokenizer that cannot be read.
    """
    overrides = arguments.overrides
    if arguments.extend_steps is not None and arguments.extend_strategy == "weights":
        overrides = (*overrides, f"train.steps={arguments.extend_steps}")  # a run of its own, from step 0
    loaded, deepspeed = read_settings(
        arguments.config, overrides, arguments.deepspeed_config, arguments.resume is not None, world_size
    )
    vocab_size = known_vocab_size(loaded.config.data)
    return resolve(loaded, deepspeed, world_size, device_facts(local_world_size), vocab_size, local_world_size)


def pretrain(arguments: Arguments, guard: RankSupervisor) -> int:
    """Run one training job on this rank; the exit code."""
    ranks = rank_facts()
    resume = ResumeOptions.stated(
        arguments.resume, arguments.extend_steps, arguments.extend_strategy, arguments.skip_steps
    )
    run = resolve_run(arguments, ranks.world_size, ranks.local_world_size)
    device = claim_device(ranks)
    comm = start_distributed(ranks, device)
    opened = open_run(run, arguments.resume is not None, comm, guard)
    folder, reporter = opened.folder, opened.reporter
    course = _course(run, folder, resume, comm, reporter)
    run, data, shape = course.run, course.data, course.shape
    checkpoints = _checkpoints(course, folder, opened.attempt, comm)
    threads = torch.get_num_threads()
    account = environment_facts(run, course.identity, device_name(), device.type, threads, opened.attempt)
    comm.once(lambda: write_facts(folder, run, {**account, **scale_facts(run, shape, data)}))
    guard.began()
    peak, peak_source = peak_flops(device, run.precision != "fp32")  # before the mirror, which takes a core for seconds
    metrics = MetricsWriter(folder.metrics) if comm.is_main else None
    mirror = start_mirror(folder.path) if comm.is_main and run.config.tracking.mlflow else None
    if metrics is not None:
        guard.on_failure = _record_failure(metrics)

    if run.deepspeed["zero_optimization"].get("offload_optimizer"):
        reporter.info("preparing DeepSpeed's extensions for offload (compiled at their first use: a minute or two)")
    engine = build_engine(run, shape, device, comm, lambda *stages: reporter.info(pipeline_facts(run, *stages)))
    limits = _limits(run, guard, folder, comm)
    invocation = ResumeCommand(folder.path, ranks.local_world_size)
    incidents = SpikeReportWriter(
        folder.incidents,
        sample_text_reader(data.train, data.tokenizer),
        invocation,
        comm,
        reporter,
    )
    parts = _assemble(
        course, comm, engine, folder, checkpoints, metrics, reporter, limits, incidents, comm.sum([peak])[0]
    )
    reporter.facts(opening_facts(run, shape, data, device_name(), ranks.threads, peak_source, parts.peak_flops))
    if run.config.train.rehearse:
        run_preflight(parts)
    _restore(course, parts, folder)
    position = course.position
    position.attempt = opened.attempt
    loop = Trainer(parts, position)
    _announce(loop, reporter, course)
    parts.stop.install()
    watch_launchers()
    with memory_errors_named("training"):
        code = loop.fit() if position.step < run.config.train.steps else _nothing_to_do(loop, reporter)
    parts.close()
    comm.barrier()  # no rank leaves while another still needs rank 0's store
    page = _close(metrics, mirror, opened, with_page=code == EXIT_DONE)
    if code == EXIT_DONE:
        reporter.info(final_summary(folder, run, invocation, page))
    return code


def _course(
    run: ResolvedRun, folder: RunFolder, resume: ResumeOptions, comm: DistributedCommunicator, reporter: RunConsole
) -> ResumePlan:
    """What is trained on from where; everything that cannot go on is refused here."""
    found, resume = find_resume_checkpoint(folder, resume, comm, reporter.info)
    run, scheduled = plan_last_step(run, found, resume)
    places = comm.once_per_node(lambda: find_data(run.config.data, reporter.info))
    comm.once(lambda: rebuild_data(run.config.data, places, len(os.sched_getaffinity(0)), reporter.info))
    course = plan_resume(run, scheduled, places, found, resume)
    own = comm.once(lambda: config_changes(folder, course.run))
    for note in (*own, *course.notes):
        reporter.info(f"  note: {note}")
    for warning in (*course.warnings, *data_warnings(run, course.data)):
        reporter.info(f"  WARNING: {warning}")
    return course


def _checkpoints(course: ResumePlan, folder: RunFolder, attempt: int, comm: DistributedCommunicator) -> RunCheckpointer:
    """What is gone on from is noted before anything of this attempt is written."""
    request = None if course.reader is None else describe_attempt(course.reader, course.resume, attempt)
    if request is not None:
        comm.once(lambda: write_attempt(folder, request))
    return RunCheckpointer(folder, course.run, course.shape, course.identity, course.data.tokenizer.spec, comm, request)


def _restore(course: ResumePlan, parts: TrainerComponents, folder: RunFolder) -> None:
    """Put the checkpoint into the engine, and what the run was like before it into the guard."""
    reader, engine = course.reader, parts.engine
    if reader is None:
        return
    step = 0 if course.weights_only else reader.manifest.step
    read = reader.read_weights if course.weights_only else reader.read
    engine.restore(read, reader.manifest.counters, step)
    reader.close()
    if course.weights_only:
        engine.reset()

    def steps_before() -> list[tuple[float, float]]:
        rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
        return parts.guard.steps_of(rows, step)

    parts.guard.history.restart(parts.comm.once(steps_before))


def _limits(run: ResolvedRun, guard: RankSupervisor, folder: RunFolder, comm: DistributedCommunicator) -> TimeLimits:
    train, watchdog = run.config.train, None
    if train.hang_timeout_seconds is not None:
        guard.stacks = folder.stacks(comm.rank)
        watchdog = Watchdog(guard.stacks, train.hang_timeout_seconds, guard.abort_hung_rank)
    wall = wall_time_seconds(train.max_wall_time) if train.max_wall_time is not None else None
    return TimeLimits(wall, process_start(), watchdog)


def _assemble(
    course: ResumePlan,
    comm: DistributedCommunicator,
    engine: Engine,
    folder: RunFolder,
    checkpoints: RunCheckpointer,
    metrics: MetricsWriter | None,
    reporter: RunConsole,
    limits: TimeLimits,
    incidents: SpikeReportWriter,
    peak: float,
) -> TrainerComponents:
    run, data = course.run, course.data
    data_rank = run.topology.coordinate(comm.rank).data
    config = run.config
    return TrainerComponents(
        run=run,
        comm=comm,
        engine=engine,
        batches=batch_loader(run, data.train, data_rank),
        evaluator=Evaluator(
            validation_loaders(run, data, data_rank),
            data.tokenizer.token_bytes(),
            comm,
            replicas=run.topology.tensor * run.topology.pipeline,
            heartbeat=limits.heartbeat,
        ),
        checkpoints=checkpoints,
        sampler=SampleWriter(
            folder.samples,
            config.sample,
            config.data.sequence_length,
            config.train.seed,
            data.tokenizer,
            comm,
            reporter,
        ),
        metrics=metrics,
        reporter=reporter,
        stop=StopRequest(limits=limits),
        guard=SpikeGuard(config.guard),
        incidents=incidents,
        limits=limits,
        flops_per_token=flops_per_token(course.shape, config.data.sequence_length),
        peak_flops=peak,
    )


def _announce(loop: Trainer, reporter: RunConsole, course: ResumePlan) -> None:
    parts, position = loop.parts, loop.position
    for warning in course.warnings:
        loop.event("warning", text=warning)
    resumed = course.reader is not None and not course.weights_only
    facts = {"world_size": parts.comm.size, "precision": parts.run.precision, "changed": list(course.notes)}
    from_path = {} if course.reader is None else {"path": str(course.reader.path)}
    startup_seconds = time.monotonic() - parts.limits.started
    loop.event("resume" if resumed else "start", **facts, **from_path, startup_seconds=startup_seconds)
    if resumed:
        reporter.info(f"resumed at step {position.step}, {position.tokens:,} tokens seen")


def _record_failure(metrics: MetricsWriter) -> Any:
    return lambda code: metrics.row("event", event="end", status="failed", exit_code=code)


def _nothing_to_do(loop: Trainer, reporter: RunConsole) -> int:
    loop.event("end", status="finished", exit_code=EXIT_DONE)
    reporter.info(f"step {loop.position.step} is done already; raise train.steps to go on")
    return EXIT_DONE


def _close(metrics: MetricsWriter | None, mirror: MirrorHandle | None, opened: OpenRun, with_page: bool) -> Path | None:
    """Where the page about the run is, if rank 0 has one."""
    folder, reporter = opened.folder, opened.reporter
    page = None
    if metrics is not None:
        metrics.close()
        page = write_report_page(folder, reporter) if with_page else None
    if mirror is not None and not mirror.finish(_MIRROR_PATIENCE_SECONDS):
        reporter.info(f"MLflow has not got everything yet; later: megalm track sync {folder.path}")
    opened.lock.release()
    return page
