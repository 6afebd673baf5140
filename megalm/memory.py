"""How much memory a rank needs, part by part, as DeepSpeed 0.19.8 really lays it out.

Weights, gradients, master weights and moments are exact, padding included: a test compares them with a running
engine. Buckets, activations and the loss are formulas for the block of megalm/model.

Words: "low precision" is what the model computes in (2 bytes for bf16 and fp16, 4 for fp32).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megalm.activations import activation_bytes, loss_bytes
from megalm.config.deepspeed_schema import ZeroSection
from megalm.config.precision import Precision
from megalm.model.shape import ModelShape
from megalm.topology import Topology

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# ZeRO 1 and 2 pad each parameter group to a multiple of 2 x ranks elements, for NCCL's alignment.
_ALIGNMENT = 2


@dataclass(frozen=True)
class MemoryCase:
    """A run as far as memory depends on it.

    Attributes:
        gradient_precision: what gradients are accumulated in.
        communication_precision: what they are sent in.
        one_memory: the device is a CPU, so that what is offloaded lies in the same memory.
    """

    shape: ModelShape
    sequence_length: int
    micro_batch: int
    precision: Precision
    gradient_precision: Precision
    communication_precision: Precision
    zero: ZeroSection
    topology: Topology
    loss_chunk_tokens: int = 1024
    checkpoint_activations_every: int = 0
    embedding_weight_decay: bool = True
    document_mask: bool = False
    one_memory: bool = False

    def with_micro_batch(self, micro_batch: int) -> MemoryCase:
        return replace(self, micro_batch=micro_batch)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank. `host` is the part that offload keeps in the CPU's memory, by part.

    Attributes:
        weights: what the model computes with.
        gradients: where gradients are accumulated.
        master: the fp32 weights that the optimizer updates, where they are apart from `weights`.
        moments: Adam's two.
        buckets: communication buffers, and under ZeRO 3 the weights gathered at one time.
        activations: what the forward pass keeps for the backward pass.
        loss: the chunk of logits and the gradients of head and hidden states.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    buckets: int
    activations: int
    loss: int
    host: dict[str, int]
    one_memory: bool = False

    def parts(self) -> dict[str, int]:
        """Part -> bytes on the device."""
        names = ("weights", "gradients", "master", "moments", "buckets", "activations", "loss")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Bytes in the device's memory; on a CPU with what is offloaded, which lies there too."""
        return sum(self.parts().values()) + (sum(self.host.values()) if self.one_memory else 0)


def estimate_memory(case: MemoryCase) -> MemoryPlan:
    """Bytes per rank by part; the fullest rank where they differ."""
    states = _states(case)
    sequence, shape = case.sequence_length, case.shape
    return MemoryPlan(
        **states,
        buckets=_bucket_bytes(case),
        activations=activation_bytes(
            shape,
            case.micro_batch,
            sequence,
            BYTES[case.precision],
            case.checkpoint_activations_every,
            case.topology,
            case.document_mask,
        ),
        loss=loss_bytes(
            shape, case.micro_batch * sequence, BYTES[case.precision], case.loss_chunk_tokens, case.topology.tensor
        ),
        host=_host(case),
        one_memory=case.one_memory,
    )


def checkpoint_bytes(shape: ModelShape) -> int:
    """A checkpoint's tensors: the fp32 master and two fp32 moments of every parameter, whatever the layout."""
    return 12 * shape.parameter_count()


def parameter_groups(case: MemoryCase) -> list[list[int]]:
    """Elements of this rank's parameters in the optimizer's groups: those that decay, those that do not."""
    decaying: list[int] = []
    others: list[int] = []
    for name, shape in _local_parameters(case).items():
        embedding = name.startswith("embedding.")
        decays = len(shape) >= 2 and (case.embedding_weight_decay or not embedding)
        (decaying if decays else others).append(math.prod(shape))
    return [group for group in (decaying, others) if group]


def _local_parameters(case: MemoryCase) -> dict[str, tuple[int, ...]]:
    """The parameters of the fullest rank: matrices split by tensor parallelism, layers by the pipeline."""
    tensor, stages = case.topology.tensor, case.topology.pipeline
    layers = math.ceil(case.shape.num_hidden_layers / stages)
    local: dict[str, tuple[int, ...]] = {}
    for name, shape in case.shape.parameters().items():
        if name.startswith("layers.") and int(name.split(".")[1]) >= layers:
            continue
        whole = len(shape) < 2 or name.startswith("embedding.positions")
        local[name] = shape if whole else (math.ceil(shape[0] / tensor), *shape[1:])
    if stages > 1:
        # The head is on the last stage; the first one holds the embeddings and is as full or fuller.
        local.pop("head.weight", None)
    return local


