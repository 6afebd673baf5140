"""The memory of a run by the estimate: what "auto" decides by it, whether the run fits, which changes make it fit.

No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts
from megalm.config.deepspeed.json_schema import OffloadOptimizerSection, Precision
from megalm.config.schema import OptimizerStateKind, Recompute, RunConfig
from megalm.cost_model.memory import MemoryCase, MemoryPlan, estimate_memory, shares
from megalm.model.model_config import ModelConfig, recomputed_flops_per_token
from megalm.planning.engine_checks import no_recomputation
from megalm.topology import Topology
from megalm.utils.formatting import format_bytes

if TYPE_CHECKING:
    from megalm.planning.batch_size import BatchPlan

# The share of the memory that "auto" plans to use: an estimate is not a measurement, and allocators fragment.
USABLE_MEMORY = 0.85

_SMALLER_STATES: dict[OptimizerStateKind, tuple[OptimizerStateKind, ...]] = {
    "fp32": ("bf16", "8bit"),
    "bf16": ("8bit",),
    "8bit": (),
}

_CHUNK_ON_CPU, _CHUNK_ON_GPU = 1024, 8192  # tokens: logits that fit caches; matrix products that fill a GPU
_BYTES_PER_LOGIT = 8  # a logit and its gradient in the model's type, and an fp32 probability
_SHARE_OF_LOGITS = 1 / 16  # of a GPU's memory

_TILE = 4096  # tokens: a matrix product of this many fills a GPU

FitLevel = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class MemoryFit:
    """The estimate of the fullest rank against its device, and its CPU memory against its share of the node.

    Attributes:
        step, start: bytes on the device in a step, and at most before the first one.
        host_needed: bytes in the CPU's memory, in a step or at the start; on a CPU they are in `step` and `start`.
        host_available: None if it is not known.
    """

    step: int
    start: int
    available: int
    host_needed: int
    host_available: int | None

    @staticmethod
    def of(plan: MemoryPlan, device: DeviceFacts) -> MemoryFit:
        return MemoryFit(plan.total, plan.start, device.memory_bytes, plan.host_peak, device.host_memory_bytes)

    @property
    def needed(self) -> int:
        """Bytes on the device."""
        return max(self.step, self.start)

    @property
    def leaves_room(self) -> bool:
        """Whether a step leaves device memory to spare; a micro-batch changes nothing else."""
        return self.step <= self.available * USABLE_MEMORY

    @property
    def share(self) -> float:
        """The part of the memory that is needed, of the fuller memory."""
        return max(self.needed / self.available, self.host_needed / (self.host_available or float("inf")))

    @property
    def level(self) -> FitLevel:
        return "fits" if self.share <= USABLE_MEMORY else "tight" if self.share <= 1 else "does not fit"

    def __str__(self) -> str:
        text = f"a rank needs {_share(self.needed, self.available)}"
        if self.start > self.step:
            text += " at the start"
        if self.host_needed:
            text += f" and {_share(self.host_needed, self.host_available)} of CPU memory"
        return text


def _share(needed: int, available: int | None) -> str:
    if available is None:
        return f"{format_bytes(needed)}"
    return f"{format_bytes(needed)} of {format_bytes(available)} ({needed / available:.0%})"


def loss_chunk_tokens(config: RunConfig, shape: ModelConfig, device: DeviceFacts) -> int:
    """Return how many tokens' logits the loss holds at once: the configuration's number, or the device's.

    A GPU holds as many of 8192, 4096, 2048 and 1024 as take no more than a sixteenth of its memory.
    """
    if config.train.loss_chunk_tokens is not None:
        return config.train.loss_chunk_tokens
    rows = math.ceil(shape.vocab_size / config.parallel.tensor)
    chunk = _CHUNK_ON_CPU if device.kind == "cpu" else _CHUNK_ON_GPU
    while chunk > _CHUNK_ON_CPU and chunk * rows * _BYTES_PER_LOGIT > device.memory_bytes * _SHARE_OF_LOGITS:
        chunk //= 2
    return chunk


@dataclass(frozen=True)
class RunMemory:
    """What the memory of a run depends on, but for its batch and for what "auto" decides by it."""

    config: RunConfig
    ds: DeepSpeedConfig
    shape: ModelConfig
    topology: Topology
    precision: Precision
    device: DeviceFacts

    def case(self, batch: BatchPlan, whole_gradients: bool, recompute: Recompute) -> MemoryCase:
        """Return the facts that the memory estimate needs."""
        config, settings, precision, device = self.config, self.ds.settings, self.precision, self.device
        # Without flash attention; `fused_attention` has the rule, and a GPU has it where it has bf16.
        dense_mask = config.model.attention_dropout > 0 and config.data.masks_documents
        repeats_keys = device.kind == "cuda" and (dense_mask or precision == "fp32" or not device.bf16)
        return MemoryCase(
            shape=self.shape,
            sequence_length=config.data.sample_length,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            precision=precision,
            gradient_precision=settings.data_types.grad_accum_dtype or ("fp16" if precision == "fp16" else "fp32"),
            communication_precision=settings.communication_data_type or ("fp16" if precision == "fp16" else "fp32"),
            zero=settings.zero_optimization.model_copy(update=self.gathered_sizes()),
            topology=self.topology,
            loss_chunk_tokens=loss_chunk_tokens(config, self.shape, device),
            checkpoint_activations_every=config.train.checkpoint_activations_every,
            recompute=recompute,
            mlp_chunk_tokens=config.train.mlp_chunk_tokens,
            offload_activations=config.train.offload_activations,
            embedding_weight_decay=config.train.embedding_weight_decay,
            parameter_groups=config.train.parameter_groups,
            document_mask=config.data.masks_documents,
            on_cpu=device.kind == "cpu",
            checkpoint_copy=config.checkpoint.asynchronous,
            sequence_parallel=config.parallel.sequence,
            ring=config.parallel.context_method == "ring",
            whole_gradients=whole_gradients,
            repeats_keys=repeats_keys,
            device_bytes=device.memory_bytes,
            float8=config.precision.float8,
            optimizer_state=config.train.optimizer_state,
            muon=settings.uses_muon,
            ema=config.train.ema_decay is not None,
            schedule_name=config.parallel.schedule_name,
            virtual_stages=config.parallel.virtual_stages,
        )

    def fit(self, batch: BatchPlan, whole_gradients: bool, recompute: Recompute) -> MemoryFit:
        return MemoryFit.of(estimate_memory(self.case(batch, whole_gradients, recompute)), self.device)

    def gathered_sizes(self) -> dict[str, int]:
        """Return ZeRO 3's sizes in elements that the JSON leaves open and for which DeepSpeed's defaults are no good.

        A block is gathered in one message, while the block before it computes. Small parameters travel with it: those
        that DeepSpeed keeps on every rank are gathered one by one after each update, and the device waits for them.
        """
        zero = self.ds.settings.zero_optimization
        if zero.stage != 3:
            return {}
        given = {key.removeprefix("zero_optimization.") for key in self.ds.explicit_keys}
        threshold = zero.param_persistence_threshold if "param_persistence_threshold" in given else 0
        parameters = next(shares(self.shape, self.topology)).parameters().items()
        counts = [math.prod(size) for name, size in parameters if name.startswith("layers.0.")]
        block = sum(count for count in counts if count > threshold)
        sizes = {
            "param_persistence_threshold": threshold,
            "prefetch_bucket_size": max(block, zero.prefetch_bucket_size),
            "max_live_parameters": max(2 * block, zero.max_live_parameters),
        }
        return {name: size for name, size in sizes.items() if name not in given and size != getattr(zero, name)}

    def reduction(self, batch: BatchPlan, recompute: Recompute) -> tuple[bool, list[str]]:
        """Return whether ZeRO 2 keeps whole gradients and sends them once a step, and a notice if "auto" decides it."""
        zero, wanted = self.ds.settings.zero_optimization, self.config.train.reduce_gradients
        if zero.stage != 2 or wanted != "auto" or batch.accumulation == 1 or batch.data_parallel == 1:
            return zero.stage == 2 and wanted == "step", []
        often = f'train.reduce_gradients ("auto"): gradients are reduced {batch.accumulation} times a step'
        if zero.optimizer_device != "none":
            return False, [f"{often}: offload_optimizer keeps no whole ones"]
        whole = self.fit(batch, True, recompute)
        if not whole.leaves_room:
            return False, [f"{often}, not once: with whole gradients {whole}"]
        return True, ['train.reduce_gradients ("auto"): gradients are kept whole and reduced once a step']

    def least_recomputation(self, batch: BatchPlan, whole_gradients: bool) -> tuple[Recompute, str]:
        """Return what each block recomputes under "auto", and a notice of it: the least arithmetic that fits."""
        config, zero = self.config, self.ds.settings.zero_optimization
        length, tiles = config.data.sample_length, config.train.mlp_chunk_tokens is not None
        choices: list[Recompute] = [
            kind for kind in get_args(Recompute) if not no_recomputation(kind, config, self.device, zero)
        ]
        # "none" stays before "norms".
        choices.sort(key=lambda kind: recomputed_flops_per_token(self.shape, length, kind, tiles=tiles))
        needs = {kind: self.fit(batch, whole_gradients, kind) for kind in choices}
        least = min(choices, key=lambda kind: needs[kind].step)
        chosen = next((kind for kind in choices if needs[kind].leaves_room), least)
        notice = f'train.recompute ("auto"): {chosen}'
        return chosen, notice if chosen == "none" else f"{notice}; without recomputation {needs['none']}"


def memory_notices(fit: MemoryFit) -> list[str]:
    """Return a warning unless the run fits with room to spare."""
    if fit.level == "fits":
        return []
    risk = "the run probably runs out of memory" if fit.level == "does not fit" else "it may run out of memory"
    return [f"by the estimate {fit}, more than the {USABLE_MEMORY:.0%} that are safe: {risk}"]


def remedies(case: MemoryCase, device: DeviceFacts) -> list[str]:
    """Return the single changes that each make the run fit; else the shortest row of changes that does together.

    Empty: only more ranks or a smaller model help.
    """
    changes = list(_changes(case, device))
    alone = [words for words, changed in changes if _fits(changed, device)]
    if alone:
        return alone
    together = case
    made: dict[str, str] = {}  # setting -> its last change
    for words, _ in changes:
        if words not in (again := dict(_changes(together, device))):  # on top of those before it
            continue
        together, made[words.partition("=")[0].rstrip("0123456789")] = again[words], words
        if _fits(together, device):
            return [" and ".join(made.values())]
    return []


def _is_one_card(case: MemoryCase) -> bool:
    """Whether tiles run compiled too."""
    return case.topology.copy_ranks == 1 and case.zero.stage < 3


def _fits(case: MemoryCase, device: DeviceFacts) -> bool:
    return MemoryFit.of(estimate_memory(case), device).level == "fits"


def _changes(case: MemoryCase, device: DeviceFacts) -> Iterator[tuple[str, MemoryCase]]:
    """Yield changes and the case after each, the cheapest in speed first; last, what offload excludes."""
    if case.micro_batch > 1:
        per_rank = case.micro_batch * case.accumulation
        sizes = [size for size in range(case.micro_batch - 1, 0, -1) if per_rank % size == 0]
        smaller = [replace(case, micro_batch=size, accumulation=per_rank // size) for size in sizes]
        chosen = next((changed for changed in smaller if _fits(changed, device)), smaller[-1])
        yield f"train_micro_batch_size_per_gpu={chosen.micro_batch}", chosen
    if case.whole_gradients:
        yield "train.reduce_gradients=micro_batch", replace(case, whole_gradients=False)
    if case.topology.pipeline == 1 and case.topology.data_context > 1:
        for stage in range(max(2, case.zero.stage + 1), 4):
            yield f"ZeRO stage {stage}", replace(case, zero=case.zero.model_copy(update={"stage": stage}))
    if case.recompute not in ("none", "full"):
        yield "train.recompute=full", replace(case, recompute="full")
    elif case.recompute == "none" and case.checkpoint_activations_every != 1:
        yield "train.checkpoint_activations_every=1", replace(case, checkpoint_activations_every=1)
    has_experts = bool(case.shape.moe_layers)
    if (
        not has_experts
        and case.mlp_chunk_tokens is None
        and case.recompute != "mlp"
        and case.tokens > _TILE
        and _is_one_card(case)
    ):
        yield f"train.mlp_chunk_tokens={_TILE}", replace(case, mlp_chunk_tokens=_TILE)
    is_whole = case.recompute == "full" or case.checkpoint_activations_every
    if is_whole and not case.offload_activations and not case.on_cpu:
        yield "train.offload_activations=true", replace(case, offload_activations=True)
    can_offload = case.topology.pipeline == 1 and case.zero.stage and case.optimizer_state == "fp32" and not case.muon
    if can_offload and not case.offloads_optimizer:
        section = OffloadOptimizerSection(device="cpu")
        yield (
            "offload_optimizer to the CPU",
            replace(case, zero=case.zero.model_copy(update={"offload_optimizer": section})),
        )
    for kind in () if case.offloads_optimizer or case.muon else _SMALLER_STATES[case.optimizer_state]:
        yield f"train.optimizer_state={kind}", replace(case, optimizer_state=kind)
