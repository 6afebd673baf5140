"""How much memory a rank needs, part by part, as DeepSpeed 0.19.8 really lays it out.

Weights, gradients, master weights and moments are exact, padding included: a test compares them with a running
engine. Buckets, activations and the loss are formulas for the block of megalm/model.

Words: "low precision" is what the model computes in (2 bytes for bf16 and fp16, 4 for fp32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megalm.config.deepspeed.json_schema import ZeroSection
from megalm.config.precision import Precision
from megalm.cost_model.shard_sizes import Share, shares
from megalm.model.attention_tiles import kept_probabilities
from megalm.model.model_config import ModelConfig
from megalm.topology import AXES, Topology

# Bytes that the forward pass keeps for the backward pass, and that the loss needs, by formula.
#
# For the block of megalm/model: pre-norm, separate query, key and value projections, attention, GELU or SwiGLU.
# What is counted is what PyTorch's autograd saves; sums of residuals save nothing.


def activation_bytes(
    share: Share,
    micro_batch: int,
    sequence_length: int,
    element_bytes: int,
    checkpoint_every: int,
    document_mask: bool = False,
    on_cpu: bool = False,
    micro_batches: int = 1,
) -> int:
    """Bytes that a rank keeps from forward to backward, of all micro-batches that its stage has under way.

    Args:
        element_bytes: 2 for bf16 and fp16, 4 for fp32.
        checkpoint_every: every n-th block keeps its input only and is computed again; 0: none.
        on_cpu: where RMS norms have no fused kernel, and attention keeps the probabilities of shorter sequences.
        micro_batches: of one step.
    """
    tokens = micro_batch * sequence_length
    block = tokens * block_bytes_per_token(share, element_bytes, on_cpu)
    if on_cpu:
        block += micro_batch * share.heads * kept_probabilities(sequence_length) * element_bytes
    hidden = tokens * share.shape.hidden_size * element_bytes // share.slices
    blocks = range(share.first_block, share.first_block + share.blocks)
    recomputed = len([index for index in blocks if checkpoint_every and index % checkpoint_every == 0])
    kept = (share.blocks - recomputed) * block + recomputed * hidden
    norm_bytes = _norm_bytes(share.shape.style == "llama", element_bytes, on_cpu)
    # The last stage's final norm and what the head reads; of another stage what it has sent on.
    end = tokens * share.shape.hidden_size * norm_bytes // share.slices + hidden if share.is_last else hidden
    mask = tokens * 4 if document_mask else 0  # document numbers; attention makes its masks block by block
    working = 2 * hidden + (block if recomputed else 0)  # gradients, and the one block that is computed again
    return (kept + end + mask) * share.in_flight(micro_batches) + working


def block_bytes_per_token(share: Share, element_bytes: int, on_cpu: bool = False) -> int:
    """Bytes that one block saves for each token; key and value heads are counted repeated, as attention keeps them."""
    shape = share.shape
    stream, inner = shape.hidden_size // share.slices, shape.intermediate_size // share.tensor
    queries, keys = share.heads * shape.head_dim, share.key_value_heads * shape.head_dim
    norms = 2 * stream * _norm_bytes(shape.style == "llama", element_bytes, on_cpu)
    if shape.qk_norm:
        norms += (queries + keys) * _norm_bytes(True, element_bytes, on_cpu)
    # What query, key and value read and what the MLP reads; queries, keys, values and the output of attention.
    elements = 2 * stream + 4 * queries
    elements += 2 * inner if shape.style == "gpt2" else 4 * inner  # up, gelu | gate, silu, up, product
    dropout_masks = 2 * stream if shape.dropout > 0 else 0  # one byte each
    return norms + elements * element_bytes + dropout_masks


def _norm_bytes(rms: bool, element_bytes: int, on_cpu: bool) -> int:
    """Bytes an element that a norm saves: its input; without a fused RMS norm, the input and the result in fp32."""
    return 8 if on_cpu and rms else element_bytes


def loss_bytes(shape: ModelConfig, tokens: int, element_bytes: int, chunk_tokens: int, tensor: int = 1) -> int:
    """Bytes of the chunked cross-entropy at its largest: a chunk's logits several times over, and two gradients."""
    vocabulary = math.ceil(shape.vocab_size / tensor)
    chunk = min(tokens, chunk_tokens)
    logits = chunk * vocabulary * (2 * element_bytes + 4)  # logits, their gradient; probabilities in fp32
    hidden_gradient = tokens * shape.hidden_size * element_bytes
    # Summed in fp32, with the product of one chunk beside it.
    weight_gradient = vocabulary * shape.hidden_size * (4 + element_bytes)
    return logits + hidden_gradient + weight_gradient


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# ZeRO 1 and 2 pad each parameter group to a multiple of 2 x ranks elements, for NCCL's alignment.
_ALIGNMENT = 2

