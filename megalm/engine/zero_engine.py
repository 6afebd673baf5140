"""The data-parallel engine: a model under DeepSpeed's ZeRO stage 0 to 3.

Shapes: B micro-batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from deepspeed.utils import set_z3_leaf_modules

from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.engine.base_engine import EngineBase, EngineContext, padded
from megalm.engine.interface import StepResult
from megalm.model.modules import DropoutClock
from megalm.model.transformer import Block, LanguageModel


class ZeroEngine(EngineBase):
    """Trains `model` on data-parallel ranks.

    Args:
        model: as in `EngineBase`; its parameters' names are canonical.
        clock: the clock of the model's dropout layers.
    """

    def __init__(self, model: LanguageModel, clock: DropoutClock, context: EngineContext) -> None:
        if context.run.zero_stage == 3:
            # Gather a complete block, not layer by layer: fewer messages, and no DeepSpeed hooks inside a compiled
            # block.
            set_z3_leaf_modules(model, [Block])
        super().__init__(model, model, context)
        self._clock = clock
        self._slices = model.slices
        self._whole_gradients = context.run.whole_gradients
        optimizer = self._engine.optimizer
        if self._whole_gradients and optimizer.use_separate_grad_accum:
            # As in ZeRO 1, low-precision gradients are added up in fp32: each at once, so that never all of them exist.
            optimizer.use_grad_accum_attribute = True
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(optimizer._fill_param_grad_accum_attribute)

    def train_step(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        engine = self._engine
        engine.train()
        self._state.release_buffers()
        self._set_learning_rate(learning_rate)
        total = torch.zeros((), device=self._device)
        # ZeRO averages gradients over ranks; the loss is a mean over the targets of the *global* batch.
        scale = self._data.size / batch.target_count
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            self._clock.step, self._clock.micro_batch = step, index * self._data.size + self._data.index
            with self._unreduced() if self._whole_gradients and index < last else contextlib.nullcontext():
                with self._phase("forward"):
                    loss_sum, _ = engine(*self._tensors(micro_batch))
                with self._phase("backward"):
                    engine.backward(loss_sum * scale, scale_wrt_gas=False)
            total += loss_sum.detach()
            if index == last:
                self._arm_check(total, batch.target_count)
            with self._phase("update"):
                engine.step()
        return self._end_of_step()

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

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        self._engine.eval()
        total = torch.zeros((), device=self._device)
        for micro_batch in micro_batches:
            loss_sum, _ = self._engine(*self._tensors(micro_batch))
            total += loss_sum
        return float(self._sum_over_ranks(total))

    @torch.no_grad()
    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        self._engine.eval()
        tokens = padded(tokens, self._slices)
        places = torch.from_numpy(tokens).to(self._device), torch.from_numpy(positions).to(self._device)
        with torch.compiler.set_stance("force_eager"):  # texts grow: each new length would be compiled again
            logits = self._engine(places[0], positions=places[1])
        return logits.float().cpu().numpy()
