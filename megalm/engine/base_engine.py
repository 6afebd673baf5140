"""The base of the DeepSpeed engines: construction, the check before each update, optimizer state, end of a step."""

from __future__ import annotations

import copy
import functools
import math
import resource
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from megalm.checkpoint.shard_spec import Fragment
from megalm.communicator import Communicator
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.data.sampling.samples import IGNORE_INDEX
from megalm.engine.cpp_extensions import load_async_io
from megalm.engine.deepspeed_patches import import_muon_uncompiled, prints_to_log
from megalm.engine.expert_loads import ExpertBiases, ExpertLoads
from megalm.engine.interface import JudgeUpdate, StepResult, UpdateVerdict
from megalm.engine.nvme_offload import SwapFolder
from megalm.engine.optimizer.build_optimizer import build_optimizer, group_without_parameters, parameter_groups
from megalm.engine.optimizer.expert_states import count_experts_once, register_groups
from megalm.engine.optimizer.muon import Muon
from megalm.engine.optimizer.optimizer_state import FrozenWeights, OptimizerState, ReadFragment, read_norm_once
from megalm.engine.phase_clock import PhaseClock
from megalm.model.layer_factory import WHOLE_SEQUENCE, ShardedAxis, VocabularyOutput, WholeSequence, shard_of
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock
from megalm.parallel.process_groups import ParallelGroups
from megalm.planning.resolve import ResolvedRun
from megalm.rank_environment import rank_facts


class UpdateCheck:
    """Wraps the optimizer's `step` so that all ranks accept or refuse an update together.

    DeepSpeed calls the `step` of the given optimizer once per parameter group (ZeRO 1, 2) or sub-group (ZeRO 3), after
    it knows the global gradient norm and before it changes any weight. The first call of a training step decides. If
    the update is refused, no group's weights, moments or step count change, and DeepSpeed's copy from masters to
    low-precision weights writes the values that were already there.

    Args:
        comm: all ranks; if one refuses, all do.
        judge: None accepts every update whose numbers are finite.
    """

    def __init__(self, comm: Communicator, judge: JudgeUpdate | None) -> None:
        self._comm = comm
        self._judge = judge
        self._numbers: Callable[[], tuple[float, float]] | None = None
        self._verdict: UpdateVerdict | None = None
        # Returns squared gradient norms by parameter; set once DeepSpeed has wrapped the optimizer.
        self.measure: Callable[[], dict[str, float]] = dict
        # Called before an update that is not refused, where DeepSpeed does not clip.
        self.clip: Callable[[], None] = lambda: None
        self.refused_squares: Counter[str] = Counter()

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `optimizer.step` do nothing when the verdict refuses.

        Replaces the instance's method instead of subclassing: DeepSpeed compares exact types to decide whether an
        optimizer works with ZeRO.
        """
        step = optimizer.step

        @functools.wraps(step)
        def checked(*args: Any, **options: Any) -> Any:
            if self._admits():
                self.clip()
                return step(*args, **options)
            self.refused_squares.update(self.measure())
            return None

        optimizer.step = checked  # type: ignore[method-assign]

    def arm(self, numbers: Callable[[], tuple[float, float]]) -> None:
        """Prepare the check of one training step's update.

        Args:
            numbers: returns loss and gradient norm of the global batch, the same on every rank; called only after
                DeepSpeed has computed the norm.
        """
        self._numbers, self._verdict = numbers, None
        self.refused_squares.clear()

    @property
    def is_idle(self) -> bool:
        """Whether no training step is under way: DeepSpeed also steps while it builds its engine."""
        return self._numbers is None

    def disarm(self) -> UpdateVerdict | None:
        """After the update: return the joint verdict; None if DeepSpeed dropped the update without calling `step`."""
        self._numbers = None
        return self._verdict

    def judge(self, loss: float, norm: float) -> UpdateVerdict:
        """Return this rank's verdict; a loss or norm that is not finite is always refused."""
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        verdict = UpdateVerdict(refuses=not is_finite) if self._judge is None else self._judge(loss, norm)
        return verdict if is_finite else replace(verdict, refuses=True)

    def _admits(self) -> bool:
        if self.is_idle:
            return True
        assert self._numbers is not None
        if self._verdict is None:
            own = self.judge(*self._numbers())
            self._verdict = replace(own, refuses=self._comm.max([float(own.refuses)])[0] > 0)
        return not self._verdict.refuses


