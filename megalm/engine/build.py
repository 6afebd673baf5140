"""Build the engine of a resolved run: process groups, layers, the initialized model, and the engine around it.

Shapes: B micro-batch, T sequence, H hidden. Importing deepspeed takes seconds and must follow `start_distributed`, so
it happens inside these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.communicator import Communicator
from megalm.cost_model.pipeline_balance import StageCosts, balanced_blocks, balanced_by_parameters, parameter_costs
from megalm.engine.deepspeed_patches import prints_to_log, use_secondary_group
from megalm.engine.device import fastest_seconds
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.interface import Engine, JudgeUpdate
from megalm.engine.traffic_counter import TrafficCounter
from megalm.model.activation_offload import OffloadedInputs
from megalm.model.layer_factory import WHOLE_SEQUENCE, LayerFactory, RouterLosses, annotate_shard, shard_of
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock
from megalm.model.recomputation import Recomputation
from megalm.model.transformer import LanguageModel, ParameterInit, StageBuilder, initial_weight
from megalm.model.weight_gradients import WeightGradients
from megalm.parallel.context_parallel import ExchangedSequence, RingSequence
from megalm.parallel.expert_parallel import DividedExperts
from megalm.parallel.process_groups import ParallelGroups, make_groups
from megalm.parallel.sharded_linear import TensorProducts
from megalm.parallel.tensor_parallel import TensorLayers
from megalm.planning.memory_fit import loss_chunk_tokens
from megalm.planning.resolve import ResolvedRun

if TYPE_CHECKING:
    from megalm.engine.base_engine import EngineContext

_REPEATS = 3  # of a measured pass
_PLACEHOLDER = 0.01  # not 0: DeepSpeed's BF16_Optimizer stops at a gradient norm of 0
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Called with the number of blocks of each pipeline stage and the costs used to balance them.
OnStages = Callable[[tuple[int, ...], StageCosts], None]
# Canonical name -> the whole fp32 weight, in the CPU's memory.
DrawWeight = Callable[[str], Tensor]


def build_engine(
    run: ResolvedRun,
    shape: ModelConfig,
    device: torch.device,
    comm: DistributedCommunicator,
    judge: JudgeUpdate | None = None,
    on_stages: OnStages | None = None,
    traffic: TrafficCounter | None = None,
    initial_weights: bool = True,
) -> Engine:
    """Collective: return this rank's engine.

    Parameters come into being on the device, in the run's precision. ZeRO 3 divides each block before the next one is
    built, and a pipeline rank builds its own stage.

    Args:
        judge: called before each update; None refuses only numbers that are not finite.
        on_stages: called if the model is split into pipeline stages.
        traffic: learns the groups of this rank.
        initial_weights: false fills parameters with a number, for a checkpoint to replace.
    """
    from megalm.engine.base_engine import EngineContext

    train = run.config.train
    clock = DropoutClock(train.seed)
    groups = make_groups(
        run.topology,
        comm.rank,
        comm.timeout,
        with_stages=run.optimizer.muon is not None,
        node_ranks=run.deepspeed_source.settings.zero_optimization.secondary_ranks,
    )
    sequence = WHOLE_SEQUENCE
    if groups.context.size > 1:
        divided = RingSequence if run.config.parallel.context_method == "ring" else ExchangedSequence
        sequence = divided(groups.context)
    context = EngineContext(run, shape, device, comm, groups, judge, clock, sequence)
    if traffic is not None:
        traffic.name_groups(context.groups, comm.process_group)
    float8 = run.config.precision.float8
    layers = LayerFactory(clock, run.compiled, float8, train.z_loss, sequence)
    if run.topology.tensor > 1:
        products = TensorProducts(groups.tensor, run.config.parallel.sequence, float8, run.tensor_chunks)
        layers = TensorLayers(clock, products, run.compiled, train.z_loss, sequence)
    if groups.expert.size > 1:
        layers.experts = DividedExperts(groups.expert)
    layers.router_losses = RouterLosses(train.router_aux_loss, train.router_z_loss)
    layers.expert_capacity_factor = train.expert_capacity_factor
    if run.topology.pipeline > 1 and run.pipeline.divides_backward:
        layers.weight_gradients = WeightGradients()
    if run.compiled:
        # A graph for each length and kind of layer, in training and in validation, and the loss's last chunk.
        graphs = 4 * len(set(run.config.data.sequence_lengths)) * shape.kinds_of_layers
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
    sizes = shape.parameters()

    def initial(name: str) -> Tensor:
        return initial_weight(name, sizes[name], shape, train.seed, layers.experts)

    draw = initial if initial_weights else None
    if run.topology.pipeline > 1:
        init = ParameterInit(device, _TYPES[run.precision])
        chunk = loss_chunk_tokens(run.config, shape, run.device)
        build = StageBuilder(shape, layers, clock, chunk, init, _recomputation(run, device))
        blocks, costs = _balance(run, build, device, comm)
        if on_stages is not None:
            on_stages(blocks, costs)
        return _pipeline_engine(context, build, blocks, draw)
    return _zero_engine(context, layers, draw)


def _recomputation(run: ResolvedRun, device: torch.device) -> Recomputation:
    train = run.config.train
    inputs = OffloadedInputs(device) if train.offload_activations else None
    return Recomputation(run.recompute, train.checkpoint_activations_every, train.mlp_chunk_tokens, inputs)


def _zero_engine(context: EngineContext, layers: LayerFactory, draw: DrawWeight | None) -> Engine:
    from megalm.engine.zero_engine import ZeroEngine

    run, shape = context.run, context.shape
    chunk = loss_chunk_tokens(run.config, shape, run.device)
    use_secondary_group(context.groups.node)
    with _InitialWeights(list(shape.parameters()), draw, context.groups) as weights:

        def fill(path: str, stage: nn.Module) -> None:
            weights.fill(stage, path)
            if run.zero_stage == 3:
                _partition(stage, context)

        init = ParameterInit(context.device, _TYPES[run.precision], fill)
        model = LanguageModel(shape, layers, context.clock, chunk, init, _recomputation(run, context.device))
    if run.compiled:
        model.compile_blocks()
    return ZeroEngine(model, context)


def _pipeline_engine(
    context: EngineContext, build: StageBuilder, blocks: tuple[int, ...], draw: DrawWeight | None
) -> Engine:
    from megalm.engine.pipeline.pipeline_engine import PipelineEngine, PipelinePart

    run, pipeline = context.run, context.groups.pipeline
    part = PipelinePart(build, blocks, run.pipeline.stages_of(pipeline.index))
    with _InitialWeights([name for name, _ in part.named_parameters()], draw, context.groups) as weights:
        weights.fill(part)
    if run.compiled:
        part.compile_blocks()
    return PipelineEngine(part, context)


class _InitialWeights:
    """Gives parameters their initial weights, which the ranks that hold the same draw by turns.

    A rank draws its next parameter in a thread while those of the others arrive. Of whole fp32 weights, it holds this
    one alone.

    Args:
        names: canonical names of this rank's parameters, in the order in which `fill` comes to them.
        draw: None fills parameters with a number, for a checkpoint to replace.
    """

    def __init__(self, names: Sequence[str], draw: DrawWeight | None, groups: ParallelGroups) -> None:
        self._draw, self._groups = draw, groups
        self._copies = {name: groups.copies_of(name) for name in names}
        self._turns = {name: place % self._copies[name].size for place, name in enumerate(names)}
        self._own = iter([name for name in names if self._turns[name] == self._copies[name].index])
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._drawn = self._begin_next()

    def __enter__(self) -> _InitialWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    @torch.no_grad()
    def fill(self, module: nn.Module, path: str = "") -> None:
        """Collective: fill a module, which is at `path` in the model, and mark its experts."""
        if self._groups.expert.size > 1:
            from megalm.engine.optimizer.expert_states import mark_experts

            mark_experts(module, path, self._groups)
        for name, parameter in module.named_parameters(path):
            if self._draw is None:
                parameter.fill_(_PLACEHOLDER)
                continue
            turn, copies = self._turns[name], self._copies[name]
            if turn == copies.index:
                parameter.copy_(shard_of(parameter).cut(self._drawn[name].result()).to(parameter.dtype))
                self._drawn.clear()
                self._drawn = self._begin_next()
            if copies.size > 1:
                dist.broadcast(parameter.data.view(torch.uint8), copies.ranks[turn], copies.process_group)

    def _begin_next(self) -> dict[str, Future[Tensor]]:
        name = next(self._own, None)
        if self._draw is None or name is None:
            return {}
        return {name: self._thread.submit(self._draw, name)}


def _partition(stage: nn.Module, context: EngineContext) -> None:
    """Leave this rank its part of each parameter, as DeepSpeed's ZeRO 3 does it."""
    from deepspeed import zero

    from megalm.engine.base_engine import ModelParallelUnit

    for parameter in stage.parameters():
        annotate_shard(parameter, shard_of(parameter))  # from here on a parameter does not know its shape
    group, mpu = context.groups.data_context.process_group, ModelParallelUnit(context.groups)
    node = context.groups.node
    with prints_to_log():
        zero.Init(
            stage,
            group,
            config_dict_or_path=context.settings(),
            mpu=mpu,
            zero_param_parallel_group=None if node is None else node.process_group,
        )


def _balance(
    run: ResolvedRun, build: StageBuilder, device: torch.device, comm: Communicator
) -> tuple[tuple[int, ...], StageCosts]:
    """Return the number of blocks of each stage, and the costs used to balance them."""
    owners = run.pipeline.stage_ranks
    if run.config.parallel.balance == "parameters":
        return balanced_by_parameters(build.shape, owners), parameter_costs(build.shape)
    tokens = run.batch.micro_batch, run.config.data.sample_length
    costs = measured_costs(build, tokens, _TYPES[run.precision], device, comm)
    return balanced_blocks(build.shape.num_hidden_layers, owners, costs), costs


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
    held = tokens[1] // build.sequence.parts
    ids = torch.zeros(tokens[0], held, dtype=torch.int64, device=device)
    size = (tokens[0], held // build.slices, build.shape.hidden_size)
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
