"""Weights that do not train, as fragments of a checkpoint: the optimizer has no fp32 master of them.

Of each parameter every rank that holds the same of it keeps and saves an equal part, at any ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from megalm.checkpoint.shard_spec import FragmentKey, FragmentOnAccess, HasFragment
from megalm.model.layer_factory import ShardedAxis
from megalm.parallel.process_groups import AxisGroup


class FrozenWeights:
    """The frozen parameters of this rank.

    A run in 16 bits computes with rounded weights. Those that a checkpoint has in fp32, it must not lose: what rounding
    changes is kept in the CPU's memory, 4 bytes for each element of this rank's part. Weights that were 16-bit before,
    as those of most published models, need nothing.

    Args:
        parameters: canonical name -> frozen parameter; ZeRO 3 has divided it.
        shards: canonical name -> its shard.
        copies: canonical name -> the ranks that hold the same of it.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], shards: Mapping[str, ShardedAxis], copies: Mapping[str, AxisGroup]
    ) -> None:
        self._parameters = parameters
        self._shards = shards
        self._copies = copies
        self._unrounded: dict[str, Tensor] = {}  # canonical name -> this rank's part

    def fragments(self) -> Iterator[HasFragment]:
        """Yield this rank's parts, fp32."""
        for name in self._parameters:
            key = self._part(name)
            if self._shards[name].is_owner and key.count:
                yield FragmentOnAccess(key, partial(self._read, key))

    @torch.no_grad()
    def load(self, read: Callable[[FragmentKey], Tensor]) -> None:
        """Fill the weights; call before the optimizer's state is loaded, which then gathers ZeRO 3's small ones."""
        for name, parameter in self._parameters.items():
            part = self._part(name)
            divided = getattr(parameter, "ds_tensor", None)
            if divided is not None:
                own = values = read(part)
                divided.view(-1)[: part.count].copy_(values)
            else:
                values = read(self._range(name, 0, math.prod(self._shards[name].sizes)))
                parameter.copy_(values.view(parameter.shape))
                own = values[part.start : part.stop]
            is_rounded = not torch.equal(own.to(parameter.dtype).float(), own)
            self._unrounded.pop(name, None)
            if is_rounded and self._shards[name].is_owner:
                self._unrounded[name] = own.clone()

    def forget_second_copies(self) -> None:
        """Let ZeRO 3 make its second copies anew: after an update or a restore DeepSpeed renews what trains only.

        Call after the optimizer's state is loaded: for that DeepSpeed divides the small ones, as they were before.
        """
        for parameter in self._parameters.values():
            if hasattr(parameter, "ds_secondary_tensor"):
                parameter.ds_secondary_tensor = None

    def _read(self, key: FragmentKey) -> Tensor:
        if key.name in self._unrounded:
            return self._unrounded[key.name]
        parameter = self._parameters[key.name]
        divided = getattr(parameter, "ds_tensor", None)
        own = parameter.data.view(-1)[key.start : key.stop] if divided is None else divided.view(-1)[: key.count]
        return own.float()

    def _part(self, name: str) -> FragmentKey:
        """Elements that this rank keeps and saves; under ZeRO 3 the ones that it holds."""
        whole, copies = math.prod(self._shards[name].sizes), self._copies[name]
        size = math.ceil(whole / copies.size)
        return self._range(name, min(copies.index * size, whole), min((copies.index + 1) * size, whole))

    def _range(self, name: str, start: int, stop: int) -> FragmentKey:
        shard = self._shards[name]
        return FragmentKey(name, "master", shard.shape, start, stop, shard.rectangle)