class HostCopy:
    """A few numbers of the device on their way to the host: requested early, read late.

    The copy is queued behind the work that computes the numbers. Reading waits for the device only if it has not come
    that far, so a reading after another one of later numbers costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._numbers = torch.empty(0)
        self._read: list[float] | None = None

    def request(self, numbers: Tensor) -> None:
        self._numbers, self._read = numbers, None
        if self._copied is not None:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied.record()

    def read(self) -> list[float]:
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        if self._read is None:
            self._read = self._numbers.tolist()
        return self._read


class DatasetLosses:
    """Adds up the losses of forward passes by dataset, in one training step of a mixture.

    Shapes: b samples of a micro-batch, D datasets.

    Args:
        output: of the model, where this rank computes the loss and reports it; None elsewhere: its sums are zeros.
    """

    def __init__(self, output: VocabularyOutput | None, device: torch.device) -> None:
        self._device, self._output = device, output
        self._targets: tuple[int, ...] = ()
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)  # [D]
        self._datasets: Tensor | None = None  # [b] of the micro-batch in work

    def begin(self, batch: GlobalBatch) -> None:
        """Begin a training step."""
        self._targets = batch.dataset_targets
        self._sums = torch.zeros(len(self._targets), dtype=torch.float64, device=self._device)
        self._datasets = None
        if self._output is not None:
            self._output.observe = self._add if self._targets else None

    def of(self, datasets: npt.NDArray[np.int64] | None) -> None:
        """Set the datasets [b] of the next forward pass; None: its losses are not added."""
        to = None if datasets is None else torch.from_numpy(datasets)
        self._datasets = None if to is None else to.to(self._device, non_blocking=True)

    def sums(self) -> list[Tensor]:
        """Return this rank's sum of losses in nats, by dataset."""
        return list(self._sums)

    def means(self, sums: Sequence[float]) -> tuple[float | None, ...]:
        """Return the losses per target, given the sums over all ranks, which come last in `sums`."""
        own = sums[len(sums) - len(self._targets) :]
        return tuple(nats / count if count else None for nats, count in zip(own, self._targets, strict=True))

    def _add(self, losses: Tensor) -> None:
        if self._datasets is not None:
            self._sums.index_add_(0, self._datasets, losses.view(len(self._datasets), -1).double().sum(1))


class ModelParallelUnit:
    """DeepSpeed's `mpu`: this rank's process groups under the names that ZeRO expects.

    ZeRO partitions over data x context, whose gradients it averages, and sums gradient norms over tensor x pipeline.
    DeepSpeed's own names for sequence parallelism stay undefined: its ZeRO 3 would train something else.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._data, self._model = groups.data_context, groups.model

    def get_data_parallel_rank(self) -> int:
        return self._data.index

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data.process_group

    def get_model_parallel_rank(self) -> int:
        return self._model.index

    def get_model_parallel_world_size(self) -> int:
        return self._model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model.process_group


_SWAPPED_BYTES = 16  # per element: master, two moments and gradient, fp32


@dataclass(frozen=True)
class EngineContext:
    """The run, the ranks and the device that an engine is built for.

    Attributes:
        judge: called before each update; None refuses only numbers that are not finite.
        clock: of the model's dropout layers.
        sequence: how this rank holds a sample's sequence.
    """

    run: ResolvedRun
    shape: ModelConfig
    device: torch.device
    comm: Communicator
    groups: ParallelGroups
    judge: JudgeUpdate | None
    clock: DropoutClock
    sequence: WholeSequence = WHOLE_SEQUENCE

    def settings(self) -> dict[str, Any]:
        """Return a copy of the run's settings for DeepSpeed, which modifies them."""
        settings = copy.deepcopy(self.run.deepspeed)
        # DeepSpeed takes the ranks of a context group, which share gradients, for ranks with samples of their own.
        settings["train_batch_size"] *= self.groups.context.size
        if self.groups.pipeline.size > 1:
            # Gradients are reduced once, after all backward passes, which DeepSpeed does not run.
            settings["zero_optimization"]["overlap_comm"] = False
        return settings


