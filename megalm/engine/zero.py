"""The data-parallel engine: a model under DeepSpeed's ZeRO stage 0 to 3.

Shapes: B micro-batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor

from megalm.checkpoint.fragment import Fragment
from megalm.config.resolve import OptimizerFacts
from megalm.data.loader import GlobalBatch, MicroBatch
from megalm.engine.comm import ProcessComm
from megalm.engine.gate import UpdateGate
from megalm.engine.optimizer import build_optimizer, parameter_groups
from megalm.engine.protocol import Accept, StepResult
from megalm.engine.quirks import prints_to_log
from megalm.engine.state import OptimizerState, ReadFragment
from megalm.model.block import Block
from megalm.model.dropout import DropoutClock
from megalm.model.transformer import LanguageModel


class ZeroEngine:
    """Trains `model` as `settings`, the resolved DeepSpeed JSON, says.

    Args:
        model: an initialised model on `device`, fp32; its parameters' names are canonical.
        clock: the clock of the model's dropout layers.
        settings: what `deepspeed.initialize` takes: batch triple, precision, ZeRO, clipping; no optimizer.
        optimizer: the optimizer's numbers.
        decay_embeddings: whether weight decay applies to embedding tables.
    """

    def __init__(
        self,
        model: LanguageModel,
        clock: DropoutClock,
        settings: dict[str, Any],
        optimizer: OptimizerFacts,
        decay_embeddings: bool,
        comm: ProcessComm,
        device: torch.device,
    ) -> None:
        self._comm = comm
        self._device = device
        self._clock = clock
        self._stage = int(settings["zero_optimization"]["stage"])
        self._clipping = float(settings["gradient_clipping"])
        self._scales_loss = bool(settings.get("fp16", {}).get("enabled", False))
        if self._stage == 3:
            # A block is gathered as a whole, not layer by layer: fewer messages, and no hook of DeepSpeed's inside
            # what may be compiled.
            set_z3_leaf_modules(model, [Block])
        parameters = dict(model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        offload = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
        groups = parameter_groups(model, optimizer.weight_decay, decay_embeddings)
        inner = build_optimizer(groups, optimizer, offload)
        self._gate = UpdateGate(comm)
        self._gate.guard(inner)
        with prints_to_log():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=inner,
                config=copy.deepcopy(settings),  # DeepSpeed writes into what it is given
                dist_init_required=False,
            )
        self._state = OptimizerState(self._engine, parameters, shapes)
        self._first_counters = self.counters()

    def train_step(
        self, batch: GlobalBatch, step: int, learning_rate: float, accept: Accept | None = None
    ) -> StepResult:
        engine = self._engine
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self._device)
        # ZeRO averages gradients over ranks; the loss is a mean over the targets of the *global* batch.
        scale = self._comm.size / batch.target_count
        loss, norm = 0.0, self._state.gradient_norm
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            self._clock.step, self._clock.micro_batch = step, index * self._comm.size + self._comm.rank
            loss_sum, _ = engine(*self._tensors(micro_batch))
            engine.backward(loss_sum * scale, scale_wrt_gas=False)
            total += loss_sum.detach()
            if index == last:
                loss, norm = self._sum(total) / batch.target_count, self._norm_source()
                self._gate.open(loss, norm, accept)
            engine.step()
        applied = self._gate.close()
        # Nobody was asked: DeepSpeed found an overflow first. With a loss scale that is usual, else it is a fault.
        skipped = applied is None and self._scales_loss and math.isfinite(loss)
        return StepResult(
            loss=loss,
            grad_norm=norm(),
            loss_scale=float(self._state.loss_scaler().get("cur_scale", 1.0)),
            skipped=skipped,
            refused=not applied and not skipped,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        self._engine.eval()
        total = torch.zeros((), device=self._device)
        for micro_batch in micro_batches:
            loss_sum, _ = self._engine(*self._tensors(micro_batch))
            total += loss_sum
        return self._sum(total)

    @torch.no_grad()
    def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._engine.eval()
        places = torch.from_numpy(tokens).to(self._device), torch.from_numpy(positions).to(self._device)
        with torch.compiler.set_stance("force_eager"):  # texts grow: each length would be compiled anew
            logits = self._engine(places[0], positions=places[1])
        return logits.float().cpu().numpy()

    def fragments(self) -> Iterator[Fragment]:
        return self._state.fragments()

    def counters(self) -> dict[str, Any]:
        return {
            "optimizer_step": self._state.optimizer_step(),
            "skipped_steps": self._engine.skipped_steps,
            "loss_scaler": self._state.loss_scaler(),
        }

    def restore(self, read: ReadFragment, counters: dict[str, Any], step: int) -> None:
        self._state.load(read, counters["optimizer_step"])
        self._count_from(counters, step)

    def reset(self) -> None:
        self._state.forget_moments()
        self._count_from(self._first_counters, step=0)

    def _count_from(self, counters: dict[str, Any], step: int) -> None:
        engine = self._engine
        self._state.load_loss_scaler(counters["loss_scaler"])
        engine.skipped_steps = counters["skipped_steps"]
        engine.global_steps = step
        engine.global_samples = step * engine.train_batch_size()
        engine.micro_steps = step * engine.gradient_accumulation_steps()

    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux tells KiB

    def _tensors(self, batch: MicroBatch) -> tuple[Tensor | None, ...]:
        arrays = (batch.tokens, batch.labels, batch.documents)
        return tuple(
            None if array is None else torch.from_numpy(array).to(self._device, non_blocking=True) for array in arrays
        )

    def _sum(self, local: Tensor) -> float:
        """Sum over data-parallel ranks, in fp64, so that the value does not depend on their number."""
        return self._comm.sum([float(local)])[0]

    def _norm_source(self) -> Callable[[], float]:
        """What tells the gradient norm before clipping, once DeepSpeed is about to update.

        Without ZeRO DeepSpeed tells none: it is taken now, from gradients that are averaged already.
        """
        if self._stage > 0:
            return self._state.gradient_norm
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        return lambda: norm
