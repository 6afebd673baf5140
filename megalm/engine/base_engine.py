"""What every engine on DeepSpeed has in common: how it is made, its state, and the end of a step."""

from __future__ import annotations

import copy
import functools
import math
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from megalm.checkpoint.shard_spec import HasFragment
from megalm.communicator import Communicator
from megalm.engine.cpp_extensions import load_async_io, load_cpu_adam
from megalm.engine.deepspeed_patches import import_muon_uncompiled, prints_to_log
from megalm.engine.device import rank_facts
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.interface import JudgeUpdate, StepResult, UpdateVerdict
from megalm.engine.nvme_offload import SwapFolder
from megalm.engine.optimizer_state import OptimizerState, ReadFragment
from megalm.model.param_shard import shard_of
from megalm.parallel.process_groups import ParallelGroups
from megalm.planning.resolve import OptimizerFacts


class UpdateCheck:
    """One joint verdict before an update, in front of the optimizer's `step`.

    DeepSpeed calls the `step` of the optimizer that it was handed once for each parameter group (ZeRO 1, 2) or
    sub-group (ZeRO 3), after the global gradient norm is known and before anything has moved. The first call of a
    training step judges; refused, no group's weights, moments or step count change, and what DeepSpeed copies from
    masters to low-precision weights afterwards is what was there.

    Args:
        comm: the world; a rank that refuses refuses for all.
        judge: None takes every update whose numbers are finite.
    """

    def __init__(self, comm: Communicator, judge: JudgeUpdate | None) -> None:
        self._comm = comm
        self._judge = judge
        self._numbers: Callable[[], tuple[float, float]] | None = None
        self._verdict: UpdateVerdict | None = None
        # Returns the squares of the gradients being stepped, by parameter; set once DeepSpeed has made its wrapper.
        self.measure: Callable[[], dict[str, float]] = dict
        self.refused_squares: Counter[str] = Counter()

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on `optimizer.step` does nothing where the verdict refuses.

        The instance's method is replaced, and no subclass made: DeepSpeed compares exact types to know whether an
        optimizer works with ZeRO.
        """
        step = optimizer.step

        @functools.wraps(step)
        def checked(*args: Any, **options: Any) -> Any:
            if self._admits():
                return step(*args, **options)
            self.refused_squares.update(self.measure())
            return None

        optimizer.step = checked  # type: ignore[method-assign]

    def arm(self, loss: float, norm: Callable[[], float]) -> None:
        """Before the update of one training step.

        Args:
            loss: of the global batch, the same on every rank.
            norm: returns the global gradient norm; called only once DeepSpeed has computed it.
        """
        self._numbers, self._verdict = lambda: (loss, norm()), None
        self.refused_squares.clear()

    def disarm(self) -> UpdateVerdict | None:
        """After the update: the verdict of all ranks, None where DeepSpeed dropped the update without a `step`."""
        self._numbers = None
        return self._verdict

    def judge(self, loss: float, norm: float) -> UpdateVerdict:
        """This rank's verdict; what is not finite is always refused."""
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        verdict = UpdateVerdict(refuses=not is_finite) if self._judge is None else self._judge(loss, norm)
        return verdict if is_finite else replace(verdict, refuses=True)

    def _admits(self) -> bool:
        if self._numbers is None:  # DeepSpeed steps while it builds its engine, too
            return True
        if self._verdict is None:
            own = self.judge(*self._numbers())
            self._verdict = replace(own, refuses=self._comm.max([float(own.refuses)])[0] > 0)
        return not self._verdict.refuses


