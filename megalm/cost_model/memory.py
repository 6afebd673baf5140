"""The memory of a rank, part by part, as DeepSpeed 0.19.8 lays it out: no torch.

Weights, gradients, master weights and moments are exact, padding included: a test compares them with a running engine.
Buckets are formulas, and so is what moments.py adds: activations and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, groupby

from megalm.config.deepspeed.json_schema import Precision, ZeroSection
from megalm.config.schema import OptimizerStateKind, ParameterGroup, Recompute
from megalm.cost_model.moments import fullest_moment, offloaded_inputs, start_moments
from megalm.cost_model.pipeline_balance import balanced_by_parameters
from megalm.model.model_config import ModelConfig, is_stacked, lowest_block
from megalm.model.parameter_groups import MOMENTS, NO_GROUP, GroupKey, frozen_parameters, group_keys, optimizer_groups
from megalm.parallel.pipeline_schedules import PipelineSchedule
from megalm.topology import AXES, Axis, PipelineScheduleName, Topology

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# ZeRO 1 and 2 pad each parameter group to a multiple of 2 x ranks elements, for NCCL's alignment.
_ALIGNMENT = 2
# A block of 256 elements of both moments: in bf16, or in bytes with an fp32 scale for each.
_BLOCK = 256
_BLOCK_BYTES = {"bf16": 4 * _BLOCK, "8bit": 2 * (_BLOCK + 4)}
_RANKS_LOOKED_AT = 16  # of ZeRO 3's, for where their parts cut blocks
# Elements of matrices that Muon makes whole on a rank at a time, or one matrix if that is larger.
MUON_ROUND = 2**25
_FLAT_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once in stage 0 and in its BF16_Optimizer


@dataclass(frozen=True)
class StateGroup:
    """A group of the optimizer's parameters, by their elements, and the number of ranks that divide their states."""

    counts: list[int]
    ranks: int

    @property
    def elements(self) -> int:
        return sum(self.counts)

    @property
    def padded(self) -> int:
        """Elements with the padding of ZeRO 1 and 2."""
        alignment = _ALIGNMENT * self.ranks
        return math.ceil(self.elements / alignment) * alignment

    @property
    def parts(self) -> list[int]:
        """Elements of each parameter that a rank holds under ZeRO 3."""
        return [math.ceil(count / self.ranks) for count in self.counts]


Groups = list[StateGroup]
ShareKind = tuple[bool, bool, int, int]

# Column layers hold a part of their output features, row layers of their input features.
_COLUMNS = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up", "shared.gate", "shared.up")
_ROWS = ("attention.output.weight", "mlp.down.weight", "shared.down.weight", "experts.down")
_EXPERT_COLUMNS = ("experts.gate", "experts.up")
_VOCABULARY = ("embedding.tokens.weight", "head.weight")


