"""Read and write a DeepSpeed optimizer's state, and weights that do not train, as fragments of canonical parameters.

Like other modules of this package it uses DeepSpeed's internals; tests/distributed holds them to the pinned version.
A fragment is a flat range of one parameter that this rank owns: its fp32 master, and the moments of its group. Offsets
are computed from addresses, not from DeepSpeed's own maps, which are wrong for some settings. `read_norm_once` changes
how DeepSpeed reads the norm of its gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed.comm as ds_comm
import torch
import torch.distributed as dist
from deepspeed.comm import pg_utils
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megalm.checkpoint.shard_spec import Fragment, FragmentKey, FragmentKind
from megalm.engine.nvme_offload import SwappedStates
from megalm.engine.optimizer.low_precision_adam import LowPrecisionAdam
from megalm.model.layer_factory import ShardedAxis
from megalm.model.model_config import is_stacked
from megalm.model.parameter_groups import MomentKind
from megalm.parallel.process_groups import AxisGroup

ReadFragment = Callable[[FragmentKey], Tensor]

# Attributes of DeepSpeed's optimizers of ZeRO 3, of ZeRO 1 and 2, and of its BF16_Optimizer.
_MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


_EXCHANGED_AT_ONCE = 1 << 20  # elements, so that nothing as large as the weights is held beside them


class WeightEma:
    """average = decay * average + (1 - decay) * weights, after each applied update; it begins with the weights.

    It is fp32, and divided among the ranks as the masters that it follows.

    Args:
        decay: between 0 and 1; null keeps no average.
        flats: the fp32 tensors that the optimizer steps.
    """

    def __init__(self, decay: float | None, flats: Sequence[nn.Parameter]) -> None:
        self._share = 0.0 if decay is None else 1 - decay
        self._flats = [] if decay is None else list(flats)
        self._averages = {id(flat): torch.empty_like(flat.data) for flat in self._flats}
        self.restart()

    @property
    def is_kept(self) -> bool:
        return self._share > 0

    def of(self, flat: nn.Parameter) -> Tensor:
        """Return the average of one of the tensors."""
        return self._averages[id(flat)]

    @torch.no_grad()
    def update(self) -> None:
        """Call after an update that was applied."""
        for flat in self._flats:
            self.of(flat).lerp_(flat.data, self._share)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average where the weights are, and the weights where it was; twice changes nothing."""
        for flat in self._flats:
            average = self.of(flat).view(-1).split(_EXCHANGED_AT_ONCE)
            for weights, averaged in zip(flat.data.view(-1).split(_EXCHANGED_AT_ONCE), average, strict=True):
                kept = weights.clone()
                weights.copy_(averaged)
                averaged.copy_(kept)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the weights."""
        for flat in self._flats:
            self.of(flat).copy_(flat.data)


@dataclass(frozen=True)
class OwnedRange:
    """Elements [start, stop) of this rank's shard of parameter `name`, at `offset` in the optimizer's tensor `flat`."""

    name: str
    shard: ShardedAxis
    start: int
    stop: int
    flat: nn.Parameter
    offset: int

    def key(self, kind: FragmentKind) -> FragmentKey:
        return FragmentKey(self.name, kind, self.shard.shape, self.start, self.stop, self.shard.rectangle)


class OptimizerState:
    """The state of one DeepSpeed engine's optimizer, whatever its ZeRO stage and precision.

    Args:
        engine: a DeepSpeed engine after `deepspeed.initialize`.
        parameters: canonical name -> parameter that trains, as in the module.
        shards: canonical name -> its shard, read before `initialize` (ZeRO 3 flattens shapes).
        first_copies: names of which this rank is the first of those that hold the same.
        ema_decay: of a moving average of the masters; None: there is none.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        shards: Mapping[str, ShardedAxis],
        first_copies: Collection[str],
        ema_decay: float | None = None,
    ) -> None:
        self._engine = engine
        self._outer = engine.optimizer
        self._inner: torch.optim.Optimizer = getattr(self._outer, "optimizer", self._outer)
        found = next((name for name in _MASTERS if hasattr(self._outer, name)), None)
        # The tensors that the inner optimizer steps.
        self._flats = list(parameters.values()) if found is None else list(getattr(self._outer, found))
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._shards = shards
        self._first_copies = frozenset(first_copies)
        self._swapped = SwappedStates(self._outer) if getattr(self._outer, "swap_optimizer", False) else None
        self._moments = dict(self._moments_of_flats())
        self.ema = WeightEma(ema_decay, self._flats)
        self._packed = self._inner if isinstance(self._inner, LowPrecisionAdam) else None
        if self._packed is not None:
            for flat, pieces in self._owned_by_flat():
                self._packed.lay_out(flat, [(it.offset, it.start, it.stop - it.start) for it in pieces])

    def fragments(self) -> Iterator[Fragment]:
        """Yield every fragment that this rank owns, once. Tensors are views: copy them before the next step.

        Fragments on disk and low-precision moments are copies, read on access: access each once, in this order.
        """
        for flat, pieces in self._owned_by_flat():
            kinds = self._kinds(flat)
            own = [(owned, kind) for owned in pieces if self._is_counted(owned) for kind in kinds]
            for owned, kind in own:
                values = partial(self._values, owned, kind)
                if self._swapped is not None and self._swapped.holds(flat):
                    is_last = (owned, kind) == own[-1]
                    yield Fragment(owned.key(kind), partial(self._swapped.read, flat, values, is_last))
                elif self._packed is not None and kind in ("exp_avg", "exp_avg_sq"):
                    yield Fragment(owned.key(kind), partial(self._packed.read, flat, owned.offset, kind))
                else:
                    yield Fragment(owned.key(kind), values())

    @torch.no_grad()
    def load(self, read: ReadFragment, optimizer_step: int) -> None:
        """Fill masters and moments from `read`, then refresh the low-precision weights on all ranks.

        Collective: every rank calls it.
        """
        self._before_rewriting()
        for flat, pieces in self._owned_by_flat():
            with self._present(flat, changes=True):
                flat.data.zero_()  # its padding stays zero
                self._clear_moments(flat, optimizer_step)
                for owned in pieces:
                    for kind in self._kinds(flat):
                        values = read(owned.key(kind))
                        if self._packed is not None and kind in ("exp_avg", "exp_avg_sq"):
                            self._packed.write(flat, owned.offset, kind, values)
                        else:
                            self._values(owned, kind).copy_(values)
        if self._is_cpu_adam:
            self._replay_bias_correction(optimizer_step)
        self._refresh_low_precision()

    @torch.no_grad()
    def exchange_average(self) -> None:
        """Put the average where the weights are, and the weights where it was; a second call undoes it. Collective."""
        self._before_rewriting()
        self.ema.exchange()
        self._refresh_low_precision()

    @torch.no_grad()
    def forget_moments(self) -> None:
        """Reset moments, step count and the average of the weights to those before the first step."""
        self.ema.restart()
        for flat, _ in self._owned_by_flat():
            with self._present(flat, changes=True):
                self._clear_moments(flat, optimizer_step=0)

    def units_of(
        self, moment: MomentKind, data_ranks: int, expert_ranks: int
    ) -> list[tuple[list[nn.Parameter], list[list[OwnedRange]]]]:
        """Return the tensors with this moment, as the inner optimizer finds them together, and what is in them.

        For each data rank, it is the ranges that the rank owns, of experts in the place of this rank's ones; their
        offsets are right for this rank. The order is the same on all ranks that hold the same layers.

        Args:
            data_ranks: data x context.
            expert_ranks: neighbours of them that divide the experts.
        """
        units = [[flat] for flat in self._flats if moment in self._moments.get(id(flat), ())]
        if self._outer is self._inner:
            units = [list(group["params"]) for group in self._inner.param_groups if moment in group["moments"]]
        owned = [list(self._owned(rank)) for rank in range(data_ranks)]

        def of(unit: list[nn.Parameter]) -> list[list[OwnedRange]]:
            flats = {id(flat) for flat in unit}
            found = []
            for rank in range(data_ranks):
                own = (it for it in owned[rank] if not is_stacked(it.name))
                of_experts = (it for it in owned[rank // expert_ranks] if is_stacked(it.name))
                found.append([it for it in (*own, *of_experts) if id(it.flat) in flats])
            return found

        return [(unit, of(unit)) for unit in units]

    def release_buffers(self) -> None:
        """Release swap buffers held for reading; call before each step."""
        if self._swapped is not None:
            self._swapped.release_buffers()

    def optimizer_step(self) -> int:
        """Return the number of applied updates; skipped steps do not count."""
        for state in self._inner.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def gradient_norm(self) -> float:
        """Return DeepSpeed's norm of this step before clipping; known before the inner optimizer steps.

        DeepSpeed says -1 of gradients that are not finite, where it does not search them for overflow.
        """
        norm = float(self._outer._global_grad_norm)
        return math.nan if norm < 0 else norm

    def gradient_squares(self) -> dict[str, float]:
        """Return name -> sum of squares of this rank's part of the gradients that the inner optimizer now steps.

        The gradients are clipped, and scaled by the loss scale.
        """
        stepped = {id(flat) for group in self._inner.param_groups for flat in group["params"]}
        squares: dict[str, float] = {}
        for owned in self._owned():
            gradient = owned.flat.grad
            if gradient is not None and id(owned.flat) in stepped and self._is_counted(owned):
                part = gradient.view(-1).narrow(0, owned.offset, owned.stop - owned.start)
                squares[owned.name] = squares.get(owned.name, 0.0) + float(part.double().square().sum())
        return squares

    def _is_counted(self, owned: OwnedRange) -> bool:
        """Whether no other rank counts it: without ZeRO all copies hold the same state."""
        is_only = self._outer is not self._inner or owned.name in self._first_copies
        return is_only and owned.shard.is_owner

    def loss_scale(self) -> float:
        """Return the factor that the next loss is multiplied by."""
        return float(getattr(getattr(self._outer, "loss_scaler", None), "cur_scale", 1.0))

    def loss_scaler(self) -> dict[str, float]:
        """Return the dynamic loss scaler's state; empty for a static scale, which is configuration."""
        scaler = getattr(self._outer, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS} if getattr(scaler, "dynamic", False) else {}

    def load_loss_scaler(self, saved: Mapping[str, float]) -> None:
        """Restore a dynamic loss scaler's state; does nothing if either side has none (another precision)."""
        if not all(name in saved for name in _SCALER_FIELDS):
            return
        for name in self.loss_scaler():
            setattr(self._outer.loss_scaler, name, saved[name])

    def _present(self, flat: nn.Parameter, changes: bool = False) -> AbstractContextManager[None]:
        """Keep `flat` and its moments in memory inside the context; with `changes`, write them back to a disk."""
        return nullcontext() if self._swapped is None else self._swapped.present(flat, changes)

    def _clear_moments(self, flat: nn.Parameter, optimizer_step: int) -> None:
        """Set the moments to zero, on the master's device, and the step count."""
        if self._packed is not None:
            self._packed.clear(flat, optimizer_step)
            return
        state = self._inner.state[flat]
        for kind in self._moments[id(flat)]:
            if self._swapped is not None and self._swapped.holds(flat) and kind in state:
                state[kind].zero_()  # in place: DeepSpeed ties the copy on disk to this tensor object
            else:
                state[kind] = torch.zeros_like(flat.data)
        if self._is_cpu_adam:
            state["step"] = optimizer_step
        else:
            state["step"] = torch.tensor(float(optimizer_step), device=flat.device)

    def _kinds(self, flat: nn.Parameter) -> tuple[FragmentKind, ...]:
        average: tuple[FragmentKind, ...] = ("ema",) if self.ema.is_kept else ()
        return ("master", *self._moments[id(flat)], *average)

    @property
    def _is_cpu_adam(self) -> bool:
        return type(self._inner).__name__ == "DeepSpeedCPUAdam"

    def _replay_bias_correction(self, optimizer_step: int) -> None:
        """Restore CPUAdam's powers of beta as they were after `optimizer_step` steps.

        CPUAdam multiplies them step by step in single precision; after a jump it uses `pow`, whose last bits differ. So
        the past steps are replayed on a dummy element: half a second per 100,000 steps.
        """
        inner: Any = self._inner
        options = inner.param_groups[0]
        dummy = [torch.zeros(1) for _ in range(4)]
        for step in range(1, optimizer_step + 1):
            inner.ds_opt_adam.adam_update(
                inner.opt_id, step, 0.0, *options["betas"], options["eps"], 0.0, options["bias_correction"], *dummy
            )

    def _before_rewriting(self) -> None:
        """Call before the masters get other values; `_refresh_low_precision` is the end of it."""
        if hasattr(self._outer, "checkpoint_event_prologue"):
            self._outer.checkpoint_event_prologue()

    def _refresh_low_precision(self) -> None:
        outer = self._outer
        if hasattr(outer, "fp32_partitioned_groups_flat"):
            for index, flat in enumerate(self._flats):
                with self._present(flat):
                    outer._reassign_or_swap_out_partitioned_parameters(index)
            outer.checkpoint_event_epilogue()
        elif outer is not self._inner:
            outer.update_lp_params()

    def _values(self, owned: OwnedRange, kind: FragmentKind) -> Tensor:
        """Return a view, fp32 [stop - start]; zeros if the optimizer has no moments yet."""
        if kind == "ema":
            whole = self.ema.of(owned.flat)
        else:
            whole = owned.flat.data if kind == "master" else self._inner.state.get(owned.flat, {}).get(kind)
        length = owned.stop - owned.start
        return torch.zeros(length) if whole is None else whole.view(-1).narrow(0, owned.offset, length)

    def _owned_by_flat(self) -> list[tuple[nn.Parameter, list[OwnedRange]]]:
        """Return the optimizer's tensors, each with the ranges that this rank owns in it; none if all is padding."""
        pieces: dict[int, tuple[nn.Parameter, list[OwnedRange]]] = {}
        for owned in self._owned():
            pieces.setdefault(id(owned.flat), (owned.flat, []))[1].append(owned)
        for flat in self._flats:
            pieces.setdefault(id(flat), (flat, []))
        return list(pieces.values())

    def _moments_of_flats(self) -> Iterator[tuple[int, tuple[MomentKind, ...]]]:
        """Yield the id of each tensor that the inner optimizer steps, and the moments of its group."""
        groups = self._inner.param_groups
        if self._outer is self._inner:
            yield from ((id(parameter), group["moments"]) for group in groups for parameter in group["params"])
            return
        for index, flat in enumerate(self._flats):  # ZeRO 1 and 2 have one of each group, ZeRO 3 its sub-groups
            group = getattr(self._outer, "sub_group_to_group_id", {}).get(index, index)
            yield id(flat), groups[group]["moments"]

    def _owned(self, data_rank: int | None = None) -> Iterator[OwnedRange]:
        """Yield what this rank owns, or another data rank: then only the offsets are of that rank's tensors."""
        outer = self._outer
        if hasattr(outer, "fp32_partitioned_groups_flat"):
            return self._owned_in_stage_3(data_rank)
        if hasattr(outer, "single_partition_of_fp32_groups"):
            return self._owned_in_flat_groups(outer.bit16_groups, outer.bit16_groups_flat, data_rank)
        if hasattr(outer, "fp32_groups_flat_partition"):
            return self._owned_in_flat_groups(outer.bf16_groups, outer.bf16_groups_flat, data_rank)
        return self._owned_without_zero()

    def _owned_in_flat_groups(
        self, groups: list[list[nn.Parameter]], flats: list[Tensor], data_rank: int | None
    ) -> Iterator[OwnedRange]:
        """ZeRO 1 and 2: a group's parameters are in one flat buffer, of which each rank owns an equal part."""
        for index, (group, flat, master) in enumerate(zip(groups, flats, self._flats, strict=True)):
            size = master.numel()
            own = ds_comm.get_rank(group=self._outer.real_dp_process_group[index])
            first = (own if data_rank is None else data_rank) * size
            for parameter in group:
                if id(parameter) not in self._names:
                    continue  # it stands in for a group of which this stage has none
                place = (parameter.data_ptr() - flat.data_ptr()) // parameter.element_size()
                start, stop = max(place, first), min(place + parameter.numel(), first + size)
                if start < stop:
                    name = self._names[id(parameter)]
                    yield OwnedRange(name, self._shards[name], start - place, stop - place, master, start - first)

    def _owned_in_stage_3(self, data_rank: int | None) -> Iterator[OwnedRange]:
        """ZeRO 3: each parameter is split into equal parts; a rank's parts form its sub-groups."""
        outer = self._outer
        for name, parameter in self._parameters.items():
            group, offset, part = outer.grad_position[outer.get_param_id(parameter)]
            start = (outer._get_param_partition_rank(parameter) if data_rank is None else data_rank) * part
            stop = min(start + part, math.prod(self._shards[name].sizes))
            if start < stop:
                master = self._flats[group]
                yield OwnedRange(name, self._shards[name], start, stop, master, offset)

    def _owned_without_zero(self) -> Iterator[OwnedRange]:
        """ZeRO 0: every rank holds everything."""
        for name, parameter in self._parameters.items():
            yield OwnedRange(name, self._shards[name], 0, parameter.numel(), parameter, 0)


class FrozenWeights:
    """The frozen parameters of this rank, of which the optimizer has no fp32 master.

    Every rank that holds the same of a parameter keeps and saves an equal part of it, at any ZeRO stage.

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

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's parts, fp32."""
        for name in self._parameters:
            key = self._part(name)
            if self._shards[name].is_owner and key.count:
                yield Fragment(key, partial(self._read, key))

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


class _FillOnDevice(TorchFunctionMode):
    """Fills the tensor of `torch.tensor(number, device=...)` there: a copy from the host would wait for the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tensor and isinstance(args[0], float):
            return torch.full((), args[0], **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@functools.cache
def read_norm_once() -> None:
    """Let DeepSpeed's optimizers read the global gradient norm from the device once a step.

    They read it again wherever they compare it: is it valid, does it clip, for each parameter group. From here on they
    compare a copy on the host. A norm that is not finite says that gradients overflowed; DeepSpeed's own search for
    such gradients, with a reading of its own, comes to the same result and is left out.
    """
    DeepSpeedZeroOptimizer.scaled_global_norm = _summed_once(DeepSpeedZeroOptimizer.scaled_global_norm)
    for owner, name in (
        (DeepSpeedZeroOptimizer, "scaled_global_norm"),
        (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups"),
        (bf16_optimizer, "get_global_norm_of_tensors"),
    ):
        setattr(owner, name, _norm_on_host(getattr(owner, name)))
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.check_overflow = functools.wraps(optimizer.check_overflow)(lambda *_, **__: None)


def _summed_once(norm_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DeepSpeed's norm of ZeRO 1 and 2 with one sum over the ranks of a model's copy, not one for each parameter group.

    Stages of a pipeline may have other groups, and would wait for each other for ever.
    """

    @functools.wraps(norm_of)
    def norm(optimizer: Any, *args: Any, **options: Any) -> Tensor:
        if not pg_utils.is_parallel(optimizer.model_parallel_group):
            return norm_of(optimizer, *args, **options)
        reduce = optimizer._model_parallel_all_reduce
        optimizer._model_parallel_all_reduce = lambda **_: None
        try:
            square = norm_of(optimizer, *args, **options).square()  # infinite if a gradient is not finite
        finally:
            del optimizer._model_parallel_all_reduce
        reduce(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()

    return norm


def _norm_on_host(norm_of: Callable[..., Tensor | list[Tensor]]) -> Callable[..., Tensor]:
    @functools.wraps(norm_of)
    def read(*args: Any, **options: Any) -> Tensor:
        if options.get("input_tensors") == []:  # of a rank whose parameters are frozen, or other ranks' as well
            options["input_tensors"] = [torch.zeros(1)]
        with _FillOnDevice():
            norm = norm_of(*args, **options)
        return (torch.stack(norm) if isinstance(norm, list) else norm).cpu()

    return read
