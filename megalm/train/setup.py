"""From arguments to a running trainer. Only this module knows the concrete classes of all parts.

The order matters: as much as possible is checked before a process group exists. After that, the run folder is opened
first, so that a failure can be recorded there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megalm.communicator import Communicator
from megalm.config.schema import TRACKERS, RunConfig, TrainSection
from megalm.data.sampling.batch_loader import BatchLoader
from megalm.engine.build import build_engine
from megalm.engine.device import (
    bind_to_numa_node,
    device_name,
    make_deterministic,
    open_device,
    peak_flops,
    pin_batch,
)
from megalm.engine.distributed import DistributedCommunicator, agree_on_device, start_distributed
from megalm.engine.interface import Engine
from megalm.engine.ranks.flight_recorder import FlightRecorder
from megalm.engine.ranks.rendezvous import Meeting, count_restarts, meet
from megalm.engine.traffic_counter import TrafficCounter
from megalm.errors import EXIT_DONE, EXIT_START_AGAIN, ConfigError
from megalm.model.model_config import float8_share, flops_per_token
from megalm.model.parameter_groups import frozen_parameters
from megalm.nodes.collective_clock import CollectiveClock
from megalm.nodes.node_check import NodeCheck, check_nodes
from megalm.nodes.straggler_watch import SlowTimes, StragglerWatch
from megalm.planning.resolve import DeviceFacts, ResolvedRun, known_vocab_size, resolve
from megalm.planning.run_checks import wall_time_seconds
from megalm.rank_environment import RankFacts, RankPlace, rank_facts, submit_options
from megalm.runs.metrics_log import MetricsWriter, wall_limit
from megalm.runs.run_folder import ResumeCommand, RunFolder, open_run_folder, write_facts
from megalm.runs.run_lock import RunLock
from megalm.runs.run_settings import Arguments, ResumeOptions, config_changes
from megalm.tracking.mlflow_mirror.mirror_process import MirrorHandle, start_mirror
from megalm.tracking.mlflow_mirror.sync_state import copied_from
from megalm.train.console import RunConsole
from megalm.train.datasets import batch_layout, open_run_data, validation_loaders
from megalm.train.evaluator import Evaluator
from megalm.train.lifecycle.heartbeat import Heartbeat
from megalm.train.lifecycle.shutdown import FailureClaim, RankSupervisor, RunHooks, StopRequest, watch_launchers
from megalm.train.lifecycle.time_limits import TimeLimits, Watchdog, process_start, wall_seconds
from megalm.train.resume.resume_plan import ResumePlan, clean_up_interrupted_saves, find_resume_checkpoint, plan_resume
from megalm.train.resume.resume_request import record_attempt
from megalm.train.run_checkpointer import RunCheckpointer
from megalm.train.run_copies import check_copies, fetch_newer_copy, finish_run_copies, start_run_copies
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
from megalm.train.spikes.spike_report import SpikeReportWriter
from megalm.train.step_diagnostics import StepDiagnostics
from megalm.train.text_samples import SampleWriter
from megalm.train.trainer import Trainer, TrainerComponents, memory_errors_named, run_preflight
from megalm.utils.formatting import format_duration
from megalm.utils.process_setup import require_system

# MLflow creates the tables of a new store, which takes a while; a short run waits up to this long for its mirror.
_MIRROR_PATIENCE_SECONDS = 45.0


@dataclass(frozen=True)
class RunSettings:
    """A run's configuration, read once and checked; its YAML text is `run.config_yaml`.

    Attributes:
        options: the resume options.
        saved: the configuration in the folder of the resumed run; None for a new run.
    """

    run: ResolvedRun
    options: ResumeOptions
    saved: RunConfig | None


@dataclass(frozen=True)
class OpenRun:
    """The run folder, locked for this job.

    Attributes:
        lock: held by this job.
        attempt: 1 for a new run.
        hooks: the actions of the rank's supervisor on a failure from here on.
    """

    folder: RunFolder
    lock: RunLock
    attempt: int
    console: RunConsole
    hooks: RunHooks


@dataclass(frozen=True)
class CollectiveObservers:
    """What the run's collectives go through; None: not wanted.

    Attributes:
        traffic: counts their bytes.
        clock: adds up their time.
    """

    traffic: TrafficCounter | None = None
    clock: CollectiveClock | None = None


@dataclass(frozen=True)
class BuiltRun:
    """A trainer that is ready, and the resources to close after it.

    Attributes:
        metrics: on rank 0 only.
        mirror: on rank 0, and on the first rank of each other node.
        command: resumes the run by hand.
    """

    trainer: Trainer
    metrics: MetricsWriter | None
    mirror: MirrorHandle | None
    command: ResumeCommand


def pretrain(arguments: Arguments, supervisor: RankSupervisor) -> int:
    """Run one training job on this rank; return the exit code."""
    require_system()
    ranks = rank_facts()
    count_restarts(ranks)
    device, report = open_device(ranks)
    settings = None if report.problem else load_settings(arguments, ranks, report.facts)
    if settings is not None and ranks.rank == 0:
        try:
            check_copies(settings.run.config, settings.options)
        except ConfigError as error:  # every rank learns of it where they agree on the device
            report = replace(report, problem=str(error))
    limit = (
        TrainSection().start_timeout_seconds if settings is None else settings.run.config.train.start_timeout_seconds
    )
    meeting = meet(ranks, RankPlace.of_this_process(ranks.rank, str(device)), limit, RunConsole(active=True).info)
    _watch_ranks(meeting, limit, supervisor)
    agreed = agree_on_device(report, ranks, meeting.store)
    if settings is None or agreed != report.facts:  # another node has less memory, say
        settings = load_settings(arguments, ranks, agreed)
    _prepare_process(settings.run, device)
    observers = _observers(settings.run, ranks)
    supervisor.stage("joining the process group")
    comm = start_distributed(ranks, device, observers.traffic, meeting.store)
    supervisor.stage("opening the run")
    opened = open_run(settings, comm, supervisor)
    info = opened.console.info
    supervisor.stage("checking the nodes")
    nodes = check_nodes(settings.run, opened.folder, opened.attempt, ranks, device, comm, meeting.places, info)
    if nodes.excludes:
        supervisor.let_ranks_leave()
        return _leave_for_other_nodes(settings.run, opened, comm)
    point = find_resume_checkpoint(settings.run, opened.folder, settings.options, comm, info)
    supervisor.stage("opening the data")
    data = open_run_data(point.run, point.first_sample_of, comm, info)
    plan = plan_resume(point, data)
    _report_plan(plan, settings, opened, comm)
    supervisor.stage("building the engine")
    built = build_trainer(plan, opened, nodes, ranks, device, comm, supervisor, meeting.places, observers)
    with memory_errors_named("training"):
        code = built.trainer.fit()
    supervisor.let_ranks_leave()
    _close(built, opened, comm, code)
    return code


def _watch_ranks(meeting: Meeting, start_timeout_seconds: float | None, supervisor: RankSupervisor) -> None:
    """Let all ranks know of each other, from here to the end, who is alive."""
    supervisor.place = meeting.places[supervisor.rank]
    if len(meeting.places) == 1:
        return
    supervisor.heartbeat = Heartbeat(
        meeting.second_store(),
        meeting.places,
        supervisor.rank,
        start_timeout_seconds,
        supervisor.abort_without,
        RunConsole(active=True).info,
    )
    supervisor.heartbeat.start()


# --- 1: the settings --------------------------------------------------------------------------------------------------


def load_settings(arguments: Arguments, ranks: RankFacts, device: DeviceFacts) -> RunSettings:
    """Read and check both configurations for these ranks and this device; needs no process group.

    Raises:
        ConfigError: all that is wrong, one line each.
        DataError: the tokenizer cannot be read.
    """
    arguments.restore_lost_folder(RunConsole(ranks.rank == 0).info)
    options, files = arguments.read(ranks.world_size, device)
    vocab_size = known_vocab_size(files.loaded.config.data)
    run = resolve(files.loaded, files.deepspeed, ranks.world_size, device, vocab_size, ranks.local_world_size)
    return RunSettings(run, options, files.saved)


def _prepare_process(run: ResolvedRun, device: torch.device) -> None:
    """What a run's settings need of this process before its threads and kernels start."""
    zero = run.deepspeed["zero_optimization"]
    if device.type == "cuda" and any(zero.get(name) for name in ("offload_optimizer", "offload_param")):
        bind_to_numa_node(device)
    if run.config.train.deterministic:
        make_deterministic(run.compiled)