@dataclass(frozen=True)
class Share:
    """The part of the model that the fullest tensor rank of a pipeline's rank holds.

    Attributes:
        sequence: the tensor group divides the residual stream along the sequence.
        stages: of the rank, from its place in the pipeline on; without virtual stages one.
        stage_blocks: the blocks of each of them.
        last_stage: the model's.
    """

    shape: ModelConfig
    tensor: int
    expert: int
    sequence: bool
    stages: tuple[int, ...]
    stage_blocks: tuple[range, ...]
    last_stage: int

    @property
    def stage(self) -> int:
        """The first of its stages, which is the rank's place in the pipeline."""
        return self.stages[0]

    @property
    def is_first(self) -> bool:
        return 0 in self.stages

    @property
    def is_last(self) -> bool:
        return self.last_stage in self.stages

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks."""
        return tuple(chain.from_iterable(self.stage_blocks))

    @property
    def kind(self) -> ShareKind:
        """What tells the memory of two ranks apart, but for their micro-batches."""
        return self.is_first, self.is_last, len(self.blocks), len({*self.blocks} & {*self.shape.moe_layers})

    @property
    def heads(self) -> int:
        return self.shape.num_attention_heads // self.tensor

    @property
    def key_value_heads(self) -> int:
        """With fewer of them than ranks, each rank holds a copy of the one that its heads need."""
        return max(1, self.shape.num_key_value_heads // self.tensor)

    @property
    def slices(self) -> int:
        """Number of ranks that share the activations between the sharded layers: norms, residuals, dropout."""
        return self.tensor if self.sequence else 1

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of each parameter or part of it held here, in the model's order."""
        return _held_parameters(self)

    def modules(self) -> list[dict[str, int]]:
        """Name -> elements, of each module that ZeRO 3 builds and gathers as one: embedding, blocks, head."""
        sizes = groupby(
            self.parameters().items(), key=lambda it: it[0].split(".")[: 2 if it[0][:7] == "layers." else 1]
        )
        return [{name: math.prod(size) for name, size in module} for _, module in sizes]

    def is_here(self, name: str) -> bool:
        if name.startswith("layers."):
            return any(int(name.split(".")[1]) in blocks for blocks in self.stage_blocks)
        if name == "embedding.tokens.weight":
            return self.is_first or (self.is_last and self.shape.tie_word_embeddings)
        return self.is_first if name.startswith("embedding.") else self.is_last

    def local(self, name: str, size: tuple[int, ...]) -> tuple[int, ...]:
        if name in _VOCABULARY:
            return (math.ceil(size[0] / self.tensor), *size[1:])
        if is_stacked(name):
            size = (size[0] // self.expert, *size[1:])
        if name.endswith(_ROWS):
            return (*size[:-1], size[-1] // self.tensor)
        layer = next((column for column in _COLUMNS if f".{column}." in name), None)
        if name.endswith(".attention.sinks"):
            return (self.heads,)
        if layer is None:
            return (size[0], size[1] // self.tensor, size[2]) if name.endswith(_EXPERT_COLUMNS) else size
        if layer in ("attention.key", "attention.value"):
            return (self.key_value_heads * self.shape.head_dim, *size[1:])
        return (size[0] // self.tensor, *size[1:])


@lru_cache(maxsize=64)  # an estimate asks several times
def _held_parameters(share: Share) -> dict[str, tuple[int, ...]]:
    sizes = share.shape.parameters().items()
    return {name: share.local(name, size) for name, size in sizes if share.is_here(name)}


def shares(
    shape: ModelConfig, topology: Topology, sequence: bool = False, stage_ranks: Sequence[int] | None = None
) -> Iterator[Share]:
    """The share of each rank of the pipeline, balanced by parameters.

    Args:
        stage_ranks: the rank of each stage; None: each rank has one.
    """
    owners = range(topology.pipeline) if stage_ranks is None else stage_ranks
    counts = balanced_by_parameters(shape, owners) if len(owners) > 1 else (shape.num_hidden_layers,)
    blocks = [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
    for rank in range(topology.pipeline):
        own = tuple(stage for stage, owner in enumerate(owners) if owner == rank)
        yield Share(
            shape,
            topology.tensor,
            topology.expert,
            sequence,
            own,
            tuple(blocks[stage] for stage in own),
            len(owners) - 1,
        )


@dataclass(frozen=True)
class MemoryCase:
    """The settings of a run that its memory depends on.

    Attributes:
        accumulation: micro-batches of a step.
        gradient_precision: gradients are accumulated in it.
        communication_precision: gradients are communicated in it.
        checkpoint_activations_every: every n-th block keeps only its input and is recomputed; 0: none.
        recompute: what the backward pass computes again in each of the other blocks.
        mlp_chunk_tokens: of an MLP in tiles, of which one is computed at a time, and again in the backward pass.
        offload_activations: the inputs of blocks that are recomputed whole lie in the CPU's memory.
        on_cpu: offloaded states lie in the same memory, RMS norms have no fused kernel, and attention keeps the
            probabilities of short sequences.
        checkpoint_copy: checkpoints are written behind training, from copies in the CPU's memory.
        whole_gradients: ZeRO 2 adds up each rank's gradients of a step, and reduces them once.
        ring: of the two methods of a context group, keys and values go around.
        float8: linear layers multiply rounded copies of their factors.
        repeats_keys: attention keeps a copy of each key/value head for every query head that shares it.
        device_bytes: memory of the device; None: not known.
        optimizer_state: how Adam's moments are kept.
        muon: the matrices of the blocks are Muon's.
        virtual_stages: stages of each rank of the pipeline.
    """

    shape: ModelConfig
    sequence_length: int
    micro_batch: int
    accumulation: int
    precision: Precision
    gradient_precision: Precision
    communication_precision: Precision
    zero: ZeroSection
    topology: Topology
    loss_chunk_tokens: int = 1024
    checkpoint_activations_every: int = 0
    recompute: Recompute = "none"
    mlp_chunk_tokens: int | None = None
    offload_activations: bool = False
    embedding_weight_decay: bool = True
    parameter_groups: tuple[ParameterGroup, ...] = ()
    document_mask: bool = False
    on_cpu: bool = False
    sequence_parallel: bool = False
    ring: bool = False
    checkpoint_copy: bool = False
    whole_gradients: bool = False
    float8: bool = False
    repeats_keys: bool = False
    device_bytes: int | None = None
    optimizer_state: OptimizerStateKind = "fp32"
    muon: bool = False
    ema: bool = False
    schedule_name: PipelineScheduleName = "1f1b"
    virtual_stages: int = 1

    @property
    def schedule(self) -> PipelineSchedule:
        """A step of the pipeline; without one, of one rank."""
        return PipelineSchedule(self.schedule_name, self.topology.pipeline, self.virtual_stages, self.accumulation)

    @cached_property
    def frozen(self) -> frozenset[str]:
        """Canonical names of the parameters that do not train."""
        return frozen_parameters(self.shape, self.parameter_groups)

    @cached_property
    def lowest_trained_block(self) -> int:
        """The first block with a backward pass."""
        return lowest_block(self.shape, self.frozen)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, those that a rank of a context group holds."""
        return self.micro_batch * self.sequence_length // self.topology.context

    @property
    def element_bytes(self) -> int:
        """Bytes of a number of the model's precision."""
        return BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a number in which gradients are accumulated."""
        return BYTES[self.gradient_precision]

    @property
    def communication_bytes(self) -> int:
        """Bytes of a number in which gradients are communicated."""
        return BYTES[self.communication_precision]

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's states lie in the CPU's memory or on NVMe."""
        return self.zero.optimizer_device != "none"

    @property
    def offloads_parameters(self) -> bool:
        """Whether the weights lie in the CPU's memory."""
        return self.zero.parameter_device != "none"

    @property
    def swaps(self) -> bool:
        """Whether the optimizer's states lie on NVMe."""
        return self.zero.optimizer_device == "nvme"

    @property
    def uses_bf16_optimizer(self) -> bool:
        """Stage 1 in bf16 with fp32 gradients runs DeepSpeed's BF16_Optimizer: whole fp32 gradients on every rank."""
        types = self.precision, self.gradient_precision
        return self.zero.stage == 1 and types == ("bf16", "fp32") and not self.offloads_optimizer

    @property
    def reduces_nothing(self) -> bool:
        """ZeRO 1 and 2 on weights of one rank: gradients go where the optimizer reads them, without a bucket."""
        is_alone = self.topology.data_context == self.topology.pipeline == 1 and self.zero.stage in (1, 2)
        return is_alone and not self.offloads_optimizer and not self.uses_bf16_optimizer

    def copies_of(self, name: str) -> int:
        """Number of ranks that hold the same part of a parameter."""
        return self.topology.expert_data if is_stacked(name) else self.topology.data_context


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank: of a step, part by part, and at the fullest moments of the start, before the first step.

    Attributes:
        weights: the model computes with them.
        gradients: accumulated gradients.
        master: the fp32 weights that the optimizer updates; none in stage 0, which updates `weights`.
        moments: Adam's two, Muon's one.
        buckets: communication buffers beyond what the backward pass has freed by then, and under ZeRO 3 the weights
            gathered at one time; or what an update of Muon needs beyond that, if it is more.
        activations: at the fullest moment of forward and backward pass, kept and computed again, with the gradients
            in work; less what accumulated gradients take later.
        loss: at the same moment: logits and gradients of head and hidden states, or what is left of them by then.
        runtime: on a GPU, an allowance for CUDA's context, cuBLAS and NCCL.
        host: part -> bytes that offload and checkpoints keep in the CPU's memory.
        start: the most that the device holds before the first step, with `runtime`; on a CPU with what `start_host` is
            on a GPU.
        start_host: the most in the CPU's memory before the first step; 0 on a CPU.
        disk: the optimizer's states on NVMe.
        stage: of the pipeline, the rank's first; 0 without one.
        ema: the moving average of the masters.
        secondary: the second copy of the weights, which the ranks of zero_hpz_partition_size share.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    buckets: int
    activations: int
    loss: int
    runtime: int
    host: dict[str, int]
    start: int
    start_host: int
    disk: int = 0
    on_cpu: bool = False
    stage: int = 0
    ema: int = 0
    secondary: int = 0

    def parts(self) -> dict[str, int]:
        """Part -> bytes on the device."""
        names = ("weights", "gradients", "master", "moments", "buckets", "activations", "loss", "runtime")
        some = {name: getattr(self, name) for name in ("ema", "secondary")}
        return {name: getattr(self, name) for name in names} | {name: size for name, size in some.items() if size}

    @property
    def total(self) -> int:
        """Bytes in the device's memory in a step; on a CPU this includes `host`."""
        return sum(self.parts().values()) + (sum(self.host.values()) if self.on_cpu else 0)

    @property
    def peak(self) -> int:
        """Bytes in the device's memory at most, in a step or at the start."""
        return max(self.total, self.start)

    @property
    def host_peak(self) -> int:
        """Bytes in the CPU's memory at most, in a step or at the start; on a CPU they are in `peak`."""
        return 0 if self.on_cpu else max(sum(self.host.values()), self.start_host)


def estimate_memory(case: MemoryCase) -> MemoryPlan:
    """Bytes per rank by part, on the fullest rank."""
    return max(estimate_stages(case), key=lambda plan: plan.peak)


def estimate_stages(case: MemoryCase) -> Iterator[MemoryPlan]:
    """The plans of the pipeline's ranks, of each kind the one that keeps most activations: the first rank, the last
    one, and those between them with each number of blocks, and of blocks with experts."""
    kinds: dict[ShareKind, list[Share]] = {}
    stage_ranks = case.schedule.stage_ranks if case.topology.pipeline > 1 else None
    for share in shares(case.shape, case.topology, case.sequence_parallel, stage_ranks):
        kinds.setdefault(share.kind, []).append(share)
    for alike in kinds.values():
        share = max(alike, key=lambda it: sum(fullest_moment(case, it, 0))) if len(alike) > 1 else alike[0]
        by_key = parameter_groups(case, share)
        groups, frozen = list(by_key.values()), frozen_counts(case, share)
        device, host = _states(case, by_key, frozen)
        host |= offloaded_inputs(case, share)
        secondary = secondary_bytes(case, share)
        moments = list(start_moments(case, share, groups, sum(frozen), secondary))
        runtime = _runtime_bytes(case)
        activations, loss = fullest_moment(case, share, device["gradients"])
        yield MemoryPlan(
            **device,
            buckets=max(
                _bucket_bytes(case, share, groups, activations + loss), _update_bytes(case, share) - activations - loss
            ),
            activations=activations,
            loss=loss,
            runtime=runtime,
            host=host,
            start=max(map(sum, moments)) if case.on_cpu else max(it.device for it in moments) + runtime,
            start_host=0 if case.on_cpu else max(it.host for it in moments),
            disk=16 * _own_elements(case, groups) if case.swaps else 0,  # master, two moments and the gradient
            on_cpu=case.on_cpu,
            stage=share.stage,
            secondary=secondary,
        )


# An allowance by common experience, not measured here: CUDA's context with its kernels and cuBLAS's workspaces, and
# NCCL's buffers of each group of ranks.
_CUDA_CONTEXT, _NCCL_GROUP = 768 * 2**20, 256 * 2**20


def _runtime_bytes(case: MemoryCase) -> int:
    """Memory of a GPU that no tensor holds."""
    if case.on_cpu:
        return 0
    wide = {axis for axis in AXES if case.topology.size(axis) > 1}
    together: list[set[Axis]] = [{"tensor"}, {"context"}, {"data", "context"}, {"pipeline"}, {*AXES}]
    if case.muon:
        together.append({"data", "context", "tensor"})
    groups = {frozenset(wide & axes) for axes in together} - {frozenset()}
    node = case.zero.secondary_ranks > 0
    of_experts = {case.topology.groups(it)[0] for it in ("expert", "expert_data")}
    of_experts -= {case.topology.groups(it)[0] for it in ("data_context", "context")}
    return _CUDA_CONTEXT + _NCCL_GROUP * (len(groups) + node + sum(len(ranks) > 1 for ranks in of_experts))


def checkpoint_bytes(
    shape: ModelConfig, rules: Sequence[ParameterGroup] = (), muon: bool = False, ema: bool = False
) -> int:
    """A checkpoint's tensors: every weight in fp32, moments and average of those that train, whatever the layout.

    Args:
        rules: train.parameter_groups.
    """
    sizes = shape.parameters()
    keys = group_keys({name: len(size) for name, size in sizes.items()}, rules, True, muon)
    return sum(
        4 * (1 + len(MOMENTS[keys[name].algorithm]) + (ema and not keys[name].frozen)) * math.prod(size)
        for name, size in sizes.items()
    )


def parameter_groups(case: MemoryCase, share: Share) -> dict[GroupKey, StateGroup]:
    """Elements of a rank's parameters in the optimizer's groups, which ZeRO pads one by one.

    A pipeline stage of which nothing trains has a group of one element.
    """
    shapes = share.parameters()
    dimensions = {name: len(shape) for name, shape in shapes.items()}
    multiplier = case.shape.width_multiplier
    divides_experts = case.topology.expert > 1
    rules, decay = case.parameter_groups, case.embedding_weight_decay
    keys = group_keys(dimensions, rules, decay, case.muon, multiplier, divides_experts)
    groups = {
        key: StateGroup([math.prod(shapes[name]) for name in names], case.copies_of(names[0]))
        for key, names in optimizer_groups(keys).items()
        if not key.frozen
    }
    return groups or {NO_GROUP: StateGroup([1], case.topology.data_context)}


def frozen_counts(case: MemoryCase, share: Share) -> list[int]:
    """Elements of the frozen parameters, or parts of them, that a rank computes with; under ZeRO 3 that it holds."""

    def ranks(name: str) -> int:
        return case.copies_of(name) if case.zero.stage == 3 else 1

    frozen = {name: size for name, size in share.parameters().items() if name in case.frozen}
    return [math.ceil(math.prod(size) / ranks(name)) for name, size in frozen.items()]


def secondary_bytes(case: MemoryCase, share: Share) -> int:
    """The second copy of all weights under ZeRO 3: parts of the size of the first copy's, more of them on each rank."""
    ranks, together = case.topology.data, case.zero.secondary_ranks
    if not together:
        return 0
    counts = (math.prod(size) for size in share.parameters().values())
    return case.element_bytes * sum(math.ceil(count / ranks) for count in counts) * ranks // together


def _states(
    case: MemoryCase, by_key: dict[GroupKey, StateGroup], frozen: list[int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Weights, gradients, master and moments on the device, and offloaded parts in the CPU's memory.

    Args:
        frozen: of `frozen_counts`: they have weights alone.
    """
    stage = case.zero.stage
    low = case.element_bytes
    groups = list(by_key.values())
    moments = _moments(case, by_key)
    own = _own_elements(case, groups)
    average = own if case.ema else 0
    gradients, host_gradients = _gradients(case, groups, own) if stage else (low * own, 0)
    master = 4 * own if stage else 0  # without ZeRO the weights themselves
    optimizer = {"master": master, "moments": _moment_bytes(case, groups, moments), "ema": 4 * average}
    weights = low * (sum(frozen) + (own if stage in (0, 3) else sum(group.padded for group in groups)))
    device = {"weights": weights, "gradients": gradients, **optimizer}
    host = _checkpoint_copy(case, own + moments + average, frozen)
    if case.offloads_optimizer and stage:
        device |= dict.fromkeys(optimizer, 0)
        host |= {"gradients": host_gradients, **optimizer} if not case.swaps else _swap_buffers(case, groups)
        if stage < 3:
            host["buckets"] = low * own  # updated weights on their way back
    if case.offloads_parameters and stage:
        device["weights"], host["weights"] = 0, weights
    return device, host


def _swap_buffers(case: MemoryCase, groups: Groups) -> dict[str, int]:
    """The CPU's memory of states on NVMe: accumulated gradients, and one sub-group at a time."""
    offload = case.zero.offload_optimizer
    assert offload is not None
    own = _own_elements(case, groups)
    largest_part = max(max(group.parts) for group in groups)
    sub_group = min(own, case.zero.sub_group_size + largest_part)
    return {"gradients": case.gradient_bytes * own, "swap buffers": 4 * offload.buffer_count * sub_group}


def _checkpoint_copy(case: MemoryCase, elements: int, frozen: list[int]) -> dict[str, int]:
    """With checkpoint.async, a copy of the master and the moments that this rank owns, and of its frozen weights."""
    ranks = 1 if case.zero.stage == 3 else case.topology.data_context
    own = elements + sum(math.ceil(count / ranks) for count in frozen)
    return {"checkpoint copy": 4 * own} if case.checkpoint_copy else {}


def _gradients(case: MemoryCase, groups: Groups, own: int) -> tuple[int, int]:
    """Bytes of accumulated gradients on the device and, with an offloaded optimizer, in the CPU's memory."""
    elements = sum(group.elements for group in groups)
    low, accumulated = case.element_bytes, case.gradient_bytes
    offload, same_type = case.offloads_optimizer, case.gradient_precision == case.precision
    if case.zero.stage == 3:
        # With offload the accumulated gradients are beside the fp32 ones that the optimizer reads.
        return (0, (accumulated + 4) * own) if offload else (accumulated * own, 0)
    if case.uses_bf16_optimizer:
        # Whole fp32 gradients, and autograd's own, which DeepSpeed zeroes but never frees; a pipeline keeps none.
        kept = low * elements if case.topology.pipeline == 1 else 0
        return accumulated * sum(group.padded for group in groups) + kept, 0
    if offload and same_type:
        return 0, 4 * own + (low * _touched_elements(groups, case) if case.accumulation > 1 else 0)
    if case.reduces_nothing:
        return accumulated * own, 4 * own
    if case.zero.stage == 1:
        return accumulated * elements, 4 * own
    # A gradient in the weights' type stays whole if the partition holds any of it.
    reduced = low * _touched_elements(groups, case) if same_type else accumulated * own
    if case.whole_gradients:  # the reduced ones take the place of the first bucket's
        reduced = accumulated * elements + max(0, reduced - accumulated * case.zero.reduce_bucket_size)
    return reduced, 4 * own


def _moments(case: MemoryCase, by_key: dict[GroupKey, StateGroup]) -> int:
    """Elements of the moments of one rank's partition: of Adam's two for each weight, of Muon's one."""
    return sum(len(MOMENTS[key.algorithm]) * _own_elements(case, [group]) for key, group in by_key.items())


def _moment_bytes(case: MemoryCase, groups: Groups, elements: int) -> int:
    """The moments, of the fullest rank."""
    if case.optimizer_state == "fp32":
        return 4 * elements
    return _BLOCK_BYTES[case.optimizer_state] * _own_blocks(case, groups)


def _own_blocks(case: MemoryCase, groups: Groups) -> int:
    """Blocks that the fullest rank holds wholly or in part; they begin at multiples of their size in a parameter."""
    ranks = case.topology.data_context
    if case.zero.stage == 0:
        return sum(_blocks(0, count) for group in groups for count in group.counts)
    if case.zero.stage == 3:
        parts = [
            (part, count, group.ranks)
            for group in groups
            for part, count in zip(group.parts, group.counts, strict=True)
        ]
        return max(
            sum(_blocks(rank % of * part, min(rank % of * part + part, count)) for part, count, of in parts)
            for rank in range(min(ranks, _RANKS_LOOKED_AT))
        )
    return _fullest(case, groups, lambda _, start, stop: _blocks(start, stop))


def _blocks(start: int, stop: int) -> int:
    """Blocks that elements [start, stop) of a parameter lie in."""
    return math.ceil(stop / _BLOCK) - start // _BLOCK if start < stop else 0


def _fullest(case: MemoryCase, groups: Groups, size: Callable[[int, int, int], int]) -> int:
    """The sum of `size`(elements of a parameter, start and stop of its part) on the rank where it is the largest."""
    totals = [0] * case.topology.data_context
    for group in groups:
        for count, rank, start, stop in _cut(group):
            for same in range(rank, len(totals), group.ranks):
                totals[same] += size(count, start, stop)
    return max(totals)


def _cut(group: StateGroup) -> Iterator[tuple[int, int, int, int]]:
    """For each part of a parameter the parameter's elements, the rank that holds it, its start and its stop there."""
    size, place = group.padded // group.ranks, 0
    for count in group.counts:
        for rank in range(place // size, (place + count - 1) // size + 1):
            yield count, rank, max(rank * size - place, 0), min((rank + 1) * size - place, count)
        place += count


def _own_elements(case: MemoryCase, groups: Groups) -> int:
    """Elements of one rank's partition: each parameter divided (stage 3), or each group (stages 1 and 2), or whole."""
    if case.zero.stage == 0:
        return sum(group.elements for group in groups)
    if case.zero.stage == 3:
        return sum(sum(group.parts) for group in groups)
    return sum(group.padded // group.ranks for group in groups)


def _touched_elements(groups: Groups, case: MemoryCase) -> int:
    """Elements of all parameters that lie wholly or partly in a partition; of the fullest partition."""
    return _fullest(case, groups, lambda count, *_: count)


def _update_bytes(case: MemoryCase, share: Share) -> int:
    """Muon's messages, matrices made whole and what orthogonalises them, in an update; activations are gone by then."""
    if not case.muon:
        return 0
    shapes = case.shape.parameters()
    names = [name for name in share.parameters() if name.startswith("layers.") and len(shapes[name]) > 1]
    matrices = [math.prod(shapes[name][-2:]) for name in names for _ in range(math.prod(shapes[name][:-2]))]
    ranks = case.topology.data_context * case.topology.tensor
    largest = max(matrices)
    own = max(largest, min(MUON_ROUND, math.ceil(sum(matrices) / ranks)))
    # A message, the whole matrices, orthogonal ones and their pieces; three factors of the one in work.
    return (4 if case.precision == "fp32" else 2) * (4 * own + 3 * largest)


def _bucket_bytes(case: MemoryCase, share: Share, groups: Groups, freed: int) -> int:
    """Communication buffers at their largest.

    Args:
        freed: bytes that the backward pass frees before stage 0 and BF16_Optimizer reduce the gradients.
    """
    zero, stage = case.zero, case.zero.stage
    elements = sum(group.elements for group in groups)
    overlap = zero.overlap_comm if zero.overlap_comm is not None else stage == 3
    sent = case.communication_bytes
    # On a CPU, pages that nothing writes to take no memory.
    bucket = min(zero.reduce_bucket_size, elements) if case.on_cpu else zero.reduce_bucket_size
    flat = max(0, 4 * min(elements, _FLAT_BUCKET) - freed)  # one flattened copy of the gradients
    if case.reduces_nothing:
        return 0
    if stage == 0:
        return 0 if case.topology.data_context == 1 else flat
    if stage == 3:
        # DeepSpeed keeps what it needs again within the reuse distance, prefetches, and adds the module in work.
        kept = min(zero.max_live_parameters, zero.max_reuse_distance + zero.prefetch_bucket_size)
        modules = [sum(module.values()) for module in share.modules()]
        gathered = min(sum(modules), kept + max(modules))
        return sent * bucket + case.element_bytes * gathered
    if case.uses_bf16_optimizer:
        return flat
    staged = BYTES[case.gradient_precision if stage == 1 or case.whole_gradients else case.precision]
    return staged * bucket * (2 if overlap else 1) if zero.contiguous_gradients else 0
