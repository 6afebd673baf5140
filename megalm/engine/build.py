"""Build the engine of a resolved run: process groups, layers, the initialized model, and the engine around it.

Shapes: B micro-batch, T sequence, H hidden. Importing deepspeed takes seconds and must follow `start_distributed`, so
it happens inside these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megalm.communicator import Communicator
from megalm.cost_model.pipeline_balance import StageCosts, balanced_blocks, parameter_costs
from megalm.engine.device import fastest_seconds
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.interface import Engine, JudgeUpdate
from megalm.engine.traffic_counter import TrafficCounter
from megalm.model.layer_factory import LayerFactory
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock
from megalm.model.transformer import LanguageModel, StageBuilder, initialize
from megalm.parallel.process_groups import make_groups
from megalm.parallel.tensor_parallel import TensorLayers
from megalm.planning.resolve import ResolvedRun, loss_chunk_tokens

if TYPE_CHECKING:
    from megalm.engine.base_engine import EngineContext

_REPEATS = 3  # of a measured pass
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
    from megalm.engine.base_engine import EngineContext

    train = run.config.train
    clock = DropoutClock(train.seed)
    context = EngineContext(run, device, comm, make_groups(run.topology, comm.rank, comm.timeout), judge)
    if traffic is not None:
        traffic.name_groups(context.groups, comm.process_group)
    compiled, float8 = run.config.compile, run.config.precision.float8
    layers = LayerFactory(clock, compiled, float8)
    if run.topology.tensor > 1:
        layers = TensorLayers(clock, context.groups.tensor, run.config.parallel.sequence, compiled, float8)
    if run.topology.pipeline > 1:
        build = StageBuilder(shape, layers, clock, loss_chunk_tokens(run.config, shape, run.device))
        blocks, costs = _balance(run, build, device, comm)
        if on_stages is not None:
            on_stages(blocks, costs)
        return _pipeline_engine(context, build, clock, blocks)
    return _zero_engine(context, shape, layers, clock)


def _zero_engine(context: EngineContext, shape: ModelConfig, layers: LayerFactory, clock: DropoutClock) -> Engine:
    from megalm.engine.zero_engine import ZeroEngine

    run, train = context.run, context.run.config.train
    chunk = loss_chunk_tokens(run.config, shape, run.device)
    model = LanguageModel(shape, layers, clock, chunk, recompute_every=train.checkpoint_activations_every)
    if run.config.compile:
        model.compile_blocks()
    initialize(model, shape, train.seed)
    return ZeroEngine(model.to(context.device), clock, context)


def _pipeline_engine(
    context: EngineContext, build: StageBuilder, clock: DropoutClock, blocks: tuple[int, ...]
) -> Engine:
    from megalm.engine.pipeline_engine import PipelineEngine
    from megalm.engine.pipeline_stage import MicroBatchContext, PipelineStage

    run, train = context.run, context.run.config.train
    stage = PipelineStage(build, MicroBatchContext(clock), run.topology, blocks, train.checkpoint_activations_every)
    if run.config.compile:
        stage.compile_blocks()
    initialize(stage.part_of_model(), build.shape, train.seed)
    return PipelineEngine(stage, context)


def _balance(
    run: ResolvedRun, build: StageBuilder, device: torch.device, comm: Communicator
) -> tuple[tuple[int, ...], StageCosts]:
    """Return the number of blocks of each stage, and the costs used to balance them."""
    costs = parameter_costs(build.shape)
    if run.config.parallel.balance == "time":
        tokens = run.batch.micro_batch, run.config.data.sequence_length
        costs = measured_costs(build, tokens, _TYPES[run.precision], device, comm)
    return balanced_blocks(build.shape.num_hidden_layers, run.topology.pipeline, costs), costs


def measured_costs(
    build: StageBuilder, tokens: tuple[int, int], dtype: torch.dtype, device: torch.device, comm: Communicator
) -> StageCosts:
    """Return the seconds of embedding, one block, and head with loss, each of the slowest rank: equal on all ranks.

    Collective. Measures a forward and backward pass on this machine; the parts exist only while they are measured, one
    at a time.

    Args:
        tokens: B, T of a micro-batch, of whose sequences this rank may hold a slice.
        dtype: the model's compute type.
    """
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    size = (tokens[0], tokens[1] // build.slices, build.shape.hidden_size)
    hidden = torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    def seconds(make: Callable[[], nn.Module], forward: Callable[[nn.Module], Tensor]) -> float:
        module = make().to(device, dtype)
        with torch.no_grad():  # the builder leaves weights uninitialized, and some values are slow to compute with
            for parameter in module.parameters():
                parameter.normal_(std=0.02)
        forward(module).backward()  # warm-up
        return fastest_seconds(lambda: forward(module).backward(), device, _REPEATS)

    costs = [
        seconds(build.embedding, lambda embedding: embedding(ids, None).sum()),
        seconds(lambda: build.block(0), lambda block: block(hidden, None).sum()),
        seconds(lambda: _End(build), lambda end: end(hidden, ids)),
    ]
    return StageCosts(*comm.max(costs))


class _End(nn.Module):
    """Final norm and head of the last stage: [B, T, H], [B, T] -> loss."""

    def __init__(self, build: StageBuilder) -> None:
        super().__init__()
        self.norm = build.final_norm()
        self.head = build.head(build.token_table() if build.shape.tie_word_embeddings else None)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss, _ = self.head(self.norm(hidden), labels)
        return loss