# --- 2: the run folder ------------------------------------------------------------------------------------------------


def open_run(settings: RunSettings, comm: Communicator, supervisor: RankSupervisor) -> OpenRun:
    """Create or lock the folder and clean it up; from here on `supervisor` reports failures there.

    Raises:
        ConfigError: the ranks have different configurations, or the folder cannot be used or is locked by another job.
    """
    run, resume = settings.run, settings.options.wanted is not None
    _refuse_different_configurations(run, comm)
    folder = comm.once(lambda: open_run_folder(Path(run.config.run.root), run.config.run.name, run.preset, resume))
    is_new = comm.is_main and folder.is_empty
    lock = RunLock(folder.path)
    comm.once(lock.take)
    attempt = comm.once(folder.next_attempt)
    hooks = RunHooks(FailureClaim(folder.failure(attempt)))
    if is_new:  # not before the lock: another job may have started in it meanwhile
        hooks = replace(hooks, on_refusal=folder.remove_if_unused)
    supervisor.enter(hooks)
    console = RunConsole(comm.is_main, folder.log)
    if comm.is_main and supervisor.heartbeat is not None:
        supervisor.heartbeat.notice = lambda line: console.info(f"WARNING: {line}")
    console.info(f"megalm run {folder.path}")
    for notice in run.notices:
        console.info(f"  note: {notice}")
    for path in clean_up_interrupted_saves(folder, comm, run.config.checkpoint.best):
        console.info(f"  note: cleaned up after an earlier job that was killed while saving or deleting: {path}")
    if run.config.checkpoint.copy_to is not None:
        supervisor.stage("looking for copies of the checkpoints")
        if fetch_newer_copy(run.config, settings.options, folder, comm, console.info):
            attempt = comm.once(folder.next_attempt)  # after those of the copy
            hooks = replace(hooks, claim=FailureClaim(folder.failure(attempt)))
            supervisor.enter(hooks)
    return OpenRun(folder, lock, attempt, console, hooks)


