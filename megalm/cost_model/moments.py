"""The fullest moments of a step and of the start, by formula: no torch.

Of a step these are activations and the loss, for the block of megalm/model. The formulas count the tensors that
PyTorch's autograd saves, and the gradients beside them at the fullest moments: while the loss is computed, and in the
backward pass of each block, in which no loss is left. Uncompiled; a test compares them with a rehearsal, and with what
is alive on a CPU. Of the start they follow how megalm builds the model and DeepSpeed 0.19.8 lays out its states; a test
compares them with the live tensors of starting engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from megalm.cost_model.pipeline_simulation import most_kept
from megalm.model.model_config import first_key, is_stacked, kept_probabilities, query_blocks

if TYPE_CHECKING:
    from megalm.config.schema import Recompute
    from megalm.cost_model.memory import Groups, MemoryCase, Share

_RING_TILE = 1024  # queries, and keys, of ring_attention.py


# --- a step -----------------------------------------------------------------------------------------------------------


class _Half(NamedTuple):
    """Bytes of a block's attention or MLP.

    Attributes:
        kept: what autograd saves, the half's input included.
        gradients: what the backward pass holds at most beside it and the gradient of the half's output.
    """

    kept: int
    gradients: int


class BlockBytes(NamedTuple):
    """Bytes of a block.

    Attributes:
        kept: from its forward to its backward pass.
        working: what its backward pass holds at most beyond that: gradients, and what it computes again.
    """

    kept: int
    working: int


class StepMoment(NamedTuple):
    """Bytes on the device at one moment of a step, beside weights and states.

    Attributes:
        unmade: the part of the step's gradients that exists at no earlier moment.
    """

    activations: int
    loss: int
    unmade: float = 0.0


def fullest_moment(case: MemoryCase, share: Share, gradients: int) -> tuple[int, int]:
    """Bytes of activations and of the loss when a step needs the most.

    Args:
        gradients: bytes of all accumulated gradients; activations take the place of those that come later.
    """
    found = ((moment.activations - int(moment.unmade * gradients), moment.loss) for moment in step_moments(case, share))
    activations, loss = max(found, key=sum)
    return max(0, activations), loss


def step_moments(case: MemoryCase, share: Share) -> Iterator[StepMoment]:
    """The moments of which one is the fullest of a step, of each stage of the rank."""
    hidden, kept = _stream(case, share) * case.element_bytes, kept_bytes(case, share)
    put_off = {
        stage: sum(put_off_bytes(case, share, layer) for layer in _trained_blocks(case, numbers))
        for stage, numbers in zip(share.stages, share.stage_blocks, strict=True)
    }
    most, trained = _most_kept(case, share, kept, put_off), _trained_blocks(case, share.blocks)
    # Gradients of the step's first micro-batch come one by one, unless DeepSpeed has room for all of them.
    comes_late = case.accumulation == 1 and case.zero.stage < 3 and not case.uses_bf16_optimizer
    for stage, numbers in zip(share.stages, share.stage_blocks, strict=True):
        is_last, table = stage == share.last_stage, 0
        if is_last:
            forward, backward = loss_moments(case, share.tensor)
            late, last_input = float(comes_late), _inputs_on_device(case, share, at_once=1)
            yield StepMoment(most + last_input, forward, late)
            yield StepMoment(most + last_input - hidden, backward, late)
            if case.shape.tie_word_embeddings:  # its gradient waits for that of the embedding
                table = _table_bytes(case, share.tensor)
        below, whole = most - kept[stage] + (0 if is_last else hidden), _whole_blocks(case, numbers)
        above = put_off[stage]
        offloaded = _inputs_on_device(case, share, at_once=2)  # the one in use, and one on its way
        for layer in _trained_blocks(case, numbers):
            block = block_bytes(case, share, "full" if layer in whole else case.recompute, layer)
            below += block.kept - (hidden if case.offload_activations and layer in whole else 0)
            above -= put_off_bytes(case, share, layer)
            is_left = comes_late and not case.reduces_nothing
            left = (trained.index(layer) + 1) / len(trained) if is_left else 0.0
            yield StepMoment(below + above + offloaded + hidden + block.working, table, left)
        if not trained:
            yield StepMoment(below + hidden, 0)


def kept_bytes(case: MemoryCase, share: Share) -> dict[int, int]:
    """Bytes that each stage keeps of a micro-batch from forward to backward, but for what lies in the CPU's memory."""
    stream = _stream(case, share)
    hidden, kept = stream * case.element_bytes, {}
    # Document numbers; attention builds its masks block by block.
    mask = case.micro_batch * case.sequence_length * 4 if case.document_mask else 0
    for stage, numbers in zip(share.stages, share.stage_blocks, strict=True):
        whole = _whole_blocks(case, numbers)
        blocks = sum(
            block_bytes(case, share, "full" if layer in whole else case.recompute, layer).kept
            for layer in _trained_blocks(case, numbers)
        )
        # The last stage keeps its final norm and the head's input; another stage keeps the output that it sends on.
        end = hidden + (stream * _norm_bytes(case) if stage == share.last_stage else 0)
        if case.offload_activations:  # a stage holds what it receives
            blocks += (hidden if stage else 0) - len(whole) * hidden
        kept[stage] = blocks + end + mask
    return kept