Groups = list[list[int]]


@dataclass(frozen=True)
class MemoryCase:
    """A run as far as memory depends on it.

    Attributes:
        gradient_precision: what gradients are accumulated in.
        communication_precision: what they are sent in.
        one_memory: the device is a CPU, so that what is offloaded lies in the same memory.
        checkpoint_copy: checkpoints are written behind training, from copies in the CPU's memory.
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
    embedding_weight_decay: bool = True
    document_mask: bool = False
    one_memory: bool = False
    sequence_parallel: bool = False
    checkpoint_copy: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank. `host` is what offload and checkpoints keep in the CPU's memory, by part.

    Attributes:
        weights: what the model computes with.
        gradients: where gradients are accumulated.
        master: the fp32 weights that the optimizer updates; none in stage 0, which updates `weights`.
        moments: Adam's two.
        buckets: communication buffers, and under ZeRO 3 the weights gathered at one time.
        activations: what the forward pass keeps for the backward pass.
        loss: the chunk of logits and the gradients of head and hidden states.
        runtime: of a GPU, an allowance for CUDA's context, cuBLAS and NCCL.
        disk: the optimizer's states on NVMe.
        stage: of the pipeline; without one there is only this.
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
    disk: int = 0
    one_memory: bool = False
    stage: int = 0

    def parts(self) -> dict[str, int]:
        """Part -> bytes on the device."""
        names = ("weights", "gradients", "master", "moments", "buckets", "activations", "loss", "runtime")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Bytes in the device's memory; on a CPU with what is offloaded, which lies there too."""
        return sum(self.parts().values()) + (sum(self.host.values()) if self.one_memory else 0)


def estimate_memory(case: MemoryCase) -> MemoryPlan:
    """Bytes per rank by part, on the fullest rank."""
    return max(estimate_stages(case), key=lambda plan: plan.total)


def estimate_stages(case: MemoryCase) -> Iterator[MemoryPlan]:
    """The plan of each pipeline stage that no earlier stage is sure to be as full as: the first, the last, and of those
    between them the first with each number of blocks."""
    seen: set[tuple[bool, bool, int]] = set()
    for share in shares(case.shape, case.topology, case.sequence_parallel):
        kind = share.is_first, share.is_last, share.blocks
        if kind not in seen:
            seen.add(kind)
            yield _estimate(case, share)


def _estimate(case: MemoryCase, share: Share) -> MemoryPlan:
    groups = parameter_groups(case, share)
    device, host = _states(case, groups)
    on_disk = _swapped_bytes(case, groups)
    tokens = case.micro_batch * case.sequence_length
    return MemoryPlan(
        **device,
        buckets=_bucket_bytes(case, groups),
        activations=activation_bytes(
            share,
            case.micro_batch,
            case.sequence_length,
            BYTES[case.precision],
            case.checkpoint_activations_every,
            case.document_mask,
            on_cpu=case.one_memory,
            micro_batches=case.accumulation,
        ),
        loss=loss_bytes(case.shape, tokens, BYTES[case.precision], case.loss_chunk_tokens, share.tensor)
        if share.is_last
        else 0,
        runtime=_runtime_bytes(case),
        host=host,
        disk=on_disk,
        one_memory=case.one_memory,
        stage=share.stage,
    )


# An allowance by common experience, not measured here: CUDA's context with its kernels and cuBLAS's workspaces, and
# NCCL's buffers of each group of ranks.
_CUDA_CONTEXT, _NCCL_GROUP = 768 * 2**20, 256 * 2**20


def _runtime_bytes(case: MemoryCase) -> int:
    """Memory of a GPU that no tensor holds."""
    if case.one_memory:
        return 0
    groups = sum(case.topology.size(axis) > 1 for axis in AXES)
    return _CUDA_CONTEXT + _NCCL_GROUP * (groups + (groups > 1))  # of several axes, the group of all ranks too


def checkpoint_bytes(shape: ModelConfig) -> int:
    """A checkpoint's tensors: the fp32 master and two fp32 moments of every parameter, whatever the layout."""
    return 12 * shape.parameter_count()


def parameter_groups(case: MemoryCase, share: Share) -> Groups:
    """Elements of a rank's parameters in the optimizer's groups: those that decay, those that do not."""
    decaying: list[int] = []
    others: list[int] = []
    for name, shape in share.parameters().items():
        embedding = name.startswith("embedding.")
        decays = len(shape) >= 2 and (case.embedding_weight_decay or not embedding)
        (decaying if decays else others).append(math.prod(shape))
    return [group for group in (decaying, others) if group]