def _refuse_different_configurations(run: ResolvedRun, comm: Communicator) -> None:
    """Check that all ranks read the same configuration: a machine with another file would train another model."""
    if len(set(comm.gather((run.config_yaml, str(run.deepspeed))))) > 1:
        raise ConfigError(
            f"the ranks read different configurations of run {run.config.run.name}; put run.root and the configuration "
            "files on a file system that all machines share, and start again"
        )


def _leave_for_other_nodes(run: ResolvedRun, opened: OpenRun, comm: Communicator) -> int:
    """Release the run for the next start of this job; return the exit code. A new run without a name leaves nothing."""
    opened.lock.release()
    if comm.is_main and run.config.run.name is None:
        opened.folder.remove_if_unused()
    comm.barrier()
    return EXIT_START_AGAIN


# --- 3 to 5: the checkpoint and the plan are in resume/resume_plan.py, the data in datasets.py ------------------------


def _report_plan(plan: ResumePlan, settings: RunSettings, opened: OpenRun, comm: Communicator) -> None:
    """Print the changes since the run was started, and warnings.

    Raises:
        ConfigError: a file of the run folder is damaged, or data is read more often than `data.max_epochs`.
    """
    folder, info, saved = opened.folder, opened.console.info, settings.saved
    changes = comm.once(lambda: [] if saved is None else config_changes(folder, plan.run, saved))
    for note in (*changes, *plan.notes):
        info(f"  note: {note}")
    for warning in (*plan.warnings, *data_warnings(plan.run, plan.data)):
        info(f"  WARNING: {warning}")


