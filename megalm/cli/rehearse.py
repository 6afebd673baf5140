"""`megalm rehearse`: run a configuration on fake GPUs, as one of its ranks, and report what it would do there."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from megalm.cli.options import RANKS_PER_NODE, Config, DeepSpeedJson, Overrides, RanksPerNode
from megalm.cli.plan import planned
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.errors import EXIT_FAILED, ConfigError
from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_process import rehearse_run
from megalm.rehearsal.rehearsal_report import WAITS, Phase, Rehearsal, RehearsalCase
from megalm.rehearsal.verdict import Verdict, judge, planned_bytes, planned_memory
from megalm.runs.run_settings import read_settings
from megalm.utils.formatting import format_bytes, format_duration, sections_text, table
from megalm.utils.terminal import echo, echo_text

_HEADINGS = {
    "read": "the host reads a value",
    "size": "the host reads a size",
    "to_host": "a copy to the host",
    "to_device": "a copy to the device",
    "prefetch": "a copy ahead, without a wait",
    "synchronize": "the host waits for all work",
    "mixed": "tensors of both",
}


def command(
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="The GPU of each rank, such as H100 or A100-40GB.")
    ] = "A100",
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="The number of ranks.")] = 1,
    rank: Annotated[int, typer.Option("--rank", min=0, help="The rank to rehearse.")] = 0,
    config: Config = None,
    deepspeed_config: DeepSpeedJson = None,
    ranks_per_node: RanksPerNode = RANKS_PER_NODE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Rehearse a run on GPUs that this machine does not have: one rank's start, steps, validation and sample.

    megalm's engine and DeepSpeed run on fake tensors: nothing is computed or sent, no data is needed. Exits with code 1
    if the run would fail.

    \b
    megalm rehearse --gpu a100-80gb --ranks 64 --deepspeed_config zero3.json model.hidden_size=4096
    """
    if rank >= ranks:
        raise ConfigError(f"--rank {rank}: ranks count from 0, and --ranks {ranks} has {ranks - 1} as the last")
    device = gpu_by_name(gpu)
    files = read_settings(config, overrides or [], deepspeed_config, resume=False, ranks=ranks)
    plan = planned(files, ranks, device, ranks_per_node)
    case = RehearsalCase(plan.resolved, plan.shape, rank, min(ranks, ranks_per_node))
    rehearsal = rehearse_run(case)
    verdict = judge(rehearsal, case, plan)
    if as_json:
        echo_text(json.dumps(_as_json(rehearsal, verdict, case, plan), indent=2))
    else:
        echo(_text(rehearsal, verdict, case, plan))
    if verdict.level == "fails":
        raise typer.Exit(EXIT_FAILED)


def _as_json(rehearsal: Rehearsal, verdict: Verdict, case: RehearsalCase, plan: Plan) -> dict[str, Any]:
    memory = planned_memory(plan, case)
    return {
        "verdict": asdict(verdict),
        "gpu": case.run.device.name,
        "ranks": case.run.topology.world_size,
        "plan": {"parts": memory.parts(), "host": memory.host, "total": memory.total},
        **rehearsal.as_json(),
    }


def _text(rehearsal: Rehearsal, verdict: Verdict, case: RehearsalCase, plan: Plan) -> str:
    run = case.run
    batch, topology = run.batch, run.topology
    place = f"pipeline stage {rehearsal.stage} of {topology.pipeline}, " if topology.pipeline > 1 else ""
    step = rehearsal.phase("step")
    sections = {
        "Verdict": "\n".join([verdict.level, *verdict.reasons, *(f"- {line}" for line in verdict.advice)]),
        "Rehearsed": (
            f"rank {rehearsal.rank} of {topology.world_size} on {run.device.name}: {place}"
            f"{rehearsal.parameters:,} parameters, ZeRO {run.zero_stage}, {run.precision}\n"
            f"a step of {batch.accumulation} x {batch.micro_batch} sequences, in {format_duration(rehearsal.seconds)}"
        ),
        "Memory of tensors": _memory(rehearsal, case, plan),
        **(
            {}
            if step is None
            else {"Sent in a step": _traffic(rehearsal, step), "Host and device in a step": _events(step)}
        ),
    }
    return sections_text(sections)


def _memory(rehearsal: Rehearsal, case: RehearsalCase, plan: Plan) -> str:
    memory = planned_memory(plan, case)
    rows: list[list[object]] = []
    for phase in rehearsal.phases:
        expected = planned_bytes(memory, phase.name)
        share = None if expected is None else f"{phase.peak_bytes / expected:.2f}"
        sizes = map(format_bytes, (phase.peak_bytes, expected, phase.kept_bytes, phase.host_peak_bytes))
        peak, planned_peak, kept, host = sizes
        rows.append([phase.name, peak, planned_peak, share, kept, host, phase.peak_place])
    headings = ["phase", "peak", "plan", "peak / plan", "kept", "CPU memory", "place of the peak"]
    runtime = f"besides, the plan allows {format_bytes(memory.runtime)} for CUDA and NCCL"
    return f"{table(headings, rows)}\n{runtime}"


def _traffic(rehearsal: Rehearsal, step: Phase) -> str:
    rows: list[list[object]] = [
        [item.axis, item.collective, item.calls, format_bytes(item.bytes), f"{item.bytes / rehearsal.parameters:.2f}"]
        for item in step.traffic
    ]
    return table(["axis", "collective", "calls", "bytes", "bytes a parameter"], rows) if rows else "nothing"


def _events(step: Phase) -> str:
    rows: list[list[object]] = [
        [_HEADINGS[event.kind], event.count, format_bytes(event.bytes) if event.bytes else None, event.place]
        for event in step.events
    ]
    waits = f"waits of the host for the device: {step.count(*WAITS)}"
    return f"{table(['event', 'times', 'bytes', 'place'], rows)}\n{waits}" if rows else "nothing"
