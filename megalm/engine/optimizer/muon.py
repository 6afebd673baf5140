"""Muon: matrices step along their orthogonalised momentum, whole, whatever ranks hold their pieces; the rest by AdamW.

Momentum and master are divided as ZeRO, tensor and pipeline parallelism divide them. In an update every matrix is put
together on one rank of the pipeline stage, orthogonalised there, and its pieces go back: two all-to-alls, in which
each number travels once each way. The ranks share the matrices out by the work that they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.checkpoint.checkpoint_reader import Chunk, chunks_of
from megalm.checkpoint.shard_spec import FragmentKey
from megalm.config.deepspeed.json_schema import AdjustRate
from megalm.cost_model.memory import MUON_ROUND
from megalm.engine.optimizer.optimizer_state import OwnedRange
from megalm.model.model_config import is_stacked
from megalm.parallel.process_groups import AxisGroup, ParallelGroups
from megalm.planning.resolve import OptimizerFacts
from megalm.topology import whole_parts

_SMALLEST_NORM = 1e-7


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return a matrix with the singular vectors of `matrix`, and singular values near 1, by Newton-Schulz steps.

    It computes in the matrix's type. A step maps each singular value s to a s + b s^3 + c s^5.
    """
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    result = matrix.mT if is_tall else matrix
    result = result / result.norm().clamp(min=_SMALLEST_NORM)  # no singular value is above 1
    for _ in range(steps):
        gram = result @ result.mT
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.mT if is_tall else result


def rate_factor(adjust: AdjustRate, rows: int, columns: int) -> float:
    """Return by what a matrix's learning rate is multiplied for its shape.

    `original`: updates of a matrix with more outputs than inputs grow with their root. `match_rms_adamw`: an update is
    as large, by its root mean square, as AdamW's usual one.
    """
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class HeldPiece:
    """A flat range of a matrix that a rank holds.

    Attributes:
        key: where it lies in the matrix.
        is_owner: of the tensor ranks that hold the same, this one gives it to others.
    """

    key: FragmentKey
    is_owner: bool


class _Round:
    """Some matrices of a group, each with the rank that orthogonalises it, and how their pieces travel.

    A message to a rank has the pieces by matrix, and of a matrix in the order in which their holder lists them.

    Args:
        owners: canonical name -> the rank, by its place in the stage.
        pieces: by rank of the stage.
        gives: whether a rank's piece is one of those that make the matrix of a rank whole.
        own: this rank's place in the stage.
        flats: of this rank's pieces: key -> the tensor's index in the group, and the offset there.
    """

    def __init__(
        self,
        owners: dict[str, int],
        pieces: Sequence[Sequence[HeldPiece]],
        gives: Callable[[int, HeldPiece, int], bool],
        own: int,
        flats: dict[FragmentKey, tuple[int, int]],
    ) -> None:
        ranks = range(len(pieces))

        def between(holder: int, owner: int, everything: bool) -> list[FragmentKey]:
            held = [piece for piece in pieces[holder] if owners.get(piece.key.name) == owner]
            return [piece.key for piece in held if everything or gives(holder, piece, owner)]

        self._given = [between(own, rank, False) for rank in ranks]
        self._got = [between(rank, own, False) for rank in ranks]
        self._returned = [between(rank, own, True) for rank in ranks]
        self._back = [between(own, rank, True) for rank in ranks]
        self._flats = flats
        self.matrices = {key.name: key.shape for keys in self._returned for key in keys}
        covered = dict.fromkeys(self.matrices, 0)
        for key in chain(*self._got):
            covered[key.name] += key.count
        assert covered == {name: math.prod(shape) for name, shape in self.matrices.items()}, covered
        self._chunks = {key: chunks_of(key) for key in chain(*self._returned)}

    def run(
        self,
        flats: Sequence[Tensor],
        dtype: torch.dtype,
        exchange: Callable[[Tensor, list[int], list[int]], Tensor],
        orthogonal: Callable[[Tensor], Tensor],
        apply: Callable[[int, int, Tensor, tuple[int, ...]], None],
    ) -> None:
        """Give pieces of `flats` away, orthogonalise this rank's matrices, and `apply` what comes back.

        Args:
            exchange: a message, its elements to each rank and those from each rank -> what has come.
            apply: index of a flat tensor, offset there, the piece of the orthogonal matrix, the matrix's shape.
        """
        given = [flats[index].view(-1)[offset : offset + key.count] for key, index, offset in self._own(self._given)]
        message = _message(given, dtype, flats[0].device)
        whole = self._assembled(exchange(message, _counts(self._given), _counts(self._got)))
        results = {name: orthogonal(matrix) for name, matrix in whole.items()}
        cut = [_cut(results[key.name], self._chunks[key]) for key in chain(*self._returned)]
        message = _message(cut, dtype, flats[0].device)
        back = exchange(message, _counts(self._returned), _counts(self._back))
        reached = 0
        for key, index, offset in self._own(self._back):
            apply(index, offset, back[reached : reached + key.count], key.shape)
            reached += key.count

    def _own(self, keys: list[list[FragmentKey]]) -> Iterator[tuple[FragmentKey, int, int]]:
        return ((key, *self._flats[key]) for key in chain(*keys))

    def _assembled(self, values: Tensor) -> dict[str, Tensor]:
        whole = {name: values.new_empty(shape) for name, shape in self.matrices.items()}
        reached = 0
        for key in chain(*self._got):
            piece = values[reached : reached + key.count]
            for chunk in self._chunks[key]:
                _box(whole[key.name], chunk).copy_(chunk.view(piece, chunk.first, chunk.last))
            reached += key.count
        return whole