# --- 6: the trainer ---------------------------------------------------------------------------------------------------


def build_trainer(
    plan: ResumePlan,
    opened: OpenRun,
    nodes: NodeCheck,
    ranks: RankFacts,
    device: torch.device,
    comm: DistributedCommunicator,
    supervisor: RankSupervisor,
    places: Sequence[RankPlace],
    observers: CollectiveObservers,
) -> BuiltRun:
    """Write the run's facts into its folder, build the trainer's components and restore the resumed state."""
    run, folder, console = plan.run, opened.folder, opened.console
    checkpoints = _checkpoints(plan, opened, comm)
    threads = torch.get_num_threads()
    account = environment_facts(run, plan.identity, device_name(), device.type, threads, opened.attempt, places)
    comm.once(lambda: write_facts(folder, run, {**account, **scale_facts(run, plan.shape, plan.data)}))
    metrics = MetricsWriter(folder.metrics) if comm.is_main else None
    hooks = _training_hooks(opened, run, metrics, comm)
    supervisor.enter(hooks)
    # Before the mirror, which uses a core for seconds.
    frozen = frozen_parameters(plan.shape, run.config.train.parameter_groups)
    share = float8_share(plan.shape, run.config.data.sample_length, run.config.precision.float8, frozen)
    peak, peak_source = peak_flops(device, run.precision != "fp32", share)
    mirror = _start_mirror(folder, run, ranks, console)
    if run.deepspeed["zero_optimization"].get("offload_optimizer"):
        console.info("preparing DeepSpeed's offload extensions (the first use compiles them, for a minute or two)")
    spikes = SpikeGuard(run.config.guard)
    engine = build_engine(
        run,
        plan.shape,
        device,
        comm,
        spikes.judge,
        lambda *stages: console.info(pipeline_facts(run, *stages)),
        observers.traffic,
        initial_weights=plan.reader is None,
    )
    command = ResumeCommand(folder.path, ranks.local_world_size, submit_options())
    limits = _limits(run, hooks, supervisor)
    parts = _components(plan, opened, comm, engine, checkpoints, metrics, limits, spikes, command, comm.sum([peak])[0])
    console.facts(
        opening_facts(
            run, plan.shape, plan.data, device_name(), ranks.threads, peak_source, parts.peak_flops, nodes.fact
        )
    )
    if run.config.train.rehearse:
        supervisor.stage("rehearsing each phase")
        run_preflight(parts)
    if plan.reader is not None:
        supervisor.stage("loading the checkpoint")
        checkpoints.restore(plan.reader, engine, parts.guard, plan.weights_only, new=True)
    supervisor.stage("in the first step")
    plan.position.attempt = opened.attempt
    if observers.traffic is not None:
        parts = replace(parts, diagnostics=_diagnostics(parts, folder, observers.traffic))
    if comm.size > 1 and run.config.train.slow_seconds is not None:
        parts = replace(parts, stragglers=_straggler_watch(run, device, comm, places, observers.clock))
    trainer = Trainer(parts, plan.position)
    _announce(trainer, console, plan, [str(finding) for finding in nodes.findings])
    parts.stop.install()
    watch_launchers()
    return BuiltRun(trainer, metrics, mirror, command)


