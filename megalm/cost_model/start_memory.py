"""The memory of a rank before its first step, as megalm builds the model and DeepSpeed 0.19.8 lays out its states.

No torch. A test compares it with the live tensors of starting engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megalm.model.model_config import is_stacked

if TYPE_CHECKING:
    from megalm.cost_model.memory import Groups, MemoryCase, Share


class Moment(NamedTuple):
    """Bytes that a rank holds at one time, on the device and in the CPU's memory."""

    device: int
    host: int


def start_moments(case: MemoryCase, share: Share, groups: Groups, frozen: int, secondary: int = 0) -> Iterator[Moment]:
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
        yield from (Moment(it.device + secondary, it.host) for it in states)
        return
    yield Moment(case.element_bytes * sum(group.elements for group in groups) + frozen_bytes, drawn)
    if case.zero.stage:
        yield from (Moment(it.device + frozen_bytes, it.host) for it in _flat_groups(case, groups))


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


def _stage_3(case: MemoryCase, groups: Groups, partitioning: int, drawn: int, frozen: int) -> Iterator[Moment]:
    parts = [group.parts for group in groups]
    own = sum(map(sum, parts))
    weights = case.element_bytes * own
    bucket = case.communication_bytes * case.zero.reduce_bucket_size if case.zero.contiguous_gradients else 0
    if case.offloads_parameters:
        largest_block = partitioning - weights - frozen
        yield Moment(largest_block, drawn + weights + frozen)
        yield Moment(0, 3 * weights + frozen)  # the parts, their flat buffer, and its pinned copy
    else:
        yield Moment(partitioning, drawn)
        yield Moment(weights + frozen, weights)  # the parts become one buffer by way of the CPU's memory
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
        yield Moment(device, host + 8 * own + largest + copies)  # masters and their gradients; one more sub-group
        yield Moment(device + bucket + gathered, host + 8 * own + gradients * (2 if copies else 1))
    else:
        yield Moment(device + 4 * own + largest, host)  # masters, and a second copy or the gradient of a sub-group
        yield Moment(device + 4 * own + bucket + gradients + gathered, host)


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


def _flat_groups(case: MemoryCase, groups: Groups) -> Iterator[Moment]:
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
        yield Moment(beside, host) if fits else Moment(flat + device, host + 2 * low * padded)
        flat += low * (padded - group.elements)
        copied = low * part  # in the model's precision, on its way to fp32
        if offload:
            host += (4 + low) * part
            yield Moment(flat + device + copied, host + 4 * part)
        else:
            yield Moment(flat + device + copied + (4 * part if low != 4 else 0), host)
            device += 4 * part
        if case.uses_bf16_optimizer:
            device += case.gradient_bytes * padded
            yield Moment(flat + device, host)
    if not case.uses_bf16_optimizer:
        gradients = 4 * sum(group.padded // group.ranks for group in groups)  # freed at once without offload
        yield Moment(flat + device, host + gradients) if offload else Moment(flat + device + gradients, host)