def _most_kept(case: MemoryCase, share: Share, sizes: Mapping[int, int], put_off: Mapping[int, int]) -> int:
    """Of all micro-batches in flight at once, given what one keeps in each stage of the rank, as in `most_kept`."""
    if case.topology.pipeline == 1:
        return sizes[share.stage]
    schedule = case.schedule
    if schedule.name == "1f1b":  # micro-batches beyond the ranks are kept instead of others
        schedule = replace(schedule, micro_batches=min(schedule.micro_batches, schedule.ranks))
    return int(most_kept(schedule.actions(share.stage), sizes, put_off))


def offloaded_inputs(case: MemoryCase, share: Share) -> dict[str, int]:
    """The block inputs in the CPU's memory."""
    if not case.offload_activations:
        return {}
    each = _stream(case, share) * case.element_bytes
    if not case.on_cpu:
        each = 1 << (each - 1).bit_length()  # torch allocates page-locked memory in powers of two
    counts = [len(_whole_blocks(case, blocks)) for blocks in share.stage_blocks]
    sizes = {stage: each * count for stage, count in zip(share.stages, counts, strict=True)}
    return {"block inputs": _most_kept(case, share, sizes, dict.fromkeys(sizes, 0))}


def put_off_bytes(case: MemoryCase, share: Share, layer: int) -> int:
    """What a block keeps for the gradients of its weights that its backward pass puts off.

    The inputs of its linear layers and the gradients of their outputs.
    """
    if case.topology.pipeline == 1 or not case.schedule.divides_backward:
        return 0
    shape, tensor, tokens = case.shape, share.tensor, case.tokens
    outputs = 2 if shape.gated_mlp else 1  # of an MLP's first layers
    stream = _stream(case, share)
    heads = 2 * share.heads + 2 * share.key_value_heads
    elements = 2 * stream + tokens * heads * shape.head_dim
    if layer not in shape.moe_layers:
        return (elements + 2 * stream + (1 + outputs) * tokens * shape.intermediate_size // tensor) * case.element_bytes
    rows, expert = tokens * shape.num_experts_per_token, (shape.moe_intermediate_size or 0) // tensor
    elements += 2 * rows * shape.hidden_size + (1 + outputs) * rows * expert
    if shape.num_shared_experts:
        elements += 2 * stream + (1 + outputs) * tokens * shape.num_shared_experts * expert
    return elements * case.element_bytes


def block_bytes(case: MemoryCase, share: Share, recompute: Recompute, layer: int = 0) -> BlockBytes:
    """What a block keeps, and what its backward pass holds: that of its MLP comes first."""
    hidden = _stream(case, share) * case.element_bytes
    attention, mlp = _attention(case, share, layer), _mlp(case, share, layer)
    spared = 0
    if recompute == "norms" and case.shape.norm_placement != "post":
        spared = _stream(case, share) * _norm_bytes(case)
    tiled = spared if case.mlp_chunk_tokens is None else 0  # a tile's norm is computed again in any case
    # What is there of the two halves: between the passes, and when the backward pass is in the MLP.
    kept = {
        "none": attention.kept + mlp.kept,
        "norms": attention.kept + mlp.kept - spared - tiled,
        "attention": hidden + mlp.kept,
        "mlp": attention.kept + hidden,
        "full": hidden,
    }[recompute]
    in_mlp = {"attention": hidden}.get(recompute, attention.kept - spared) + mlp.kept - tiled + mlp.gradients
    in_attention = attention.kept - spared + attention.gradients
    if case.shape.parallel_residual:  # the MLP's part of the input's gradient
        in_attention += hidden
    # The gradient of a half's layers is another one than that of the residual stream.
    apart = hidden if case.shape.norm_placement != "pre" or case.shape.dropout > 0 else 0
    return BlockBytes(kept, max(in_mlp, in_attention) - kept + apart + _float8_bytes(case, share))


def loss_moments(case: MemoryCase, tensor: int) -> tuple[int, int]:
    """Bytes of the chunked cross-entropy in its forward and its backward pass.

    Args:
        tensor: ranks that divide the vocabulary.
    """
    vocabulary, size = math.ceil(case.shape.vocab_size / tensor), case.element_bytes
    chunk = min(case.tokens, case.loss_chunk_tokens)
    # Logits, their gradient; probabilities in fp32, and the slope of capped logits.
    capped = case.shape.final_logit_softcapping is not None
    logits = chunk * vocabulary * (2 * size + 4 + (12 if capped else 0))
    # The weight's gradient is summed in fp32. A CPU holds a chunk's product beside it; the backward pass a narrow copy
    # and the scaled gradient of the hidden states.
    narrow = _table_bytes(case, tensor)
    hidden_gradient = case.tokens * case.shape.hidden_size * size
    weight = narrow // size * 4
    narrow = narrow if size < 4 else 0
    scaled = hidden_gradient if case.shape.width_multiplier != 1 else 0  # beside the hidden states that the head gets
    forward = logits + scaled + (narrow if case.on_cpu else 0)
    return hidden_gradient + weight + forward, 2 * hidden_gradient + weight + narrow


def _table_bytes(case: MemoryCase, tensor: int) -> int:
    """Bytes of the gradient of the head's weight, in the weight's type; 0: it is frozen."""
    head = "embedding.tokens.weight" if case.shape.tie_word_embeddings else "head.weight"
    elements = math.ceil(case.shape.vocab_size / tensor) * case.shape.hidden_size
    return 0 if head in case.frozen else elements * case.element_bytes


def _stream(case: MemoryCase, share: Share) -> int:
    """Elements of the residual stream of a micro-batch that a rank holds."""
    return case.tokens * case.shape.hidden_size // share.slices


def _trained_blocks(case: MemoryCase, blocks: Sequence[int]) -> list[int]:
    """Of these blocks those with a backward pass: those below every parameter that trains keep nothing."""
    return [index for index in blocks if index >= case.lowest_trained_block]


def _whole_blocks(case: MemoryCase, blocks: Sequence[int]) -> list[int]:
    """Of these blocks those that are recomputed whole."""
    every = 1 if case.recompute == "full" else case.checkpoint_activations_every
    return [index for index in _trained_blocks(case, blocks) if every and index % every == 0]


def _inputs_on_device(case: MemoryCase, share: Share, at_once: int) -> int:
    """Bytes of the inputs that lie in the CPU's memory, of which this many are on the device."""
    count = min(at_once, len(_whole_blocks(case, share.blocks))) if case.offload_activations else 0
    return count * _stream(case, share) * case.element_bytes


def _norm_bytes(case: MemoryCase, rms: bool | None = None) -> int:
    """Bytes per element that a norm saves: its input, or input and result in fp32 without a fused RMS norm.

    Args:
        rms: by default, whether the model's norms are of that kind.
    """
    is_rms = case.shape.normalization == "rms_norm" if rms is None else rms
    return 8 if case.on_cpu and is_rms else case.element_bytes


def _norms(case: MemoryCase, share: Share) -> int:
    """Bytes that a half saves of its norms and its dropout.

    Before the layers or after them, the input of one norm is kept; a mask has one byte an element.
    """
    stream = _stream(case, share)
    norms = (2 if case.shape.norm_placement == "both" else 1) * stream * _norm_bytes(case)
    return norms + (stream if case.shape.dropout > 0 else 0)


def _attention(case: MemoryCase, share: Share, layer: int) -> _Half:
    shape, size, tokens = case.shape, case.element_bytes, case.tokens
    context = case.topology.context
    queries, keys = tokens * share.heads * shape.head_dim, tokens * share.key_value_heads * shape.head_dim
    # Attention of a context group reads whole sequences of fewer heads, of which each rank needs a key/value head.
    read = keys if case.ring else max(keys, tokens * context * shape.head_dim)
    read = queries if case.repeats_keys else read
    # The projections' input; queries, keys, values and attention's output, of which a context group has a second one.
    kept = _norms(case, share) + (_stream(case, share) + (3 if context > 1 else 2) * queries + 2 * read) * size
    if shape.qk_norm:
        kept += (queries + keys) * _norm_bytes(case, rms=True)
    gradients = (2 * queries + 2 * read) * size  # of the output, queries, keys and values
    if _uses_flash(case, layer):  # the queries' in fp32, and those of each query head's keys and values
        gradients += queries * (4 + (2 * size if share.key_value_heads < share.heads else 0))
    if case.on_cpu and not case.ring:
        heads = case.micro_batch * share.heads // context
        kept += heads * kept_probabilities(shape, layer, case.sequence_length) * size
        # Of one block of queries, the gradients of probabilities and of scores.
        window, blocks = shape.window(layer), query_blocks(case.sequence_length)
        gradients += 2 * heads * max((end - start) * (end - first_key(start, window)) for start, end in blocks) * size
    return _Half(kept, max(gradients, _context_bytes(case, share)))


def _uses_flash(case: MemoryCase, layer: int) -> bool:
    shape = case.shape
    is_plain = shape.attn_logit_softcapping is None and not shape.attention_sinks and shape.window(layer) is None
    on_flash = not (case.on_cpu or case.ring or case.repeats_keys or case.document_mask)
    return is_plain and on_flash and case.element_bytes < 4


def _context_bytes(case: MemoryCase, share: Share) -> int:
    """What attention of a context group holds in its backward pass: messages; a ring: sums in fp32, a tile's scores."""
    context = case.topology.context
    if context == 1:
        return 0
    tokens, width = case.tokens, case.shape.head_dim
    queries = tokens * share.heads * width
    keys = 2 * tokens * (share.key_value_heads if case.ring else max(share.key_value_heads, context)) * width
    if not case.ring:
        return 2 * (queries + keys) * case.element_bytes
    tile = min(_RING_TILE, case.sequence_length // context // 2)
    scores = case.micro_batch * share.heads * tile**2 * (8 + 2 * case.element_bytes)
    return scores + 4 * (queries + 3 * keys) + 2 * keys * case.element_bytes


def _mlp(case: MemoryCase, share: Share, layer: int) -> _Half:
    shape, size, hidden = case.shape, case.element_bytes, _stream(case, share) * case.element_bytes
    if layer in shape.moe_layers:
        return _experts(case, share)
    inner = case.tokens * shape.intermediate_size // share.tensor * size
    # The norm and its output; up, gelu | gate, silu, up, product.
    kept = _norms(case, share) + hidden + (4 if shape.gated_mlp else 2) * inner
    widened = case.on_cpu and size < 4 and shape.normalization == "rms_norm"  # each norm keeps an fp32 copy
    if shape.parallel_residual and not widened:  # both norms, or projections, have one input
        kept -= hidden
    # Of gelu | of product, silu and up, less the product.
    whole = _Half(kept, (2 if shape.gated_mlp else 1) * inner)
    return whole if case.mlp_chunk_tokens is None else _tiles(case, share, whole)


def _tiles(case: MemoryCase, share: Share, whole: _Half) -> _Half:
    """An MLP in tiles keeps its input. Its backward pass holds its input's gradient, and one tile.

    Args:
        whole: of the MLP that is not in tiles.
    """
    hidden = _stream(case, share) * case.element_bytes
    mask = _stream(case, share) if case.shape.dropout > 0 else 0
    tokens = min(case.tokens, case.mlp_chunk_tokens or case.tokens)
    name = f"layers.{share.blocks[0]}.mlp."
    weights = sum(math.prod(size) for own, size in share.parameters().items() if own.startswith(name))
    largest = weights // (3 if case.shape.gated_mlp else 2)
    # The weights' gradients are summed in fp32, beside the first one of a tile, or all of them at its end.
    tile = (whole.kept - mask + whole.gradients) * tokens // case.tokens
    narrow = case.element_bytes
    return _Half(hidden + mask, hidden + 4 * weights + max(tile + narrow * largest, narrow * weights))


def _experts(case: MemoryCase, share: Share) -> _Half:
    """A router, its experts and the shared ones, which read a whole sequence."""
    shape, size = case.shape, case.element_bytes
    expert, count = shape.moe_intermediate_size or 0, shape.num_experts or 0
    rows, factors = case.tokens * shape.num_experts_per_token, 4 if shape.gated_mlp else 2
    stream = case.tokens * shape.hidden_size
    # The router's input in fp32, its logits, scores and their normalised form; of each row order and place.
    router = stream * 4 + 3 * 4 * case.tokens * count + 2 * 8 * rows
    # Rows sorted by expert, up, gelu | gate, silu, up, product, and outputs in the tokens' order.
    outputs, inner = rows * shape.hidden_size * size, rows * expert // share.tensor * size
    shared = case.tokens * factors * shape.num_shared_experts * expert // share.tensor * size
    if shape.num_shared_experts and size < 4:  # their input, which the router has in fp32
        shared += stream // share.slices * size
    if share.slices > 1:
        shared += stream * size
    kept = _norms(case, share) + router + 2 * outputs + factors * inner + shared
    # Of the outputs | of gelu | of product, silu and up, less the product and the outputs.
    return _Half(kept, max(outputs, inner, (2 if shape.gated_mlp else 1) * inner - outputs))


def _float8_bytes(case: MemoryCase, share: Share) -> int:
    """Rounded copies of both factors of the largest product: one byte an element, and a CPU's in fp32 beside them."""
    hidden, inner = case.shape.hidden_size, case.shape.intermediate_size // share.tensor
    elements = max(case.tokens * (hidden + inner), case.tokens * max(hidden, inner) + hidden * inner)
    return elements * (5 if case.on_cpu else 1) if case.float8 else 0


# --- the start --------------------------------------------------------------------------------------------------------


class StartMoment(NamedTuple):
    """Bytes that a rank holds at one time, on the device and in the CPU's memory."""

    device: int
    host: int


def start_moments(
    case: MemoryCase, share: Share, groups: Groups, frozen: int, secondary: int = 0
) -> Iterator[StartMoment]:
    """The fullest moments of the start: one of them is the peak of the device, one of the CPU's memory.

    Args:
        groups: elements of the parameters in the optimizer's groups.
        frozen: elements of frozen parameters that a rank holds.
        secondary: bytes of the second copy of ZeRO 3's weights.
    """
    sizes, frozen_bytes = share.shape.parameters(), case.element_bytes * frozen
    # The one initial weight that a rank draws, in fp32, before it is cut, and what is on its way to the device.
    drawn = 4 * max(math.prod(sizes[name]) // (share.expert if is_stacked(name) else 1) for name in share.parameters())
    if case.element_bytes < 4:
        drawn += case.element_bytes * max(math.prod(size) for size in share.parameters().values())
    if case.zero.stage == 3:
        states = _stage_3(case, groups, _partitioning(case, share), drawn, frozen_bytes)
        yield from (StartMoment(it.device + secondary, it.host) for it in states)
        return
    yield StartMoment(case.element_bytes * sum(group.elements for group in groups) + frozen_bytes, drawn)
    if case.zero.stage:
        yield from (StartMoment(it.device + frozen_bytes, it.host) for it in _flat_groups(case, groups))


def _partitioning(case: MemoryCase, share: Share) -> int:
    """Bytes of parameters at most while ZeRO 3 divides one module after another: earlier parts and this module."""
    peak = live = 0
    for module in share.modules():
        live += sum(module.values())
        for name, count in module.items():
            part = math.ceil(count / case.copies_of(name))
            peak = max(peak, live + part)
            live += part - count
    return case.element_bytes * peak


def _stage_3(case: MemoryCase, groups: Groups, partitioning: int, drawn: int, frozen: int) -> Iterator[StartMoment]:
    parts = [group.parts for group in groups]
    own = sum(map(sum, parts))
    weights = case.element_bytes * own
    bucket = case.communication_bytes * case.zero.reduce_bucket_size if case.zero.contiguous_gradients else 0
    if case.offloads_parameters:
        largest_block = partitioning - weights - frozen
        yield StartMoment(largest_block, drawn + weights + frozen)
        yield StartMoment(0, 3 * weights + frozen)  # the parts, their flat buffer, and its pinned copy
    else:
        yield StartMoment(partitioning, drawn)
        yield StartMoment(weights + frozen, weights)  # the parts become one buffer by way of the CPU's memory
    device, host = (0, weights + frozen) if case.offloads_parameters else (weights + frozen, 0)
    gradients = case.gradient_bytes * own
    gathered = case.element_bytes * max(
        max(group.counts) for group in groups
    )  # each parameter once, for DeepSpeed's hooks
    largest = 4 * max(sub_group for group in parts for sub_group in _sub_groups(group, case.zero.sub_group_size))
    if case.swaps:
        return  # a sub-group at a time, as in a step
    if case.offloads_optimizer:
        pinned = case.zero.offload_optimizer is not None and case.zero.offload_optimizer.pin_memory
        copies = largest if pinned and not case.on_cpu else 0
        yield StartMoment(device, host + 8 * own + largest + copies)  # masters and their gradients; one more sub-group
        yield StartMoment(device + bucket + gathered, host + 8 * own + gradients * (2 if copies else 1))
    else:
        yield StartMoment(device + 4 * own + largest, host)  # masters, and a second copy or the gradient of a sub-group
        yield StartMoment(device + 4 * own + bucket + gradients + gathered, host)


def _sub_groups(parts: Sequence[int], limit: int) -> Iterator[int]:
    """Elements of each sub-group: a parameter group is cut where it has reached the limit."""
    size = 0
    for part in parts:
        size += part
        if size >= limit:
            yield size
            size = 0
    if size:
        yield size


def _flat_groups(case: MemoryCase, groups: Groups) -> Iterator[StartMoment]:
    """ZeRO 1 and 2: each group becomes one flat buffer beside its parameters, of which a rank copies its part."""
    low, offload = case.element_bytes, case.offloads_optimizer
    flat = low * sum(group.elements for group in groups)
    device = host = 0
    for group in groups:
        padded = group.padded
        part = padded // group.ranks
        beside = flat + device + low * padded
        # Where the device has no room for the buffer, DeepSpeed makes it in the CPU's memory; BF16_Optimizer does not.
        fits = case.uses_bf16_optimizer or case.device_bytes is None or beside <= case.device_bytes
        yield StartMoment(beside, host) if fits else StartMoment(flat + device, host + 2 * low * padded)
        flat += low * (padded - group.elements)
        copied = low * part  # in the model's precision, on its way to fp32
        if offload:
            host += (4 + low) * part
            yield StartMoment(flat + device + copied, host + 4 * part)
        else:
            yield StartMoment(flat + device + copied + (4 * part if low != 4 else 0), host)
            device += 4 * part
        if case.uses_bf16_optimizer:
            device += case.gradient_bytes * padded
            yield StartMoment(flat + device, host)
    if not case.uses_bf16_optimizer:
        gradients = 4 * sum(group.padded // group.ranks for group in groups)  # freed at once without offload
        yield StartMoment(flat + device, host + gradients) if offload else StartMoment(flat + device + gradients, host)