def _phase_clock(run: ResolvedRun, device: torch.device) -> PhaseClock | None:
    wanted = run.diagnostics
    is_measured = wanted.phase_times or wanted.profile_steps is not None
    return PhaseClock(device, wanted.phase_times) if is_measured else None


def _mark_owned(parameters: dict[str, nn.Parameter], shards: dict[str, ShardedAxis]) -> None:
    """Mark the parameters that this rank counts: DeepSpeed has marked ones in the gradient norm."""
    for name, parameter in parameters.items():
        parameter.tensor_model_parallel = shards[name].is_owner  # type: ignore[attr-defined]


def _swap_folder(offload: dict[str, Any], elements: int) -> SwapFolder:
    """Return the folder of states on NVMe, `elements` of them on each rank, which DeepSpeed's settings then name."""
    load_async_io()
    found = SwapFolder(offload["nvme_path"], _SWAPPED_BYTES * elements * rank_facts().local_world_size)
    offload["nvme_path"] = str(found.path)
    return found


def _expert_loads(part: nn.Module, context: EngineContext) -> ExpertLoads:
    train, device = context.run.config.train, context.device
    counts = context.groups.tensor.index == 0
    saves = counts and context.groups.data_context.index == 0
    biases = ExpertBiases(part, context.shape, device, train.expert_bias_rate, saves)
    return ExpertLoads(part, context.shape, device, biases, counts, train.expert_capacity_factor is not None)


