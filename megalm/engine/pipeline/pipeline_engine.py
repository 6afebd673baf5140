"""The pipeline engine: the model's layers spread over stages, under DeepSpeed's PipelineModule and ZeRO 0 or 1.

Shapes: B micro-batch, T sequence, H hidden, V vocabulary. A training step is DeepSpeed's one-forward-one-backward
schedule over the micro-batches of a global batch. Without training, each stage receives hidden states, computes, and
sends the result to the next stage.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    SendGrad,
    TrainSchedule,
)
from torch import Tensor

from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.engine.base_engine import EngineBase, EngineContext
from megalm.engine.interface import StepResult
from megalm.engine.phase_clock import PhaseClock
from megalm.engine.pipeline.pipeline_stage import PipelineStage
from megalm.model.model_config import lowest_block
from megalm.model.parameter_groups import frozen_parameters

# By default each rank of a tensor group sends a part of the hidden states, assuming that all hold the same. With
# parallel.sequence they hold different slices.
_SEND_WHOLE = {"pipe_partitioned": False, "grad_partitioned": False}


class PipelineEngine(EngineBase):
    """Trains this rank's initialized stage together with the other ranks."""

    def __init__(self, model: PipelineStage, context: EngineContext) -> None:
        super().__init__(model, model.part_of_model(), context, model.output, {"pipeline": _SEND_WHOLE})
        if not any(table.requires_grad for table in model.tied_modules.parameters()):
            model.tied_comms = {}  # the sum of the tied weight's gradients, which a frozen one has none of
        if self._phases is not None:
            instructions = self._engine._INSTRUCTION_MAP.items()
            self._engine._INSTRUCTION_MAP = {
                kind: _in_phase(self._phases, kind.__name__, method) for kind, method in instructions
            }
        # DeepSpeed's mean loss, with a broadcast and a copy from the host: megalm has its own.
        self._engine._aggregate_total_loss = lambda: None
        self._model = model
        self._shape: torch.Size | None = None  # of a micro-batch's tokens
        self._clock = model.context.clock
        self._pipeline = context.groups.pipeline
        frozen = frozen_parameters(context.shape, context.run.config.train.parameter_groups)
        self._left_out = self._without_gradients(lowest_block(context.shape, frozen))

    def train_step(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        model, engine = self._model, self._engine
        self._begin_step(batch, learning_rate)
        micro_batches = [self._tensors(micro_batch) for micro_batch in batch.micro_batches]
        shape = micro_batches[0][0].shape
        if shape != self._shape:  # DeepSpeed's buffers have the last step's
            engine.reset_activation_shape()
            self._shape = shape
        # DeepSpeed averages over micro-batches and ranks; the loss is a mean over the targets of the *global* batch.
        model.loss_factor = len(micro_batches) * self._copies.size / batch.divisor
        model.loss_sum = 0.0

        def before_forward(index: int) -> None:
            self._by_dataset.of(batch.micro_batches[index].datasets)
            tokens, labels, documents = micro_batches[index]
            self._clock.step, self._clock.micro_batch = step, self._micro_batch(index)
            model.context.set(tokens, documents, labels)

        def before_update() -> None:
            self._by_dataset.of(None)
            self._arm_check(model.loss_sum, batch.divisor)

        engine._train_schedule = lambda: _Schedule(engine, before_forward, before_update, self._left_out)
        engine.train_batch(iter([(tokens, labels) for tokens, labels, _ in micro_batches]))
        return self._end_of_step()

    def _loss_sum(self, micro_batches: Sequence[MicroBatch]) -> Tensor | float:
        self._model.eval()
        self._model.loss_sum = 0.0
        for micro_batch in micro_batches:
            tokens, labels, documents = self._tensors(micro_batch)
            self._model.context.set(tokens, documents, labels)
            self._forward(tokens)
        return self._model.loss_sum

    @torch.no_grad()
    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        self._model.eval()
        inputs = self._padded(tokens)
        self._model.context.set(inputs, None, positions=torch.from_numpy(positions).to(self._device))
        with torch.compiler.set_stance("force_eager"):  # texts grow: each new length would be compiled again
            last = self._forward(inputs)
        logits = torch.empty(len(inputs), self._model.vocab_size, device=self._device) if last is None else last.float()
        dist.broadcast(logits, src=self._pipeline.ranks[-1], group=self._pipeline.process_group)
        return logits.cpu().numpy()

    def _without_gradients(self, first_trained: int) -> tuple[type[PipeInstruction], ...]:
        """Return the instructions that nobody needs on this stage: gradients below the lowest parameter that trains.

        Args:
            first_trained: the lowest block with a backward pass.
        """
        pipeline, instructions = self._pipeline, self._engine._INSTRUCTION_MAP
        lowest = self._model.stage_of(first_trained)
        if pipeline.index > lowest or lowest == 0:
            return ()
        if pipeline.index < lowest:
            return BackwardPass, RecvGrad, SendGrad
        receive = instructions[RecvActivation]

        def receive_without_gradient(engine: Any, buffer_id: int) -> None:
            receive(engine, buffer_id)
            engine.pipe_buffers["inputs"][buffer_id].requires_grad_(False)

        self._engine._INSTRUCTION_MAP = {**instructions, RecvActivation: receive_without_gradient}
        return (SendGrad,)

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """Run a forward pass of this rank's tokens through all stages; return the output on the last one, else None."""
        output = self._model(tokens if self._model.is_first else self._receive(*tokens.shape))
        if self._model.is_last:
            return output
        dist.send(output.contiguous(), dst=self._pipeline.ranks[self._pipeline.index + 1])
        return None

    def _receive(self, sequences: int, length: int) -> Tensor:
        """Receive the previous stage's hidden states [B, T / slices, H]."""
        size = (sequences, length // self._model.slices, self._model.hidden_size)
        hidden = torch.empty(size, dtype=next(self._model.parameters()).dtype, device=self._device)
        dist.recv(hidden, src=self._pipeline.ranks[self._pipeline.index - 1])
        return hidden


# DeepSpeed's names of instructions, and ours of phases.
_PHASES = {"ForwardPass": "forward", "BackwardPass": "backward", "ReduceGrads": "reduce", "OptimizerStep": "update"}


def _in_phase(clock: PhaseClock, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*args: Any, **options: Any) -> Any:
        with clock(_PHASES.get(name, name)):
            return method(*args, **options)

    return timed


class _Schedule(TrainSchedule):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's schedule with a callback before each forward pass and before the update.

    Args:
        left_out: instructions that this stage does not run; the stages agree on them.
    """

    def __init__(
        self,
        engine: Any,
        before_forward: Callable[[int], None],
        before_update: Callable[[], None],
        left_out: tuple[type[PipeInstruction], ...],
    ) -> None:
        super().__init__(engine.micro_batches, engine.num_stages, engine.stage_id)
        self._before_forward, self._before_update = before_forward, before_update
        self._left_out = left_out

    def steps(self) -> Iterator[list[Any]]:
        forwards = itertools.count()  # a stage processes micro-batches in order
        for every in super().steps():
            commands = [command for command in every if not isinstance(command, self._left_out)]
            if any(isinstance(command, ForwardPass) for command in commands):
                self._before_forward(next(forwards))
            update = [command for command in commands if isinstance(command, OptimizerStep)]
            yield [command for command in commands if command not in update]
            if update:
                self._before_update()
                yield update
