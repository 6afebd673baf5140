"""Whether a run fits the memory by the estimate, and which changes make it fit. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.config.deepspeed.json_schema import OffloadOptimizerSection
from megalm.config.schema import OptimizerStateKind
from megalm.cost_model.memory import MemoryCase, MemoryPlan, estimate_memory
from megalm.utils.formatting import format_bytes

# The share of the memory that "auto" plans to use: an estimate is not a measurement, and allocators fragment.
USABLE_MEMORY = 0.85

_SMALLER_STATES: dict[OptimizerStateKind, tuple[OptimizerStateKind, ...]] = {
    "fp32": ("bf16", "8bit"),
    "bf16": ("8bit",),
    "8bit": (),
}

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