class Muon(torch.optim.AdamW):
    """Steps the groups whose moment is a momentum buffer by Muon, all others by AdamW.

    A matrix's tensor is updated once it is laid out; until then `step` leaves it as it is.

    Args:
        dtype: of messages and of the orthogonalisation: bf16, as published, or fp32 for a model in fp32.
    """

    def __init__(self, groups: list[dict[str, Any]], facts: OptimizerFacts, dtype: torch.dtype) -> None:
        super().__init__(groups, lr=0.0, betas=facts.betas, eps=facts.epsilon, fused=True)
        assert facts.muon is not None
        self._facts = facts.muon
        self._dtype = dtype
        self._rounds: dict[nn.Parameter, list[_Round]] = {}
        self._stage: AxisGroup | None = None

    def lay_out(
        self,
        units: Sequence[tuple[list[nn.Parameter], list[list[OwnedRange]]]],
        groups: ParallelGroups,
        is_copied: bool,
    ) -> None:
        """Say which pieces of which matrices the tensors hold, here and on the stage's other ranks.

        Args:
            units: the tensors that one call of `step` finds in a group, and by data rank the ranges in them; the same
                order of units on all ranks of the stage.
            is_copied: all data ranks hold the same.
        """
        assert groups.stage is not None
        self._stage, tensor, expert = groups.stage, groups.tensor.size, groups.expert.size

        def gives(holder: int, piece: HeldPiece, owner: int) -> bool:  # places in the stage
            copy = tensor * (expert if is_stacked(piece.key.name) else 1)  # ranks that hold one copy
            return piece.is_owner and (not is_copied or holder // copy == owner // copy)

        for flats, by_data_rank in units:
            held = [
                [found for owned in by_data_rank[place // tensor] for found in _held(owned, place, tensor, expert)]
                for place in range(groups.stage.size)
            ]
            pieces = [[piece for piece, _, _ in of_rank] for of_rank in held]
            shapes = {piece.key.name: piece.key.shape for piece in chain(*pieces)}
            indices = {id(flat): index for index, flat in enumerate(flats)}
            places = {piece.key: (indices[id(flat)], offset) for piece, flat, offset in held[groups.stage.index]}
            self._rounds[flats[0]] = [
                _Round(owners, pieces, gives, groups.stage.index, places)
                for owners in share_out(shapes, groups.stage.size)
            ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update what has a gradient; `closure` is not used. Collective in the stage."""
        groups = self.param_groups
        of_muon = [group for group in groups if "momentum_buffer" in group["moments"]]
        try:
            self.param_groups = [group for group in groups if "momentum_buffer" not in group["moments"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in of_muon:
            if group["params"] and group["params"][0] in self._rounds:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        facts, flats, rate = self._facts, group["params"], group["lr"]
        for flat in flats:
            state = self.state[flat]
            if not state:
                state |= {"momentum_buffer": torch.zeros_like(flat), "step": torch.zeros((), device=flat.device)}
            state["step"] += 1
            buffer = state["momentum_buffer"].lerp_(flat.grad, 1 - facts.momentum)
            if facts.nesterov:
                flat.grad.lerp_(buffer, facts.momentum)
            else:
                flat.grad.copy_(buffer)
            flat.mul_(1 - rate * group["weight_decay"])

        def apply(index: int, offset: int, values: Tensor, shape: tuple[int, ...]) -> None:
            place = flats[index].view(-1)[offset : offset + len(values)]
            place.add_(values, alpha=-rate * rate_factor(facts.adjust_lr_fn, *shape))

        def orthogonal(matrix: Tensor) -> Tensor:
            return orthogonalize(matrix, facts.ns_coefficients, facts.ns_steps)

        for each in self._rounds[flats[0]]:
            each.run([flat.grad for flat in flats], self._dtype, self._exchange, orthogonal, apply)

    def _exchange(self, message: Tensor, to: list[int], come: list[int]) -> Tensor:
        """Send each rank of the stage its part of `message`, and return what has come, by rank."""
        assert self._stage is not None
        if self._stage.size == 1:
            return message
        result = message.new_empty(sum(come))
        size = message.element_size()  # as bytes, which every backend sends
        dist.all_to_all_single(
            result.view(torch.uint8),
            message.view(torch.uint8),
            [size * count for count in come],
            [size * count for count in to],
            group=self._stage.process_group,
        )
        return result


def _held(
    owned: OwnedRange, place: int, tensor_ranks: int, expert_ranks: int
) -> Iterator[tuple[HeldPiece, nn.Parameter, int]]:
    """Yield what the rank at `place` in the stage holds where this rank holds `owned`, and this rank's place of it.

    That is an equal part of the matrix, or of each matrix of a stack of experts, whose names have the expert's number.
    The place is a tensor of the optimizer and an offset there.
    """
    shard, (data, index) = owned.shard, divmod(place, tensor_ranks)
    shape, sizes = shard.shape[-2:], shard.sizes[-2:]
    rectangle, is_owner = None, index == 0
    for cut in (axis for axis in range(2) if sizes[axis] < shape[axis]):
        part = whole_parts(shape[cut], shape[cut] // sizes[cut], tensor_ranks, index)
        rectangle = tuple((part.first, part.last) if axis == cut else (0, shape[axis]) for axis in range(2))
        is_owner = part.sharer == 0
    size = math.prod(sizes)
    for number in range(owned.start // size, math.ceil(owned.stop / size)):
        name = owned.name
        if len(shard.shape) > 2:
            name += f".{data % expert_ranks * shard.sizes[0] + number}"
        start, stop = max(owned.start - number * size, 0), min(owned.stop - number * size, size)
        key = FragmentKey(name, "momentum_buffer", shape, start, stop, rectangle)
        yield HeldPiece(key, is_owner), owned.flat, owned.offset + number * size + start - owned.start


def share_out(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[dict[str, int]]:
    """Return rounds of matrices, each with its rank: equal work for all, and few elements of a rank in a round."""
    work = [0] * ranks
    rounds: list[dict[str, int]] = []
    rank_rounds, filled = [0] * ranks, [0] * ranks
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for name in sorted(shapes, key=lambda name: (-sizes[name] * min(shapes[name]), name)):
        rank = work.index(min(work))
        work[rank] += sizes[name] * min(shapes[name])
        if filled[rank] and filled[rank] + sizes[name] > MUON_ROUND:
            rank_rounds[rank], filled[rank] = rank_rounds[rank] + 1, 0
        filled[rank] += sizes[name]
        while len(rounds) <= rank_rounds[rank]:
            rounds.append({})
        rounds[rank_rounds[rank]][name] = rank
    return rounds


def _message(parts: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype, device=device), *(part.to(dtype) for part in parts)])


def _counts(keys: list[list[FragmentKey]]) -> list[int]:
    return [sum(key.count for key in of_rank) for of_rank in keys]


def _box(whole: Tensor, chunk: Chunk) -> Tensor:
    return whole[tuple(slice(first, last) for first, last in zip(chunk.first, chunk.last, strict=True))]


def _cut(whole: Tensor, chunks: list[Chunk]) -> Tensor:
    return torch.cat([_box(whole, chunk).reshape(-1) for chunk in chunks])
