"""Build the engine of a resolved run: process groups, layers, the initialized model, and the engine around it.

Importing deepspeed takes seconds and must follow `start_distributed`, so it happens inside these functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.cost_model.pipeline_balance import StageCosts, balanced_blocks, parameter_costs
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.interface import Engine, JudgeUpdate
from megalm.engine.traffic_counter import TrafficCounter
from megalm.model.layer_factory import DenseLayers, LayerFactory
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock
from megalm.model.transformer import LanguageModel, StageBuilder, initialize
from megalm.parallel.process_groups import ParallelGroups, make_groups
from megalm.parallel.tensor_parallel import TensorLayers
from megalm.planning.resolve import ResolvedRun

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Called with the number of blocks of each pipeline stage and the costs used to balance them.
OnStages = Callable[[tuple[int, ...], StageCosts], None]


def build_engine(
    run: ResolvedRun,
    shape: ModelConfig,
    device: torch.device,
    comm: DistributedCommunicator,
    judge: JudgeUpdate | None = None,
    on_stages: OnStages | None = None,
    traffic: TrafficCounter | None = None,
) -> Engine:
    """Collective: return this rank's engine.

    Args:
        judge: called before each update; None refuses only numbers that are not finite.
        on_stages: called if the model is split into pipeline stages.
        traffic: learns the groups of this rank.
    """
    train = run.config.train
    clock = DropoutClock(train.seed)
    groups = make_groups(run.topology, comm.rank, comm.timeout)
    if traffic is not None:
        traffic.name_groups(groups, comm.process_group)
    layers: LayerFactory = DenseLayers(clock, run.config.compile)
    if run.topology.tensor > 1:
        layers = TensorLayers(clock, groups.tensor, run.config.parallel.sequence, run.config.compile)
    if run.topology.pipeline > 1:
        build = StageBuilder(shape, layers, clock, train.loss_chunk_tokens)
        blocks, costs = _balance(run, build, device, comm)
        if on_stages is not None:
            on_stages(blocks, costs)
        return _pipeline_engine(run, build, clock, blocks, groups, device, comm, judge)
    return _zero_engine(run, shape, layers, clock, groups, device, comm, judge)


def _zero_engine(
    run: ResolvedRun,
    shape: ModelConfig,
    layers: LayerFactory,
    clock: DropoutClock,
    groups: ParallelGroups,
    device: torch.device,
    comm: DistributedCommunicator,
    judge: JudgeUpdate | None,
) -> Engine:
    from megalm.engine.zero_engine import ZeroEngine

    train = run.config.train
    model = LanguageModel(
        shape, layers, clock, train.loss_chunk_tokens, recompute_every=train.checkpoint_activations_every
    )
    if run.config.compile:
        model.compile_blocks()
    initialize(model, shape, train.seed)
    return ZeroEngine(
        model.to(device), clock, run.deepspeed, run.optimizer, train.embedding_weight_decay, comm, groups, device, judge
    )


def _pipeline_engine(
    run: ResolvedRun,
    build: StageBuilder,
    clock: DropoutClock,
    blocks: tuple[int, ...],
    groups: ParallelGroups,
    device: torch.device,
    comm: DistributedCommunicator,
    judge: JudgeUpdate | None,
) -> Engine:
    from megalm.engine.pipeline_engine import PipelineEngine
    from megalm.engine.pipeline_stage import MicroBatchContext, PipelineStage

    train = run.config.train
    stage = PipelineStage(build, MicroBatchContext(clock), run.topology, blocks, train.checkpoint_activations_every)
    if run.config.compile:
        stage.compile_blocks()
    initialize(stage.part_of_model(), build.shape, train.seed)
    return PipelineEngine(
        stage, run.deepspeed, run.optimizer, train.embedding_weight_decay, comm, groups, device, judge
    )


def _balance(
    run: ResolvedRun, build: StageBuilder, device: torch.device, comm: DistributedCommunicator
) -> tuple[tuple[int, ...], StageCosts]:
    """Return the number of blocks of each stage, and the costs used to balance them."""
    shape = build.shape
    costs = parameter_costs(shape)
    if run.config.parallel.balance == "time":
        from megalm.engine.pipeline_profiler import measured_costs

        tokens = run.batch.micro_batch, run.config.data.sequence_length
        costs = measured_costs(build, tokens, _TYPES[run.precision], device, comm)
    return balanced_blocks(shape.num_hidden_layers, run.topology.pipeline, costs), costs
