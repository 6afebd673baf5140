"""From a resolved run to an engine: groups, layers and the initialised model, under the engine that the run asks for.

deepspeed's import takes seconds and has to follow `start_distributed`: it happens inside these functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.config.resolve import ResolvedRun
from megalm.engine.comm import ProcessComm
from megalm.engine.protocol import Engine
from megalm.estimate.balance import StageCosts, balanced_blocks, parameter_costs
from megalm.model.dropout import DropoutClock
from megalm.model.init import initialise
from megalm.model.layers import DenseLayers, LayerFactory
from megalm.model.shape import ModelShape
from megalm.model.transformer import LanguageModel, StageBuilder
from megalm.parallel.groups import ParallelGroups, make_groups
from megalm.parallel.layers import TensorLayers

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Told how many blocks each pipeline stage got, and by what costs.
OnStages = Callable[[tuple[int, ...], StageCosts], None]


def build_engine(
    run: ResolvedRun, shape: ModelShape, device: torch.device, comm: ProcessComm, on_stages: OnStages | None = None
) -> Engine:
    """Collective: the engine of this rank."""
    train = run.config.train
    clock = DropoutClock(train.seed)
    groups = make_groups(run.topology, comm.rank, comm.timeout)
    layers: LayerFactory = DenseLayers(clock, run.config.compile)
    if run.topology.tensor > 1:
        layers = TensorLayers(clock, groups.tensor, run.config.parallel.sequence, run.config.compile)
    if run.topology.pipeline > 1:
        build = StageBuilder(shape, layers, clock, train.loss_chunk_tokens)
        blocks, costs = _balance(run, build, device, comm)
        if on_stages is not None:
            on_stages(blocks, costs)
        return _pipeline_engine(run, build, clock, blocks, groups, device, comm)
    return _zero_engine(run, shape, layers, clock, groups, device, comm)


def _zero_engine(
    run: ResolvedRun,
    shape: ModelShape,
    layers: LayerFactory,
    clock: DropoutClock,
    groups: ParallelGroups,
    device: torch.device,
    comm: ProcessComm,
) -> Engine:
    from megalm.engine.zero import ZeroEngine

    train = run.config.train
    model = LanguageModel(
        shape, layers, clock, train.loss_chunk_tokens, recompute_every=train.checkpoint_activations_every
    )
    if run.config.compile:
        model.compile_blocks()
    initialise(model, shape, train.seed)
    return ZeroEngine(
        model.to(device), clock, run.deepspeed, run.optimizer, train.embedding_weight_decay, comm, groups, device
    )


def _pipeline_engine(
    run: ResolvedRun,
    build: StageBuilder,
    clock: DropoutClock,
    blocks: tuple[int, ...],
    groups: ParallelGroups,
    device: torch.device,
    comm: ProcessComm,
) -> Engine:
    from megalm.engine.pipeline import PipelineEngine
    from megalm.engine.pipeline_module import Moment, PipelineStage

    train = run.config.train
    stage = PipelineStage(build, Moment(clock), run.topology, blocks, train.checkpoint_activations_every)
    if run.config.compile:
        stage.compile_blocks()
    initialise(stage.part_of_model(), build.shape, train.seed)
    return PipelineEngine(stage, run.deepspeed, run.optimizer, train.embedding_weight_decay, comm, groups, device)


def _balance(
    run: ResolvedRun, build: StageBuilder, device: torch.device, comm: ProcessComm
) -> tuple[tuple[int, ...], StageCosts]:
    """Blocks of each stage, and the costs that they were balanced by."""
    shape = build.shape
    costs = parameter_costs(shape)
    if run.config.parallel.balance == "time":
        from megalm.engine.pipeline_balance import measured_costs

        tokens = run.batch.micro_batch, run.config.data.sequence_length
        costs = measured_costs(build, tokens, _TYPES[run.precision], device, comm)
    return balanced_blocks(shape.num_hidden_layers, run.topology.pipeline, costs), costs
