"""Assembly: from arguments to a running loop. The one place that knows the concrete classes of all parts.

Order matters: everything that can be refused is refused before a process group exists; the run folder comes first
after it, so that a failure has a place to be told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.balance import balanced_blocks, parameter_costs
from megalm.config.deepspeed_json import read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.config.resolve import ResolvedRun, resolve
from megalm.engine.comm import ProcessComm, start_distributed
from megalm.engine.environment import claim_device, device_facts, device_name, rank_facts
from megalm.engine.peak import peak_flops
from megalm.engine.protocol import Engine
from megalm.errors import EXIT_DONE
from megalm.model.dropout import DropoutClock
from megalm.model.init import initialise
from megalm.model.layers import DenseLayers, LayerFactory
from megalm.model.shape import ModelShape, model_shape
from megalm.model.transformer import LanguageModel, StageBuilder
from megalm.parallel.groups import ParallelGroups, make_groups
from megalm.parallel.layers import TensorLayers
from megalm.plan import flops_per_token
from megalm.tracking.metrics import MetricsWriter, read_metrics
from megalm.tracking.mirror import MirrorHandle, start_mirror
from megalm.train.checkpointing import DataIdentity, RunCheckpoints
from megalm.train.data_facts import data_warnings
from megalm.train.datasets import (
    RunData,
    batch_loader,
    find_data,
    known_vocab_size,
    open_data,
    rebuild_data,
    validation_loaders,
)
from megalm.train.evaluate import Evaluator
from megalm.train.facts import farewell, opening_facts
from megalm.train.launcher_watch import watch_launchers
from megalm.train.leaving import FailureClaim, Guard, StopRequest
from megalm.train.loop import Parts, Position, TrainingLoop
from megalm.train.rehearsal import memory_errors_named, rehearse
from megalm.train.report import Reporter
from megalm.train.run_folder import RunFolder, RunLock, open_run_folder, write_facts
from megalm.train.sampling import SampleWriter

# MLflow's first use of a store makes its tables; a run that ends sooner waits this long for its mirror.
_MIRROR_PATIENCE_SECONDS = 45.0


@dataclass(frozen=True)
class Arguments:
    """What a person may say on the command line of launch/pretrain.py."""

    deepspeed_config: str
    config: str | None = None
    overrides: tuple[str, ...] = ()
    resume: str | None = None


def resolve_run(arguments: Arguments, world_size: int, local_world_size: int) -> ResolvedRun:
    """Read and check both configurations for so many ranks of this machine's device; no process group.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
        DataError: a tokenizer that cannot be read.
    """
    loaded = load_run_config(arguments.config, arguments.overrides)
    deepspeed = read_deepspeed_json(arguments.deepspeed_config)
    vocab_size = known_vocab_size(loaded.config.data)
    return resolve(loaded, deepspeed, world_size, device_facts(local_world_size), vocab_size, local_world_size)


def pretrain(arguments: Arguments, guard: Guard) -> int:
    """Run one training job on this rank; the exit code."""
    ranks = rank_facts()
    run = resolve_run(arguments, ranks.world_size, ranks.local_world_size)
    device = claim_device(ranks)
    comm = start_distributed(ranks, device)
    config = run.config
    folder = comm.once(
        lambda: open_run_folder(Path(config.run.root), config.run.name, run.preset, arguments.resume is not None)
    )
    lock = RunLock(folder)
    comm.once(lock.take)
    attempt = comm.once(lambda: _next_attempt(folder))
    guard.share(FailureClaim(folder.failure(attempt)))
    reporter = Reporter(comm.is_main, folder.log)
    reporter.say(f"megalm run {folder.path}")
    for notice in run.notices:
        reporter.say(f"  note: {notice}")
    places = comm.once_per_node(lambda: find_data(config.data, reporter.say))
    comm.once(lambda: rebuild_data(config.data, places, os.cpu_count() or 1, reporter.say))
    data = open_data(run, places)
    data_notes = data_warnings(run, data.train)
    shape = model_shape(config.model, data.tokenizer.vocab_size, config.data.sequence_length)
    prints = DataIdentity(data.train, data.tokenizer.fingerprint)
    checkpoints = RunCheckpoints(folder, run, shape, prints, data.tokenizer.spec, comm)
    for path in checkpoints.tidy():
        reporter.say(f"  note: an earlier job was killed while it saved or deleted; put in order: {path}")
    saved = checkpoints.find(arguments.resume) if arguments.resume is not None else None
    warnings = saved.warnings if saved is not None else ()
    for warning in warnings:
        reporter.say(f"  WARNING: {warning}")
    comm.once(lambda: write_facts(folder, run, _environment(run, prints, device, comm)))
    metrics = MetricsWriter(folder.metrics) if comm.is_main else None
    mirror = start_mirror(folder.path) if comm.is_main and config.tracking.mlflow else None
    if metrics is not None:
        guard.on_failure = _record_failure(metrics)

    if run.deepspeed["zero_optimization"].get("offload_optimizer"):
        reporter.say("preparing DeepSpeed's CPU Adam (compiled at its first use: a minute or two)")
    engine = build_engine(run, shape, device, comm)
    peak, peak_source = peak_flops(device, run.precision != "fp32")
    parts = _assemble(run, comm, engine, data, folder, checkpoints, metrics, reporter, shape, comm.sum([peak])[0])
    reporter.facts(opening_facts(run, shape, data, device_name(), ranks.threads, peak_source, parts.peak_flops))
    for warning in data_notes:
        reporter.say(f"  WARNING: {warning}")
    if config.train.rehearse:
        rehearse(parts)
    position = checkpoints.restore(engine, saved.reader) if saved is not None else Position()
    position.attempt = attempt
    loop = TrainingLoop(parts, position)
    _announce(loop, reporter, warnings, resumed=position.step > 0)
    parts.stop.install()
    watch_launchers()
    with memory_errors_named("training"):
        code = loop.run() if position.step < config.train.steps else _nothing_to_do(loop, reporter)
    parts.batches.close()
    comm.barrier()  # no rank leaves while another still needs rank 0's store
    _close(metrics, mirror, reporter, folder)
    if code == EXIT_DONE:
        reporter.say(farewell(folder, run, arguments.deepspeed_config))
    return code


def build_engine(run: ResolvedRun, shape: ModelShape, device: torch.device, comm: ProcessComm) -> Engine:
    """The initialised model under the engine that the run asks for."""
    from megalm.engine.zero import ZeroEngine  # deepspeed's import takes seconds and follows start_distributed

    train = run.config.train
    clock = DropoutClock(train.seed)
    groups = make_groups(run.topology, comm.rank, comm.timeout)
    layers: LayerFactory = DenseLayers(clock, run.config.compile)
    if run.topology.tensor > 1:
        layers = TensorLayers(clock, groups.tensor, run.config.parallel.sequence, run.config.compile)
    if run.topology.pipeline > 1:
        build = StageBuilder(shape, layers, clock, train.loss_chunk_tokens)
        return _build_pipeline(run, build, clock, device, comm, groups)
    model = LanguageModel(
        shape, layers, clock, train.loss_chunk_tokens, recompute_every=train.checkpoint_activations_every
    )
    if run.config.compile:
        model.compile_blocks()
    initialise(model, shape, train.seed)
    return ZeroEngine(
        model.to(device), clock, run.deepspeed, run.optimizer, train.embedding_weight_decay, comm, groups, device
    )


def _build_pipeline(
    run: ResolvedRun,
    build: StageBuilder,
    clock: DropoutClock,
    device: torch.device,
    comm: ProcessComm,
    groups: ParallelGroups,
) -> Engine:
    from megalm.engine.pipeline import PipelineEngine
    from megalm.engine.pipeline_module import Moment, PipelineStage

    train, shape = run.config.train, build.shape
    blocks = balanced_blocks(shape.num_hidden_layers, run.topology.pipeline, parameter_costs(shape))
    stage = PipelineStage(build, Moment(clock), run.topology, blocks, train.checkpoint_activations_every)
    if run.config.compile:
        stage.compile_blocks()
    initialise(stage.part_of_model(), shape, train.seed)
    return PipelineEngine(stage, run.deepspeed, run.optimizer, train.embedding_weight_decay, comm, groups, device)


def _assemble(
    run: ResolvedRun,
    comm: ProcessComm,
    engine: Engine,
    data: RunData,
    folder: RunFolder,
    checkpoints: RunCheckpoints,
    metrics: MetricsWriter | None,
    reporter: Reporter,
    shape: ModelShape,
    peak: float,
) -> Parts:
    data_rank = run.topology.coordinate(comm.rank).data
    config = run.config
    return Parts(
        run=run,
        comm=comm,
        engine=engine,
        batches=batch_loader(run, data.train, data_rank),
        evaluator=Evaluator(
            validation_loaders(run, data, data_rank),
            data.tokenizer.token_bytes(),
            comm,
            replicas=run.topology.tensor * run.topology.pipeline,
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
        stop=StopRequest(),
        flops_per_token=flops_per_token(shape, config.data.sequence_length),
        peak_flops=peak,
    )


def _next_attempt(folder: RunFolder) -> int:
    """1 for a new run; else the number after the last that started, or failed before it started."""
    rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
    started = max((int(row["attempt"]) for row in rows if row.get("event") in ("start", "resume")), default=0)
    return 1 + max(started, folder.last_failure())


def _environment(run: ResolvedRun, prints: DataIdentity, device: torch.device, comm: ProcessComm) -> dict[str, Any]:
    return {
        "device": device_name(),
        "device_kind": device.type,
        "world_size": comm.size,
        "threads_per_rank": torch.get_num_threads(),
        "precision": run.precision,
        "zero_stage": run.zero_stage,
        "dataset_fingerprint": prints.at(run.config.train.steps * run.batch.global_batch)["dataset"],
        "tokenizer_fingerprint": prints.tokenizer,
    }


def _announce(loop: TrainingLoop, reporter: Reporter, warnings: Sequence[str], resumed: bool) -> None:
    parts, position = loop.parts, loop.position
    for warning in warnings:
        loop.event("warning", text=warning)
    loop.event("resume" if resumed else "start", world_size=parts.comm.size, precision=parts.run.precision)
    if resumed:
        reporter.say(f"resumed at step {position.step}, {position.tokens:,} tokens seen")


def _record_failure(metrics: MetricsWriter) -> Any:
    return lambda: metrics.row("event", event="end", status="failed", exit_code=1)


def _nothing_to_do(loop: TrainingLoop, reporter: Reporter) -> int:
    loop.event("end", status="finished", exit_code=EXIT_DONE)
    reporter.say(f"step {loop.position.step} is done already; raise train.steps to go on")
    return EXIT_DONE


def _close(metrics: MetricsWriter | None, mirror: MirrorHandle | None, reporter: Reporter, folder: RunFolder) -> None:
    if metrics is not None:
        metrics.close()
    if mirror is not None and not mirror.finish(_MIRROR_PATIENCE_SECONDS):
        reporter.say(f"MLflow has not got everything yet; later: megalm track sync {folder.path}")