def _states(case: MemoryCase, groups: Groups) -> tuple[dict[str, int], dict[str, int]]:
    """weights, gradients, master and moments: on the device, and in the CPU's memory by offload."""
    stage = case.zero.stage
    low = BYTES[case.precision]
    if stage == 0:
        elements = sum(map(sum, groups))
        device = {"weights": low * elements, "gradients": low * elements, "master": 0, "moments": 8 * elements}
        return device, _checkpoint_copy(case, elements)
    own = _own_elements(case, groups)
    gradients, host_gradients = _gradients(case, groups, own)
    optimizer = {"master": 4 * own, "moments": 8 * own}
    offload_optimizer, offload_param = _offloads(case)
    weights = low * own if stage == 3 else low * sum(_padded(sum(group), case) for group in groups)
    device = {"weights": weights, "gradients": gradients, **optimizer}
    host = _checkpoint_copy(case, own)
    if offload_optimizer:
        device |= dict.fromkeys(optimizer, 0)
        host |= {"gradients": host_gradients, **optimizer} if not _swaps(case) else _swap_buffers(case, groups)
        if stage < 3:
            host["buckets"] = low * own  # updated weights on their way back
    if offload_param:
        device["weights"], host["weights"] = 0, low * own
    return device, host


def _swaps(case: MemoryCase) -> bool:
    offload = case.zero.offload_optimizer
    return offload is not None and offload.device == "nvme"


def _swap_buffers(case: MemoryCase, groups: Groups) -> dict[str, int]:
    """What stays in the CPU's memory of states on a disk: accumulated gradients, and one sub-group at a time."""
    offload = case.zero.offload_optimizer
    assert offload is not None
    own = _own_elements(case, groups)
    largest_part = max(math.ceil(count / case.topology.data) for group in groups for count in group)
    sub_group = min(own, case.zero.sub_group_size + largest_part)
    return {"gradients": BYTES[case.gradient_precision] * own, "swap buffers": 4 * offload.buffer_count * sub_group}


def _swapped_bytes(case: MemoryCase, groups: Groups) -> int:
    """Master, both moments and the gradient of what a rank owns."""
    return 16 * _own_elements(case, groups) if _swaps(case) else 0


def _checkpoint_copy(case: MemoryCase, elements: int) -> dict[str, int]:
    """What checkpoint.async writes from: the master and both moments of what this rank owns."""
    return {"checkpoint copy": 12 * elements} if case.checkpoint_copy else {}


def _gradients(case: MemoryCase, groups: Groups, own: int) -> tuple[int, int]:
    """Bytes of accumulated gradients on the device and, with an offloaded optimizer, in the CPU's memory."""
    elements = sum(map(sum, groups))
    low, accumulated = BYTES[case.precision], BYTES[case.gradient_precision]
    offload, same_type = _offloads(case)[0], case.gradient_precision == case.precision
    if case.zero.stage == 3:
        # Offloaded, the accumulated gradients lie beside the fp32 ones that the optimizer reads.
        return (0, (accumulated + 4) * own) if offload else (accumulated * own, 0)
    if _bf16_optimizer(case):
        # Whole fp32 gradients, and autograd's own, which are zeroed but never freed.
        return accumulated * sum(_padded(sum(group), case) for group in groups) + low * elements, 0
    if offload and same_type:
        return 0, 4 * own + (low * _touched_elements(groups, case) if case.accumulation > 1 else 0)
    if case.zero.stage == 1:
        return accumulated * elements, 4 * own
    # A gradient in the weights' own type is kept whole where the partition holds any of it.
    return (low * _touched_elements(groups, case) if same_type else accumulated * own), 4 * own


def _own_elements(case: MemoryCase, groups: Groups) -> int:
    """Elements of one rank's partition: each parameter divided (stage 3), or each group (stages 1 and 2)."""
    ranks = case.topology.data
    if case.zero.stage == 3:
        return sum(math.ceil(count / ranks) for group in groups for count in group)
    return sum(_padded(sum(group), case) // ranks for group in groups)


def _touched_elements(groups: Groups, case: MemoryCase) -> int:
    """Elements of all parameters that lie in a partition, wholly or in part; of the fullest partition."""
    ranks = case.topology.data
    totals = [0] * ranks
    for group in groups:
        size = _padded(sum(group), case) // ranks
        start = 0
        for count in group:
            for rank in range(start // size, (start + count - 1) // size + 1):
                totals[rank] += count
            start += count
    return max(totals)


def _bucket_bytes(case: MemoryCase, groups: Groups) -> int:
    """Communication buffers at their largest."""
    zero, stage = case.zero, case.zero.stage
    counts = [count for group in groups for count in group]
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


def _padded(count: int, case: MemoryCase) -> int:
    alignment = _ALIGNMENT * case.topology.data
    return math.ceil(count / alignment) * alignment