def _start_mirror(folder: RunFolder, run: ResolvedRun, ranks: RankFacts, console: RunConsole) -> MirrorHandle | None:
    """Start the mirror on rank 0, and on each other node the process that samples its system metrics for MLflow."""
    tracking, is_main = run.config.tracking, ranks.rank == 0
    samples = tracking.mlflow and tracking.system_metrics
    is_wanted = samples or (is_main and any(getattr(tracking, name) for name in TRACKERS))
    if ranks.local_rank or not is_wanted:
        return None
    if is_main and (original := copied_from(folder.path)) is not None:
        console.info(f"  note: {folder.path} is a copy of {original}; its MLflow run is a new one")
    return start_mirror(folder.path, ranks.rank // ranks.local_world_size, samples, is_main)


def _checkpoints(plan: ResumePlan, opened: OpenRun, comm: Communicator) -> RunCheckpointer:
    """Return the checkpointer; first notes the resumed checkpoint in the run folder, before this attempt writes."""
    folder = opened.folder
    reader, attempt = plan.reader, None
    if reader is not None:
        attempt = comm.once(lambda: record_attempt(folder, reader, plan.resume, opened.attempt))
    copies = start_run_copies(folder, plan.run.config) if comm.is_main else None
    return RunCheckpointer(folder, plan.run, plan.shape, plan.identity, plan.data.tokenizer, comm, attempt, copies)


def _training_hooks(opened: OpenRun, run: ResolvedRun, metrics: MetricsWriter | None, comm: Communicator) -> RunHooks:
    hooks = replace(opened.hooks, began=True)
    if run.config.train.hang_timeout_seconds is not None:
        stacks = opened.folder.stacks(comm.rank)
        hooks = replace(hooks, stacks=stacks, recorder=FlightRecorder(stacks.parent, comm.rank))
    if metrics is not None:
        end = partial(metrics.row, "event", event="end", status="failed")
        hooks = replace(hooks, on_failure=lambda code, report: end(exit_code=code, reason=report))
    return hooks


def _limits(run: ResolvedRun, hooks: RunHooks, supervisor: RankSupervisor) -> TimeLimits:
    train, watchdog = run.config.train, None
    if train.hang_timeout_seconds is not None and hooks.stacks is not None:
        watchdog = Watchdog(hooks.stacks, train.hang_timeout_seconds, supervisor.abort_hung_rank)
    limit = wall_time_seconds(train.max_wall_time) if train.max_wall_time is not None else None
    started = process_start()
    limits = TimeLimits(wall_seconds(limit, started), started, watchdog)
    if supervisor.heartbeat is not None:
        limits.progress = supervisor.heartbeat.progress
    return limits


def _components(
    plan: ResumePlan,
    opened: OpenRun,
    comm: DistributedCommunicator,
    engine: Engine,
    checkpoints: RunCheckpointer,
    metrics: MetricsWriter | None,
    limits: TimeLimits,
    spikes: SpikeGuard,
    command: ResumeCommand,
    peak: float,
) -> TrainerComponents:
    run, data, folder, console = plan.run, plan.data, opened.folder, opened.console
    data_rank = run.topology.coordinate(comm.rank).data
    config, length = run.config, run.config.data.sample_length
    return TrainerComponents(
        run=run,
        comm=comm,
        engine=engine,
        batches=BatchLoader(data.train, batch_layout(run, data_rank), pin_batch if run.device.kind == "cuda" else None),
        evaluator=Evaluator(
            validation_loaders(run, data, data_rank),
            data.tokenizer.token_bytes(),
            comm,
            replicas=run.topology.copy_ranks,
            heartbeat=limits.heartbeat,
            averaged_weights=engine.averaged_weights if config.evaluates_ema else None,
        ),
        checkpoints=checkpoints,
        sampler=SampleWriter(folder.samples, config.sample, length, config.train.seed, data.tokenizer, comm, console),
        metrics=metrics,
        lock=opened.lock if metrics is not None else None,
        reporter=console,
        stop=StopRequest(limits=limits),
        guard=spikes,
        incidents=SpikeReportWriter(folder.incidents, data.train, data.tokenizer, command, comm, console),
        limits=limits,
        flops_per_token=partial(
            flops_per_token, plan.shape, frozen=frozen_parameters(plan.shape, config.train.parameter_groups)
        ),
        peak_flops=peak,
        datasets=tuple(data.train.names),
        choices=data.choices,
    )


def _observers(run: ResolvedRun, ranks: RankFacts) -> CollectiveObservers:
    """Return what the run needs, in effect from here on; call before `start_distributed`."""
    wanted, clock = run.diagnostics, None
    # On a GPU the watch has other means; a compiled graph cannot contain a clock.
    if ranks.world_size > 1 and run.config.train.slow_seconds and run.device.kind == "cpu" and not run.compiled:
        clock = CollectiveClock()
        clock.install()
    return CollectiveObservers(
        TrafficCounter() if wanted.count_traffic or wanted.profile_steps is not None else None, clock
    )


def _straggler_watch(
    run: ResolvedRun,
    device: torch.device,
    comm: Communicator,
    places: Sequence[RankPlace],
    clock: CollectiveClock | None,
) -> StragglerWatch:
    train = run.config.train
    assert train.slow_seconds is not None
    stages = [run.topology.coordinate(rank).pipeline for rank in range(comm.size)]  # which have different work
    times = SlowTimes(train.slow_factor, train.slow_seconds)
    return StragglerWatch(comm, device, clock, places, stages, times, train.log_interval_steps)


def _diagnostics(parts: TrainerComponents, folder: RunFolder, traffic: TrafficCounter) -> StepDiagnostics:
    run = parts.run

    def flops(step: int) -> float:
        stage = run.stages.at(step)
        return parts.flops_per_token(stage.sequence_length) * stage.tokens

    return StepDiagnostics(run.diagnostics, folder.profile, parts.comm, traffic, flops, run.config.train.steps)


def _announce(trainer: Trainer, console: RunConsole, plan: ResumePlan, bad_nodes: Sequence[str]) -> None:
    parts, position = trainer.parts, trainer.position
    for warning in (*plan.warnings, *bad_nodes):
        trainer.event("warning", text=warning)
    resumed = plan.reader is not None and not plan.weights_only
    facts = {"world_size": parts.comm.size, "precision": parts.run.precision, "changed": list(plan.notes)}
    from_path = {} if plan.reader is None else {"path": str(plan.reader.path)}
    startup_seconds = time.monotonic() - parts.limits.started
    trainer.event("resume" if resumed else "start", **facts, **from_path, startup_seconds=startup_seconds)
    if (wall := parts.limits.wall_seconds) is not None:
        limit = wall_limit(parts.run.config.train.max_wall_time)
        left = parts.limits.started + wall - time.monotonic()
        console.info(f"  note: the run stops and saves within {format_duration(left)} ({limit})")
    if resumed:
        console.info(f"resumed at step {position.step}, {position.tokens:,} tokens seen")


# --- 7: Trainer.fit, and what comes after it --------------------------------------------------------------------------


def _close(built: BuiltRun, opened: OpenRun, comm: Communicator, code: int) -> None:
    """Release all resources; after a finished run, write its page and print the final summary."""
    folder, console = opened.folder, opened.console
    built.trainer.parts.close()
    comm.barrier()  # no rank leaves while another still needs rank 0's store
    page = None
    if built.metrics is not None:
        built.metrics.close()
        page = write_report_page(folder, console) if code == EXIT_DONE else None
    if built.mirror is not None and not built.mirror.finish(_MIRROR_PATIENCE_SECONDS):
        console.info(f"a tracker lacks a part of the run (mlflow.log says why); run megalm track sync {folder.path}")
    if built.trainer.parts.run.config.checkpoint.copy_to is not None:
        finish_run_copies(built.trainer.parts.checkpoints.copies, built.trainer.parts.run.config, code, console.info)
        comm.barrier()  # a launcher may end the others' ranks some time after the first has left
    opened.lock.release()
    if code == EXIT_DONE:
        console.info(final_summary(folder, built.trainer.parts.run, built.command, page))
