"""The data-parallel engine: a model under DeepSpeed's ZeRO stage 0 to 3.

Shapes: B micro-batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.engine.base_engine import EngineBase, EngineContext
from megalm.model.model_config import lowest_block
from megalm.model.parameter_groups import frozen_parameters
from megalm.model.transformer import Block, LanguageModel


class ZeroEngine(EngineBase):
    """Trains `model` on data-parallel ranks.

    Args:
        model: as in `EngineBase`.
    """

    def __init__(self, model: LanguageModel, context: EngineContext) -> None:
        train = context.run.config.train
        if context.run.zero_stage == 3:
            # Gather a complete block, not layer by layer: fewer messages, and no DeepSpeed hooks inside a compiled
            # block.
            set_z3_leaf_modules(model, [Block])
            # Where no input of a block has a gradient, its hooks would run before its backward pass, not after it.
            frozen = frozen_parameters(context.shape, train.parameter_groups)
            model.gradient_down_to = lowest_block(context.shape, frozen)
        super().__init__(model, context, model.head.output)
        if context.run.deepspeed["zero_optimization"].get("offload_param"):
            for parameter in model.parameters():
                gather = parameter.all_gather_coalesced  # type: ignore[attr-defined]
                parameter.all_gather_coalesced = _copying_ahead(gather)  # type: ignore[attr-defined]
        optimizer = self._engine.optimizer
        is_alone = context.groups.data_context.size == 1 and isinstance(optimizer, DeepSpeedZeroOptimizer)
        if is_alone and not optimizer.cpu_offload:
            FlatGradients(optimizer)
            self._whole_gradients = False
            return
        self._whole_gradients = context.run.whole_gradients
        if self._whole_gradients and optimizer.use_separate_grad_accum:
            # As in ZeRO 1, low-precision gradients are added up in fp32: each at once, so that never all of them exist.
            optimizer.use_grad_accum_attribute = True
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(optimizer._fill_param_grad_accum_attribute)

    def _run_step(self, batch: GlobalBatch, step: int) -> None:
        engine = self._engine
        self._state.release_buffers()
        total = torch.zeros((), device=self._device)
        # ZeRO averages gradients over ranks; the loss is a mean over the targets of the *global* batch.
        scale = self._replicas / batch.divisor
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            self._begin_micro_batch(batch, step, index)
            with self._unreduced() if self._whole_gradients and index < last else contextlib.nullcontext():
                with self._phase("forward"):
                    loss_sum, _ = engine(*self._tensors(micro_batch))
                with self._phase("backward"):
                    engine.backward(loss_sum * scale, scale_wrt_gas=False)
            total += loss_sum.detach()
            if index == last:
                self._arm_check(total, batch.divisor)
            with self._phase("update"):
                engine.step()

    @contextlib.contextmanager
    def _unreduced(self) -> Iterator[None]:
        """Add gradients up on this rank; those of the next micro-batch outside are reduced with them.

        DeepSpeed's `coalesce_grad_reduction`, but for the reduction at its end: during the backward pass of the last
        micro-batch it overlaps with it, as overlap_comm asks.
        """
        engine, optimizer = self._engine, self._engine.optimizer
        engine.inside_no_sync_ctxt = optimizer._coalesce_grad_reduction = True
        try:
            yield
        finally:
            engine.inside_no_sync_ctxt = optimizer._coalesce_grad_reduction = False

    def _loss_sum(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        total = torch.zeros((), device=self._device)
        for micro_batch in micro_batches:
            loss_sum, _ = self._engine(*self._tensors(micro_batch))
            total += loss_sum
        return total

    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._engine(tokens, positions=positions)
        return logits


class _CopyAhead(TorchFunctionMode):
    """Copies page-locked tensors to the device without the host's wait: the device reads them in its own order."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.to and not args[0].is_cuda and args[0].is_pinned():
            kwargs = {"non_blocking": True} | (kwargs or {})
        return function(*args, **(kwargs or {}))


def _copying_ahead(gather: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's gather of ZeRO 3, which waits for the copy of each offloaded parameter.

    The CPU changes weights in an update only, and that follows a gradient norm for which all their copies are done.
    """

    @functools.wraps(gather)
    def copying_ahead(*args: Any, **options: Any) -> Any:
        with _CopyAhead():
            return gather(*args, **options)

    return copying_ahead


class FlatGradients:
    """Adds up the gradients of ZeRO 1 and 2 on a rank whose weights no other holds where the optimizer reads them.

    DeepSpeed copies each gradient to a bucket, divides and reduces the bucket, and adds its parts to the flat gradient
    of a parameter group. One rank has nothing to reduce: here a gradient goes to its place in the flat one at once,
    and the sums are equal, bit for bit.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._flats: list[Tensor] = []  # from the first gradient of a step to its update
        self._places: list[dict[int, tuple[int, int]]] = []  # group -> id of a parameter -> [start, end) in the flat
        self._filled: set[int] = set()
        for group, parameters in enumerate(optimizer.params_in_partition):
            starts = optimizer.grad_partition_insertion_offset[group][0]
            spans = [(each, int(starts[optimizer.get_param_id(each)])) for each in parameters]
            self._places.append({id(each): (start, start + each.numel()) for each, start in spans})
        optimizer.process_gradients = self._add
        optimizer.overlapping_partition_gradients_reduce_epilogue = self._end_of_backward
        optimizer.reduce_gradients = self._end_of_backward

    def _add(self, parameter: nn.Parameter, group: int) -> None:
        if not self._flats:
            self._flats = [torch.empty_like(flat, dtype=self._dtype) for flat in self._optimizer.bit16_groups_flat]
        start, end = self._places[group][id(parameter)]
        place = self._flats[group][start:end].view_as(parameter)
        assert parameter.grad is not None
        if id(parameter) in self._filled:
            place += parameter.grad.to(self._dtype)
        else:
            place.copy_(parameter.grad)
            self._filled.add(id(parameter))
        parameter.grad = None

    def _end_of_backward(self, **_: Any) -> None:
        """Before an update: hand over the flat gradients, with zeros where there is none."""
        optimizer = self._optimizer
        optimizer._epilogue_ran_this_backward = True
        if not optimizer.is_gradient_accumulation_boundary():
            return
        for group, (flat, places) in enumerate(zip(self._flats, self._places, strict=True)):
            parts, reached = [], 0
            for parameter in optimizer.params_in_partition[group]:
                start, end = places[id(parameter)]
                flat[reached:start].zero_()
                if id(parameter) not in self._filled:
                    flat[start:end].zero_()
                parts.append(flat[start:end])
                reached = end
            flat[reached:].zero_()
            optimizer.averaged_gradients[group] = GradPartitionBufferGroup(parts, flat)
        self._flats, self._filled = [], set()

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._optimizer.gradient_accumulation_dtype
        return dtype
