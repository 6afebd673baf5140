"""Judge a rehearsal: whether the run would go, beside its plan, and what to change; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalm.cost_model.memory import MemoryPlan
from megalm.planning.memory_fit import USABLE_MEMORY, remedies
from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_report import PhaseName, Rehearsal, RehearsalCase, misplaced
from megalm.utils.formatting import format_bytes

Level = Literal["runs", "tight", "fails"]

_MISMATCH = "FakeTensorDeviceMismatchError"


@dataclass(frozen=True)
class Verdict:
    """Whether the run would go.

    Attributes:
        reasons: of a level other than `runs`.
        advice: what makes the run faster or smaller, with the keys.
    """

    level: Level
    reasons: tuple[str, ...]
    advice: tuple[str, ...]


def planned_memory(plan: Plan, case: RehearsalCase) -> MemoryPlan:
    """The plan of the rank's own pipeline stage; one plan serves all of a kind."""
    kind = case.share(case.stage).kind
    return next(memory for memory in plan.memory_by_stage if case.share(memory.stage).kind == kind)


def planned_bytes(memory: MemoryPlan, phase: PhaseName) -> int | None:
    """What the plan has for the tensors on the device in a phase."""
    planned = {"start": memory.start, "step": memory.total}
    return planned[phase] - memory.runtime if phase in planned else None


def judge(rehearsal: Rehearsal, case: RehearsalCase, plan: Plan) -> Verdict:
    """Return the verdict on a rehearsed run."""
    failures = list(_failures(rehearsal))
    needed = rehearsal.peak_bytes + planned_memory(plan, case).runtime
    available = case.run.device.memory_bytes
    memory = f"{format_bytes(needed)} of {format_bytes(available)}"
    advice = [] if failures else list(_advice(rehearsal, case, plan))
    if failures or needed > available:
        reasons = failures or [f"a rank needs {memory}", *_remedies(rehearsal, plan)]
        return Verdict("fails", tuple(reasons), tuple(advice))
    if needed > USABLE_MEMORY * available:
        return Verdict("tight", (f"a rank needs {memory}", *_remedies(rehearsal, plan)), tuple(advice))
    return Verdict("runs", (), tuple(advice))


def _failures(rehearsal: Rehearsal) -> Iterator[str]:
    for event in misplaced(rehearsal.phases):
        yield f"{event.place} mixes tensors of the GPU and of the CPU"
    if rehearsal.failure is not None:
        error = rehearsal.failure.strip().splitlines()[-1]
        phase = rehearsal.phases[-1].name if rehearsal.phases else "start"
        kind = "tensors on different devices" if _MISMATCH in error else "error"
        yield f"{phase} ends with {kind}: {error}"
    elif not rehearsal.updated:
        yield "the last step applies no update"


def _remedies(rehearsal: Rehearsal, plan: Plan) -> list[str]:
    start, step = rehearsal.phase("start"), rehearsal.phase("step")
    if start is not None and step is not None and start.peak_bytes > step.peak_bytes:
        return [
            "the start needs more than a step: use more ranks (parallel.tensor, parallel.context, parallel.pipeline)"
        ]
    changes = remedies(plan.case, plan.resolved.device)
    return [f"to fit: {'; or '.join(changes)}"] if changes else []


def _advice(rehearsal: Rehearsal, case: RehearsalCase, plan: Plan) -> Iterator[str]:
    step = rehearsal.phase("step")
    if step is None:
        return
    run, zero = case.run, plan.case.zero
    if waits := step.count("synchronize"):
        places = sorted({event.place for event in step.events if event.kind == "synchronize"})
        yield f"the host waits for all of the device's work in each step ({waits} x): {', '.join(places)}"
    gradients = rehearsal.bytes_per_parameter(
        step, "data" if run.topology.data > 1 else "context", "all_reduce", "reduce_scatter", "reduce"
    )
    if zero.stage == 2 and run.batch.accumulation > 1 and gradients > 4.5:
        yield (
            f"gradients are sent with each micro-batch, {gradients:.1f} bytes a parameter a step; ZeRO stage 1 sends "
            "them once"
        )
    block = sum(math.prod(size) for name, size in case.shape.parameters().items() if name.startswith("layers.0."))
    if zero.stage == 3 and zero.prefetch_bucket_size < block:
        yield (
            f"stage3_prefetch_bucket_size={zero.prefetch_bucket_size:,} is less than a block's {block:,} parameters: "
            "no whole block is gathered ahead"
        )