class EngineBase(ABC):
    """Hands a model and its optimizer to DeepSpeed.

    Args:
        model: the model, or its part on this rank, whose parameters have canonical names: initialized, on the context's
            device and in the run's precision; under ZeRO 3 already divided.
        output: of the model; None on a rank without its head.
    """

    def __init__(self, model: nn.Module, context: EngineContext, output: VocabularyOutput | None) -> None:
        run, groups, settings = context.run, context.groups, context.settings()
        self._comm = context.comm
        self._device = context.device
        self._groups, self._sequence, self._clock = groups, context.sequence, context.clock
        self._data_ranks, self._replicas = groups.topology.data, groups.data_context.size
        # Every rank of the last stage's tensor group has the same loss: only the first reports it.
        self._reports_loss = output is not None and groups.tensor.index == 0
        # Of the length of a sequence, of which ranks hold parts, and slices of them.
        self._multiple: int = model.slices * context.sequence.multiple  # type: ignore[assignment, operator]
        self._output = output if self._reports_loss else None
        self._by_dataset = DatasetLosses(self._output, context.device)
        self._experts = _expert_loads(model, context) if context.shape.moe_layers else None
        self._stage = int(settings["zero_optimization"]["stage"])
        self._scales_loss = bool(settings.get("fp16", {}).get("enabled", False))
        parameters = dict(model.named_parameters())
        shards = {name: shard_of(parameter) for name, parameter in parameters.items()}
        copies = {name: groups.copies_of(name) for name in parameters}
        # Each with the number of ranks that hold the same.
        self._owned = [(it, copies[name].size) for name, it in parameters.items() if shards[name].is_owner]
        _mark_owned(parameters, shards)
        self._phases = _phase_clock(run, context.device)
        offload = settings["zero_optimization"].get("offload_optimizer") or {"device": "none"}
        weight_groups = parameter_groups(model, run, context.shape.width_multiplier) or [
            group_without_parameters(model)
        ]
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        frozen = {name: parameter for name, parameter in parameters.items() if name not in trained}
        elements = sum(math.prod(shards[name].sizes) // copies[name].size for name in trained)
        self._swap_folder = _swap_folder(offload, elements) if offload["device"] == "nvme" else None
        self._frozen = FrozenWeights(frozen, shards, copies)
        inner = build_optimizer(weight_groups, run, offload["device"] != "none")
        self._last_norm = self._learning_rate = 0.0
        self._step_sums, self._divisor = HostCopy(context.device), 1
        self._check = UpdateCheck(context.comm, context.judge)
        self._check.install(inner)
        if self._stage == 0:  # DeepSpeed clips by a norm that leaves out other stages, and other ranks' experts
            self._check.clip = functools.partial(self._clip, settings["gradient_clipping"])
            settings["gradient_clipping"] = 0.0
        import_muon_uncompiled()
        read_norm_once()
        if groups.expert.size > 1 or deepspeed_groups._EXPERT_PARALLEL_GROUP:  # of an earlier engine of this process
            register_groups(model, weight_groups, groups)
        with prints_to_log():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=inner,
                mpu=ModelParallelUnit(groups),
                config=settings,
                dist_init_required=False,
            )
        self._phase_seconds: dict[str, float] = {}
        if groups.expert.size > 1:
            count_experts_once(self._engine.optimizer, groups.expert)
        first = [name for name, group in copies.items() if group.index == 0]
        self._state = OptimizerState(self._engine, trained, shards, first, run.config.train.ema_decay)
        if isinstance(inner, Muon):
            units = self._state.units_of("momentum_buffer", self._replicas, groups.expert.size)
            inner.lay_out(units, groups, is_copied=self._stage == 0)
        self._check.measure = self._state.gradient_squares
        self._first_counters = self._counters(self._state.optimizer_step())

    def fragments(self) -> Iterator[Fragment]:
        yield from self._state.fragments()
        yield from self._frozen.fragments()
        if self._experts is not None:
            yield from self._experts.biases.fragments()

    def counters(self) -> dict[str, Any]:
        # Without ZeRO, a pipeline stage whose parameters are all frozen counts no updates.
        (optimizer_step,) = self._comm.max([float(self._state.optimizer_step())])
        return self._counters(int(optimizer_step))

    def _counters(self, optimizer_step: int) -> dict[str, Any]:
        return {
            "optimizer_step": optimizer_step,
            "skipped_steps": self._engine.skipped_steps,
            "loss_scaler": self._state.loss_scaler(),
        }

    def restore(self, read: ReadFragment, counters: dict[str, Any], step: int) -> None:
        self._frozen.load(read)
        self._state.load(read, counters["optimizer_step"])
        self._frozen.forget_second_copies()
        if self._experts is not None:
            self._experts.biases.load(read)
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
        # The squares are of clipped, loss-scaled gradients: recover each norm from its share of the unclipped total.
        return {name: self._last_norm * math.sqrt(square / whole) for name, square in total.items()}

    def train_step(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        self._engine.train()
        self._begin_step(batch, learning_rate)
        self._run_step(batch, step)
        return self._end_of_step()

    @abstractmethod
    def _run_step(self, batch: GlobalBatch, step: int) -> None:
        """Run forward and backward passes and the update, with `_arm_check` before it."""

    def phase_seconds(self) -> dict[str, float]:
        return self._phase_seconds

    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB

    def close(self) -> None:
        """Remove the NVMe swap folder, if any."""
        if self._swap_folder is not None:
            self._swap_folder.remove()
            self._swap_folder = None

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._phases is None else self._phases(name)

    def _begin_step(self, batch: GlobalBatch, learning_rate: float) -> None:
        """Prepare a training step; the size of its micro-batches is the one that the engine was built for."""
        engine, micro_batches = self._engine, len(batch.micro_batches)
        self._learning_rate = learning_rate
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_scale"]
        if micro_batches != engine.gradient_accumulation_steps():
            engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * self._replicas)
            engine.micro_steps = engine.global_steps * micro_batches  # a boundary is where they divide
            if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO's copy
                engine.optimizer.gradient_accumulation_steps = micro_batches
        self._by_dataset.begin(batch)
        if self._experts is not None:
            sequences = micro_batches * len(batch.micro_batches[0].tokens)  # of this rank, or parts of them
            # The gradient of the router's losses does not pass the loss. DeepSpeed takes the mean over data x context,
            # and divides by the loss scale.
            factor = self._state.loss_scale() * self._groups.context.size / sequences
            self._experts.begin(sequences * self._data_ranks, factor)

    def _begin_micro_batch(self, batch: GlobalBatch, step: int, index: int) -> None:
        """Prepare the forward pass of this rank's micro-batch `index`."""
        self._by_dataset.of(batch.micro_batches[index].datasets)
        self._clock.step = step
        # Its number among those of all data-parallel ranks in a step.
        self._clock.micro_batch = index * self._data_ranks + self._groups.coordinate.data

    def _tensors(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return this rank's positions of tokens and labels, and whole documents, on the device."""

        def to_device(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self._device, non_blocking=True)

        documents = None if batch.documents is None else to_device(batch.documents)
        cut = self._sequence.cut
        return cut(to_device(batch.tokens)), cut(to_device(batch.labels)), documents

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        self._exchange_average()
        yield
        self._exchange_average()  # not after an error, which ends the run: other ranks would not join

    def _exchange_average(self) -> None:
        self._state.exchange_average()
        self._frozen.forget_second_copies()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        self._engine.eval()
        return float(self._sum_over_ranks(self._loss_sum(micro_batches)))

    @torch.no_grad()
    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        self._engine.eval()
        missing = -tokens.shape[1] % self._multiple  # no token attends to the padding on the right
        padded = torch.from_numpy(np.pad(tokens, ((0, 0), (0, missing)))).to(self._device)
        with torch.compiler.set_stance("force_eager"):  # texts grow: each new length would be compiled again
            logits = self._logits(self._sequence.cut(padded), torch.from_numpy(positions).to(self._device))
        return logits.float().cpu().numpy()

    @abstractmethod
    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits [B, V] of the token after each position, on every rank; `tokens` are this rank's."""

    @torch.no_grad()
    def row_losses(self, batch: MicroBatch) -> npt.NDArray[np.float64]:
        """Return the sum of losses in nats of each row, fp64 [B]; the data-parallel ranks share the rows."""
        rows, ranks = len(batch.tokens), self._data_ranks
        extra = ((0, -rows % ranks), (0, -batch.tokens.shape[1] % self._multiple))  # all ranks have as many rows
        own = slice(self._groups.coordinate.data, None, ranks)
        tokens = np.pad(batch.tokens, extra)[own]
        labels = np.pad(batch.labels, extra, constant_values=IGNORE_INDEX)[own]
        self._engine.eval()
        found: list[Tensor] = []
        observed = self._output.observe if self._output is not None else None
        if self._output is not None:
            self._output.observe = found.append
        try:
            with torch.compiler.set_stance("force_eager"):  # each new length would be compiled again
                self._loss_sum([MicroBatch(tokens, labels, None)])
        finally:
            if self._output is not None:
                self._output.observe = observed
        losses = torch.zeros(rows + extra[0][1], dtype=torch.float64, device=self._device)
        if found:
            losses[own] = torch.cat(found).view(len(tokens), -1).double().sum(1)
        dist.all_reduce(losses)
        return losses[:rows].cpu().numpy()

    @abstractmethod
    def _loss_sum(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return this rank's sum of losses in nats, of forward passes alone."""

    def _sum_over_ranks(self, loss: Tensor, *others: Tensor) -> Tensor:
        """Return the sums of `loss` over all samples and parts of them, and of `others` over all ranks, on the
        device, flat.

        In fp64, so that the values do not depend on the number of ranks.
        """
        own = torch.zeros(1 + sum(map(torch.numel, others)), dtype=torch.float64, device=self._device)
        if self._reports_loss:
            own[0] = loss
        end = 1
        for values in others:
            start, end = end, end + values.numel()
            own[start:end] = values.flatten()
        dist.all_reduce(own)
        return own

    def _arm_check(self, loss_sum: Tensor, divisor: int) -> None:
        """Prepare the check of the update: call after the last backward pass, before DeepSpeed's step.

        Without ZeRO, DeepSpeed gives no norm, or only this pipeline stage's: it is computed here, from gradients that
        are already averaged.
        """
        self._by_dataset.of(None)  # no other forward pass counts
        squares = []
        if self._stage == 0:
            found = [(it.grad, copies) for it, copies in self._owned if it.grad is not None]
            norms = [torch.linalg.vector_norm(it, dtype=torch.float64) / math.sqrt(copies) for it, copies in found]
            squares = [torch.stack(norms).square().sum() if norms else torch.zeros((), device=self._device)]
        routing = [] if self._experts is None else [self._experts.sums()]
        sums = self._sum_over_ranks(loss_sum, *squares, *routing, *self._by_dataset.sums())
        self._step_sums.request(sums)
        self._divisor = divisor
        self._check.arm(self._loss_and_norm)

    def _clip(self, most: float) -> None:
        """Shorten the gradients of ZeRO 0 to a norm of `most`; 0: leave them."""
        if not most or self._check.is_idle:
            return
        _, norm = self._loss_and_norm()
        if norm > most:
            gradients = [it.grad for group in self._engine.optimizer.param_groups for it in group["params"]]
            torch._foreach_mul_([it for it in gradients if it is not None], most / norm)

    def _loss_and_norm(self) -> tuple[float, float]:
        """Return loss and gradient norm before clipping; known once DeepSpeed is about to update."""
        loss_sum, *others = self._step_sums.read()
        norm = self._state.gradient_norm() if self._stage else math.sqrt(others[0])
        return loss_sum / self._divisor, norm

    def _end_of_step(self) -> StepResult:
        """Return the step's result, after DeepSpeed has updated or skipped."""
        if self._phases is not None:
            self._phase_seconds = self._phases.read()
        verdict = self._check.disarm()
        loss, self._last_norm = self._loss_and_norm()
        if verdict is None and not (self._scales_loss and math.isfinite(loss)):
            # DeepSpeed found an overflow and did not call `step`: normal with a loss scale, a fault without one.
            verdict = replace(self._check.judge(loss, self._last_norm), refuses=True)
        sums = self._step_sums.read()
        routing = None if self._experts is None else self._experts.statistics(sums[1 if self._stage else 2 :])
        if verdict is not None and not verdict.refuses:
            self._state.ema.update()
            # As weights, biases stay at rate zero.
            if self._experts is not None and routing is not None and self._learning_rate > 0:
                self._experts.biases.follow(routing)
        by_dataset = self._by_dataset.means(sums)
        return StepResult(loss, self._last_norm, self._state.loss_scale(), verdict, by_dataset, routing)

    def _count_from(self, counters: dict[str, Any], step: int) -> None:
        engine = self._engine
        self._state.load_loss_scaler(counters["loss_scaler"])
        engine.skipped_steps = counters["skipped_steps"]
        engine.global_steps = step
        engine.global_samples = step * engine.train_batch_size()
        engine.micro_steps = step * engine.gradient_accumulation_steps()
