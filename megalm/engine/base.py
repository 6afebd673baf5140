"""What every engine on DeepSpeed has in common: how it is made, its state, and the end of a step."""

from __future__ import annotations

import copy
import math
import resource
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from megalm.checkpoint.fragment import Fragment
from megalm.config.resolve import OptimizerFacts
from megalm.engine.comm import ProcessComm
from megalm.engine.gate import UpdateGate
from megalm.engine.optimizer import build_optimizer, parameter_groups
from megalm.engine.protocol import StepResult
from megalm.engine.quirks import prints_to_log
from megalm.engine.state import OptimizerState, ReadFragment


class EngineBase:
    """Hands a model and its optimizer to DeepSpeed.

    Args:
        model: what DeepSpeed runs: an initialised model on `device`, fp32.
        part: the module whose parameters have canonical names: the model, or its part on this rank.
        settings: what `deepspeed.initialize` takes: batch triple, precision, ZeRO, clipping; no optimizer.
        optimizer: the optimizer's numbers.
        decay_embeddings: whether weight decay applies to embedding tables.
    """

    def __init__(
        self,
        model: nn.Module,
        part: nn.Module,
        settings: dict[str, Any],
        optimizer: OptimizerFacts,
        decay_embeddings: bool,
        comm: ProcessComm,
        device: torch.device,
    ) -> None:
        self._comm = comm
        self._device = device
        self._stage = int(settings["zero_optimization"]["stage"])
        self._scales_loss = bool(settings.get("fp16", {}).get("enabled", False))
        parameters = dict(part.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        offload = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
        inner = build_optimizer(parameter_groups(part, optimizer.weight_decay, decay_embeddings), optimizer, offload)
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

    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux tells KiB

    def _set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def _end_of_step(self, loss: float, norm: Callable[[], float]) -> StepResult:
        """After DeepSpeed's update, or what it did instead."""
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

    def _count_from(self, counters: dict[str, Any], step: int) -> None:
        engine = self._engine
        self._state.load_loss_scaler(counters["loss_scaler"])
        engine.skipped_steps = counters["skipped_steps"]
        engine.global_steps = step
        engine.global_samples = step * engine.train_batch_size()
        engine.micro_steps = step * engine.gradient_accumulation_steps()