def _states(case: MemoryCase) -> dict[str, int]:
    """weights, gradients, master and moments on the device."""
    ranks, stage = case.topology.data, case.zero.stage
    low, accumulated = BYTES[case.precision], BYTES[case.gradient_precision]
    groups = parameter_groups(case)
    elements = sum(sum(group) for group in groups)
    offload_optimizer, offload_param = _offloads(case)
    if stage == 0:
        return {"weights": low * elements, "gradients": low * elements, "master": 0, "moments": 8 * elements}
    if stage == 3:
        own = sum(math.ceil(count / ranks) for group in groups for count in group)
        # In fp32 ZeRO 3 updates its partition of the weights in place.
        apart = case.precision != "fp32" or offload_optimizer
        return {
            "weights": 0 if offload_param else low * own,
            "gradients": 0 if offload_optimizer else accumulated * own,
            "master": 0 if offload_optimizer or not apart else 4 * own,
            "moments": 0 if offload_optimizer else 8 * own,
        }
    padded = sum(_padded(sum(group), ranks) for group in groups)
    own = padded // ranks
    if stage == 2:
        gradients = 0 if offload_optimizer and case.gradient_precision == case.precision else accumulated * own
    elif _bf16_optimizer(case):
        gradients = accumulated * padded + low * elements
    else:
        gradients = (low if case.gradient_precision == case.precision else accumulated) * elements
    return {
        "weights": low * padded,
        "gradients": gradients,
        "master": 0 if offload_optimizer else 4 * own,
        "moments": 0 if offload_optimizer else 8 * own,
    }


def _host(case: MemoryCase) -> dict[str, int]:
    """What offload keeps in the CPU's memory."""
    ranks, stage = case.topology.data, case.zero.stage
    offload_optimizer, offload_param = _offloads(case)
    groups = parameter_groups(case)
    if stage == 3:
        own = sum(math.ceil(count / ranks) for group in groups for count in group)
    else:
        own = sum(_padded(sum(group), ranks) // ranks for group in groups)
    host: dict[str, int] = {}
    if offload_optimizer:
        # The optimizer reads fp32 gradients of its own beside those that are accumulated.
        accumulated = BYTES[case.gradient_precision] * own if stage == 3 else 0
        buffer = 0 if stage == 3 else BYTES[case.precision] * own
        host = {"gradients": 4 * own + accumulated, "master": 4 * own, "moments": 8 * own, "buckets": buffer}
    if offload_param:
        host["weights"] = BYTES[case.precision] * own
    return host


def _bucket_bytes(case: MemoryCase) -> int:
    """Communication buffers at their largest."""
    zero, stage = case.zero, case.zero.stage
    counts = [count for group in parameter_groups(case) for count in group]
    overlap = zero.overlap_comm if zero.overlap_comm is not None else stage == 3
    sent = BYTES[case.communication_precision]
    # On a CPU pages that are never written to take no memory.
    bucket = min(zero.reduce_bucket_size, sum(counts)) if case.one_memory else zero.reduce_bucket_size
    if stage == 0:
        return 0 if case.topology.data == 1 else 4 * min(sum(counts), 500_000_000)
    if stage == 3:
        largest_block = max(counts, default=0)
        gathered = min(sum(counts), zero.max_live_parameters, largest_block + 2 * zero.prefetch_bucket_size)
        return sent * bucket + BYTES[case.precision] * gathered
    if _bf16_optimizer(case):
        return 4 * min(sum(counts), 500_000_000)  # one flattened copy of what is being reduced
    staged = BYTES[case.gradient_precision if stage == 1 else case.precision]
    return staged * bucket * (2 if overlap else 1) if zero.contiguous_gradients else 0


def _bf16_optimizer(case: MemoryCase) -> bool:
    """Stage 1 in bf16 with fp32 gradients runs DeepSpeed's BF16_Optimizer: whole fp32 gradients on every rank."""
    return (
        case.zero.stage == 1
        and case.precision == "bf16"
        and case.gradient_precision == "fp32"
        and not _offloads(case)[0]
    )


def _offloads(case: MemoryCase) -> tuple[bool, bool]:
    optimizer, parameters = case.zero.offload_optimizer, case.zero.offload_param
    return (
        optimizer is not None and optimizer.device != "none",
        parameters is not None and parameters.device != "none",
    )


def _padded(count: int, ranks: int) -> int:
    alignment = _ALIGNMENT * ranks
    return math.ceil(count / alignment) * alignment