class ModelParallelUnit:
    """The grid of ranks as ZeRO asks for it, DeepSpeed's `mpu`.

    ZeRO partitions over the data group of this rank and adds gradient norms over its tensor group.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        assert groups.pipeline.size == 1, "a PipelineModule brings its own"
        self._data, self._tensor = groups.data, groups.tensor

    def get_data_parallel_rank(self) -> int:
        return self._data.index

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data.process_group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.index

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor.process_group


def parameter_groups(model: nn.Module, weight_decay: float, decay_embeddings: bool) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not; embedding tables do if `decay_embeddings`.

    Made before `deepspeed.initialize`: ZeRO 3 flattens every shape to one dimension.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        embedding = name.startswith("embedding.")
        groups[parameter.ndim >= 2 and (decay_embeddings or not embedding)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def build_optimizer(groups: list[dict[str, Any]], facts: OptimizerFacts, offload: bool) -> torch.optim.Optimizer:
    """torch's fused AdamW, which needs no compiler; with offload DeepSpeed's CPUAdam, which is built on first use.

    Learning rates are set by the engine before every step, so the one given here is never used.
    """
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_cpu_adam()
        return DeepSpeedCPUAdam(
            groups,
            lr=0.0,
            betas=facts.betas,
            eps=facts.epsilon,
            adamw_mode=facts.kind == "adamw",
            fp32_optimizer_states=True,
        )
    optimizer = torch.optim.AdamW if facts.kind == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=0.0, betas=facts.betas, eps=facts.epsilon, fused=True)


_SWAPPED_BYTES = 16  # an element's master, moments and gradient


class EngineBase:
    """Hands a model and its optimizer to DeepSpeed.

    Args:
        model: what DeepSpeed runs: an initialised model on `device`, fp32.
        part: the module whose parameters have canonical names: the model, or its part on this rank.
        settings: what `deepspeed.initialize` takes: batch triple, precision, ZeRO, clipping; no optimizer.
        optimizer: the optimizer's numbers.
        decay_embeddings: whether weight decay applies to embedding tables.
        judge: asked before each update; None: only what is not finite is refused.
        mpu: the grid for DeepSpeed; a PipelineModule brings its own.
    """

    def __init__(
        self,
        model: nn.Module,
        part: nn.Module,
        settings: dict[str, Any],
        optimizer: OptimizerFacts,
        decay_embeddings: bool,
        comm: DistributedCommunicator,
        groups: ParallelGroups,
        device: torch.device,
        judge: JudgeUpdate | None,
        mpu: ModelParallelUnit | None = None,
    ) -> None:
        self._comm = comm
        self._device = device
        self._data = groups.data
        self._stage = int(settings["zero_optimization"]["stage"])
        self._scales_loss = bool(settings.get("fp16", {}).get("enabled", False))
        parameters = dict(part.named_parameters())
        shards = {name: shard_of(parameter) for name, parameter in parameters.items()}
        self._owned = [parameter for name, parameter in parameters.items() if shards[name].is_owner]
        for name, parameter in parameters.items():  # DeepSpeed's word for: count it in the gradient's norm
            parameter.tensor_model_parallel = shards[name].is_owner  # type: ignore[attr-defined]
        settings = copy.deepcopy(settings)  # DeepSpeed writes into what it is given
        offload = settings["zero_optimization"].get("offload_optimizer") or {"device": "none"}
        self._swap_folder: SwapFolder | None = None
        if offload["device"] == "nvme":
            load_async_io()
            elements = sum(parameter.numel() for parameter in parameters.values())
            needed = _SWAPPED_BYTES * elements // self._data.size * rank_facts().local_world_size
            self._swap_folder = SwapFolder(offload["nvme_path"], needed)
            offload["nvme_path"] = str(self._swap_folder.path)
        inner = build_optimizer(
            parameter_groups(part, optimizer.weight_decay, decay_embeddings), optimizer, offload["device"] != "none"
        )
        self._last_norm = 0.0
        self._check = UpdateCheck(comm, judge)
        self._check.install(inner)
        import_muon_uncompiled()
        with prints_to_log():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=inner,
                mpu=mpu,
                config=settings,
                dist_init_required=False,
            )
        self._state = OptimizerState(self._engine, parameters, shards, is_first_copy=groups.data.index == 0)
        self._check.measure = self._state.gradient_squares
        self._first_counters = self.counters()

    def fragments(self) -> Iterator[HasFragment]:
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

    def refused_gradients(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for squares in self._comm.gather(dict(self._check.refused_squares)):
            total.update(squares)
        whole = sum(total.values())
        if not math.isfinite(whole) or whole == 0.0:
            return {}
        # They were clipped, and scaled as the loss is; what they were before follows from the norm of the whole.
        return {name: self._last_norm * math.sqrt(square / whole) for name, square in total.items()}

    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux tells KiB

    def close(self) -> None:
        """Nothing is left on a disk that states were swapped to."""
        if self._swap_folder is not None:
            self._swap_folder.remove()
            self._swap_folder = None

    def _set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def _norm_source(self) -> Callable[[], float]:
        """What tells the gradient norm before clipping, once DeepSpeed is about to update.

        Without ZeRO it tells none, or this stage's only: then the norm is taken now, from gradients that are averaged
        already.
        """
        if self._stage > 0:
            return self._state.gradient_norm
        squares = sum(float(p.grad.double().square().sum()) for p in self._owned if p.grad is not None)
        norm = (self._comm.sum([squares])[0] / self._data.size) ** 0.5  # every copy of the model has told its own
        return lambda: norm

    def _end_of_step(self, loss: float, norm: Callable[[], float]) -> StepResult:
        """After DeepSpeed's update, or what it did instead."""
        verdict = self._check.disarm()
        self._last_norm = norm()
        if verdict is None and not (self._scales_loss and math.isfinite(loss)):
            # DeepSpeed found an overflow and asked nobody: usual with a loss scale, without one a fault.
            verdict = replace(self._check.judge(loss, self._last_norm), refuses=True)
        return StepResult(loss, self._last_norm, self._state.loss_scale(), verdict)

    def _count_from(self, counters: dict[str, Any], step: int) -> None:
        engine = self._engine
        self._state.load_loss_scaler(counters["loss_scaler"])
        engine.skipped_steps = counters["skipped_steps"]
        engine.global_steps = step
        engine.global_samples = step * engine.train_batch_size()
        engine.micro_steps = step * engine.gradient_accumulation_steps()


def padded(tokens: npt.NDArray[np.int64], multiple: int) -> npt.NDArray[np.int64]:
    """[B, T] -> [B, T'] with T' the next multiple; nothing attends to what is added on the right."""
    return np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % multiple)))
