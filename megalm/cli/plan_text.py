"""The text of a plan for a terminal or a pipe: section by section, each value with its origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from megalm.config.loading import DEFAULT_PRESET, external_name
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields, shown
from megalm.cost_model.memory import MemoryPlan
from megalm.cost_model.pipeline_balance import balanced_by_parameters
from megalm.model.model_config import ModelConfig
from megalm.planning.data_checks import how_to_give_data
from megalm.planning.memory_fit import USABLE_MEMORY, remedies
from megalm.planning.recipe_claims import changed_keys, judge, tolerances
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_plan import Plan
from megalm.topology import Axis, Overlay
from megalm.utils.formatting import format_bytes, format_duration, sections_text, table, terminal_width

_STAGES_SHOWN = 8  # of a longer pipeline, the first and last stages
_LONGEST_HOURS = 24 * 365 * 20  # a date beyond says nothing
_TRAFFIC: dict[Axis | Overlay, str] = {
    "pipeline": "hidden states, each micro-batch",
    "expert": "tokens to their experts and back, in layers with experts",
    "context": "queries, keys and values, in every layer",
    "tensor": "hidden states, several times a layer",
}
_DATA_TRAFFIC = (  # by ZeRO stage
    "gradients, each step",
    "gradients, each step",
    "gradients, each micro-batch",
    "gradients and weights, each micro-batch",
)


def grid_text(run: ResolvedRun, shape: ModelConfig, ranks_per_node: int) -> str:
    """The "Ranks" section of a plan; each node has `ranks_per_node` consecutive ranks."""
    topology = run.topology
    nodes = -(-topology.world_size // ranks_per_node)
    lines = [
        f"{topology.world_size} = {topology}",
        f"{nodes:,} node(s) of {ranks_per_node} ranks",
    ]
    if topology.world_size > 1:
        lines += ["", _axes(run, ranks_per_node)]
    if run.tensor_chunks > 1:
        lines.append(f"(tensor groups communicate while they multiply, in {run.tensor_chunks} chunks of a micro-batch)")
    if topology.pipeline > 1:
        lines += ["", *_stages(run, shape, ranks_per_node)]
        if run.config.parallel.balance == "time":
            lines.append("(blocks balanced by parameters; parallel.balance=time measures them at the start of the run)")
    return "\n".join(lines)


def ranks_text(ranks: Sequence[int]) -> str:
    """(0, 1, 2, 3) -> `0-3`; (0, 8, 16, 24) -> `0, 8 .. 24`."""
    if len(ranks) < 3:
        return ", ".join(map(str, ranks))
    if ranks[1] - ranks[0] == 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]}, {ranks[1]} .. {ranks[-1]}"


def _axes(run: ResolvedRun, ranks_per_node: int) -> str:
    topology, together = run.topology, run.deepspeed_source.settings.zero_optimization.secondary_ranks
    rows: list[list[object]] = []
    if together:
        ends = ranks_text(range(together)), ranks_text(range(topology.world_size - together, topology.world_size))
        place = "between nodes" if ranks_per_node % together else "within a node"
        count = topology.world_size // together
        name, traffic = "zero_hpz_partition_size", "weights, each micro-batch"
        rows.append([name, together, count, *ends, place, traffic])
    axes: tuple[Axis | Overlay, ...] = ("tensor", "context", "expert", "data", "pipeline")
    for axis in axes:  # the innermost axis has the most traffic
        if axis in ("context", "expert") and topology.size(axis) == 1:
            continue
        groups = topology.groups(axis)
        place = "alone" if topology.size(axis) == 1 else "within a node"
        if not topology.stays_in_a_node(axis, ranks_per_node):
            place = "between nodes"
        last = ranks_text(groups[-1]) if len(groups) > 1 else None
        traffic = _TRAFFIC[axis] if axis != "data" else _DATA_TRAFFIC[run.zero_stage]
        if axis == "data" and together:
            traffic = "gradients, each micro-batch, and weights, each step"
        rows.append([axis, topology.size(axis), len(groups), ranks_text(groups[0]), last, place, traffic])
    return table(["axis", "degree", "groups", "first group", "last group", "where", "traffic"], rows)


def _stages(run: ResolvedRun, shape: ModelConfig, ranks_per_node: int) -> list[str]:
    """Ranks, nodes and blocks of each stage, without the middle of a long pipeline."""
    size = run.topology.world_size // run.topology.pipeline
    owners = run.pipeline.stage_ranks
    blocks = balanced_by_parameters(shape, owners)
    lines = []
    for stage, (count, owner) in enumerate(zip(blocks, owners, strict=True)):
        first, last = owner * size, (owner + 1) * size - 1
        held = ["embedding"] * (stage == 0) + [f"{count} block(s)"] + ["head"] * (stage == len(blocks) - 1)
        nodes = _range(first // ranks_per_node, last // ranks_per_node)
        lines.append(f"stage {stage}: ranks {_range(first, last)} on node {nodes}: {', '.join(held)}")
    if len(lines) > _STAGES_SHOWN:
        half = _STAGES_SHOWN // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more stages ...", *lines[-half:]]
    return lines


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def plan_text(
    plan: Plan,
    ranks_per_node: int,
    data_rows: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
    every_key: bool = True,
) -> str:
    """The whole plan as text for a terminal or a pipe.

    Args:
        data_rows, warnings: from `planned_data`.
        every_key: show defaults and the default preset's values beside the user's own settings.
    """
    has_groups = plan.resolved.config.train.parameter_groups or plan.shape.mup_base_width is not None
    sections = {
        "Verdict": _verdict(plan),
        "Configuration": _configuration(plan, every_key),
        "DeepSpeed": _deepspeed(plan),
        "Ranks": grid_text(plan.resolved, plan.shape, ranks_per_node),
        **({"Schedules of the pipeline": _schedules(plan)} if plan.resolved.topology.pipeline > 1 else {}),
        "Parameters": _parameters(plan),
        **({"Parameter groups": _groups(plan)} if has_groups else {}),
        "Tokens and work": _tokens(plan),
        **({"Stages of the run": _training_stages(plan)} if plan.resolved.stages.grow else {}),
        "Data": "\n".join(text for _, text in data_rows) or _no_data(plan),
        "Memory of one rank (estimate)": _memory(plan, min(ranks_per_node, plan.resolved.topology.world_size)),
        "Learning rate": _learning_rate(plan),
        **({"Documented against computed": _documented(plan)} if plan.resolved.config.documented.claims else {}),
        "Notices": "\n".join([*plan.resolved.notices, *(f"WARNING: {text}" for text in warnings)]) or "none",
    }
    return sections_text(sections)


def fit_text(plan: Plan, limit: str) -> str:
    """The run of `--fit` in short.

    Args:
        limit: why there is no larger model.
    """
    shape, run, config = plan.shape, plan.resolved, plan.resolved.config
    rows: list[list[object]] = [
        ["model", f"{plan.parameter_count:,} parameters"],
        ["shape", f"{shape.num_hidden_layers} layers, width {shape.hidden_size}, {shape.num_attention_heads} heads"],
        ["sequence length", config.data.sequence_length],
        ["batch", f"{run.batch.global_batch} sequences, {run.stages.at(config.train.steps).tokens:,} tokens"],
        ["micro-batch x accumulation x data ranks", " x ".join(map(str, _triple(plan)))],
        ["recomputation, optimizer states", f"{run.recompute}, {config.train.optimizer_state}"],
        ["precision, ZeRO stage, offload", f"{run.precision}, {run.zero_stage}, {_offloads(plan)}"],
        ["steps", f"{config.train.steps:,}"],
        ["tokens", f"{plan.total_tokens:,}, {plan.tokens_per_parameter:.3g} per parameter"],
        ["time", None if plan.hours is None else f"{plan.hours:,.1f} hours"],
        ["limited by", limit],
    ]
    return f"Largest model\n{table(['fact', 'value'], rows, terminal_width())}"


def _verdict(plan: Plan) -> str:
    """Whether the run fits and how long it takes, in a line; below it what makes it fit."""
    fit, run = plan.fit, plan.resolved
    lines = [f"{fit.level}: by the estimate {fit}; {_time(plan)}"]
    if fit.level != "fits":
        changes = remedies(plan.case, run.device)
        lines.append(
            f"to fit into {USABLE_MEMORY:.0%} of the memory: {'; or '.join(changes)}"
            if changes
            else "no micro-batch, recomputation, ZeRO stage or offload is enough: use more ranks (parallel.tensor, "
            "parallel.context, parallel.pipeline) or a smaller model"
        )
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    run = plan.resolved
    work = f"{plan.total_tokens:,} tokens, {plan.tokens_per_parameter:.3g} per parameter"
    if plan.hours is None:
        name = run.device.name
        return f"{work}; the speed of {name} is not known" if name else f"{work}; --gpu NAME adds the time"
    end = datetime.now() + timedelta(hours=min(plan.hours, _LONGEST_HOURS))
    date = f", until {end:%Y-%m-%d %H:%M} if it starts now" if plan.hours < _LONGEST_HOURS else ""
    device = run.device.name or run.device.kind
    return f"{work}; {format_duration(3600 * plan.hours)} on {run.topology.world_size} x {device}{date}, {_rate(plan)}"


def _rate(plan: Plan) -> str:
    rate = plan.rate
    if rate.flops is not None:
        return f"at {rate.flops / 1e12:.3g} TFLOP/s a rank ({rate.origin})"
    losses = []
    if rate.is_assumed and plan.resolved.topology.pipeline > 1:
        losses.append("the pipeline's bubble")
    if rate.is_assumed and plan.recomputed_flops_per_token:
        losses.append("recomputation")
    if rate.is_assumed and plan.offload_seconds(plan.resolved.batch.accumulation):
        losses.append("offload")
    origin = f"{rate.origin}: {rate.share:.0%} less {', '.join(losses)}" if losses else rate.origin
    return f"at an MFU of {plan.mfu:.0%} ({origin})"


def _configuration(plan: Plan, every_key: bool) -> str:
    """The settings with their origin; without `every_key` those that are neither defaults nor the default preset's."""
    values, sources = plan.resolved.config.model_dump(mode="json"), plan.resolved.sources
    hidden = () if every_key else ("default", f"preset {DEFAULT_PRESET}")
    rows, others = [], 0
    for key in leaf_fields(RunConfig):
        if key.startswith("documented."):
            continue  # claims, not settings; they have their own table
        value: Any = values
        for part in key.split("."):
            value = value[part]
        if value is None and sources[key] == "default":
            continue
        if sources[key] in hidden:
            others += 1
        else:
            rows.append([external_name(key), shown(value), sources[key]])
    lines = [table(["key", "value", "from"], rows)] if rows else []
    if others:
        lines.append(f"({others} more are defaults or the preset's; --all shows them)")
    return "\n".join(lines)


def _deepspeed(plan: Plan) -> str:
    run = plan.resolved
    zero = run.deepspeed_source.settings.zero_optimization
    return table(
        ["fact", "value"],
        [
            ["file", run.deepspeed_source.path],
            ["global batch", f"{run.batch.global_batch} sequences per step{' at most' if run.stages.grow else ''}"],
            ["micro-batch x accumulation x data ranks", " x ".join(map(str, _triple(plan)))],
            ["precision", run.precision],
            ["ZeRO stage", zero.stage],
            ["offload", _offloads(plan)],
            ["gradient clipping", run.deepspeed["gradient_clipping"] or "off"],
            ["optimizer", str(run.optimizer)],
            *([["of the blocks' matrices", str(run.optimizer.muon)]] if run.optimizer.muon is not None else []),
        ],
    )


def _offloads(plan: Plan) -> str:
    zero = plan.resolved.deepspeed_source.settings.zero_optimization
    offloads = [
        f"{what} to {section.device}"
        for what, section in (("optimizer", zero.offload_optimizer), ("parameters", zero.offload_param))
        if section is not None and section.device != "none"
    ]
    return ", ".join(offloads) or "none"


def _triple(plan: Plan) -> tuple[int, int, int]:
    batch = plan.resolved.batch
    return batch.micro_batch, batch.accumulation, batch.data_parallel


def _schedules(plan: Plan) -> str:
    own, best = plan.resolved.pipeline, plan.recommended_schedule
    largest = " of the largest batch" if plan.resolved.stages.grow else ""
    rows = [
        [
            choice.schedule.name
            + " (this run)" * (choice.schedule == own)
            + " (not compiled)" * (choice.schedule.divides_backward and plan.resolved.compiled),
            choice.schedule.virtual_stages,
            f"{choice.schedule.bubble_share:.1%}",
            f"{choice.waits:.1%}",
            format_bytes(choice.activations),
            choice.messages,
            choice.fit.level,
        ]
        for choice in plan.schedule_choices
    ]
    headings = ["schedule", "stages a rank", "bubble", "waits", "activations", "messages", "memory"]
    keys = f"parallel.pipeline_schedule={best.schedule.name} parallel.virtual_stages={best.schedule.virtual_stages}"
    return "\n".join(
        [
            table(headings, rows),
            f"({own.micro_batches} micro-batch(es) a step{largest}; bubble: its share that ranks "
            "wait if stages take equal time; waits: with their blocks and head; messages: each way, of a micro-batch)",
            "recommended: " + ("this run's schedule" if best.schedule == own else keys),
        ]
    )


def _parameters(plan: Plan) -> str:
    total = plan.parameter_count
    rows: list[list[object]] = [[part, f"{count:,}", f"{count / total:.1%}"] for part, count in plan.parameters.items()]
    rows.append(["total", f"{total:,}", ""])
    active = plan.shape.active_parameter_count()
    if active < total:
        rows.append(["of which a token uses", f"{active:,}", f"{active / total:.1%}"])
    if plan.trained_parameters < total:
        rows.append(["of which train", f"{plan.trained_parameters:,}", f"{plan.trained_parameters / total:.1%}"])
    return table(["part", "parameters", "share"], rows)


def _groups(plan: Plan) -> str:
    rows = [
        [
            (group.match or "(no pattern)") + (", matrices of blocks" if group.hidden else ""),
            group.algorithm,
            f"{group.tensors:,}",
            f"{group.parameters:,}",
            *(("-", "-") if group.frozen else (f"{group.learning_rate_scale:g}", f"{group.weight_decay:g}")),
        ]
        for group in plan.optimizer_groups
    ]
    lines = [table(["match", "algorithm", "tensors", "parameters", "learning rate x", "weight decay"], rows)]
    shape = plan.shape
    if shape.mup_base_width is not None:
        multiplier = shape.width_multiplier
        lines.append(
            f"{multiplier:g} times as wide as model.mup_base_width={shape.mup_base_width}: matrices of blocks start at "
            f"{multiplier**-0.5:.3g} x initializer_range; logits / {multiplier:g}, scores / {shape.head_dim} (head_dim)"
        )
    return "\n".join(lines)


def _training_stages(plan: Plan) -> str:
    run, has_bubble = plan.resolved, plan.resolved.topology.pipeline > 1
    rows: list[list[object]] = []
    for stage, steps in run.stages.spans(run.config.train.steps):
        batch, hours = run.batch.of(stage.sequences), plan.hours_of(stage, steps)
        rows.append(
            [
                f"{stage.first_step:,}",
                f"{steps:,}",
                f"{stage.sequences:,} x {stage.sequence_length:,}",
                f"{batch.micro_batch} x {batch.accumulation} x {batch.data_parallel}",
                *(
                    [f"{replace(run.pipeline, micro_batches=batch.accumulation).bubble_share:.0%}"]
                    if has_bubble
                    else []
                ),
                f"{stage.tokens * steps:,}",
                None if hours is None else format_duration(3600 * hours),
            ]
        )
    parts = "micro-batch x accumulation x data ranks"
    bubble = ["bubble"] if has_bubble else []
    return table(["from step", "steps", "sequences x tokens", parts, *bubble, "tokens", "time"], rows)


def _tokens(plan: Plan) -> str:
    run = plan.resolved
    return table(
        ["fact", "value"],
        [
            *([] if run.stages.grow else [["tokens per step", f"{run.stages.at(1).tokens:,}"]]),
            ["steps", f"{run.config.train.steps:,}"],
            ["total tokens", f"{plan.total_tokens:,}"],
            ["tokens per parameter", f"{plan.tokens_per_parameter:.2f}"],
            ["FLOPs per token", f"{plan.flops_per_token:.3e}"],
            *_recomputed(plan),
            ["total FLOPs", f"{plan.total_flops:.3e}"],
            ["checkpoint size", format_bytes(plan.checkpoint_bytes)],
            *([["passes of a validation", _VALIDATED_TWICE]] if run.config.evaluates_ema else []),
        ],
    )


_VALIDATED_TWICE = "2: with the weights and with their average (evaluate.ema)"


def _recomputed(plan: Plan) -> list[list[object]]:
    again = plan.recomputed_flops_per_token
    kind, every = plan.case.recompute, plan.case.checkpoint_activations_every
    if not again:
        return []
    what = f"every {every}. block" if every > 1 else "every block" if every else kind
    if plan.case.mlp_chunk_tokens is not None:
        what += f", MLP in tiles of {plan.case.mlp_chunk_tokens:,} tokens"
    return [["recomputed FLOPs per token", f"{again:.3e} ({what}), {again / plan.flops_per_token:.1%} more"]]


_PARTS = {
    "weights": "the parameters that the model computes with",
    "gradients": "where gradients are accumulated",
    "master": "the optimizer's fp32 copy of the weights",
    "moments": "the optimizer's running means: Adam's two for each weight, Muon's one",
    "buckets": "what is sent between ranks at one time; under ZeRO 3 also gathered weights",
    "activations": "what the forward pass keeps for the backward pass",
    "loss": "a chunk of logits, and the gradients of head and hidden states",
    "runtime": "allowance for CUDA's context, cuBLAS and NCCL",
    "swap buffers": "the optimizer states in work",
    "ema": "the moving average of the weights (train.ema_decay)",
    "secondary": "the second copy of the weights, divided within a node (zero_hpz_partition_size)",
    "block inputs": "what train.offload_activations keeps there, in page-locked buffers of powers of two",
    "checkpoint copy": "what checkpoint.async writes from",
}


def _memory(plan: Plan, ranks_per_node: int) -> str:
    """Memory by part and kind of stage, with what each part is; marks the fullest."""
    stages, device = plan.memory_by_stage, plan.resolved.device
    blank = [""] * (len(stages) - 1)
    headings = ["part", *(_stage_words(plan, stage) for stage in stages)] if len(stages) > 1 else ["part", "size"]
    rows: list[list[object]] = [
        [part, *(format_bytes(stage.parts()[part]) for stage in stages), _PARTS[part]] for part in stages[0].parts()
    ]
    rows += [
        [f"{part} (CPU memory)", *(format_bytes(stage.host[part]) for stage in stages), _PARTS[part]]
        for part, count in stages[0].host.items()
        if count
    ]
    if any(stage.disk for stage in stages):
        rows.append(["optimizer states (NVMe)", *(format_bytes(stage.disk) for stage in stages), "on the disk"])
    rows.append(["total", *(format_bytes(stage.total) for stage in stages), "in a step"])
    rows.append(["start", *(format_bytes(stage.start) for stage in stages), "at most before the first step"])
    rows.append(["available", format_bytes(device.memory_bytes), *blank, ""])
    if plan.fit.host_needed:
        host = [sum(stage.host.values()) for stage in stages]
        if any(host):
            rows.append(["total (CPU memory)", *map(format_bytes, host), "in a step"])
        of_node = f"{format_bytes(plan.fit.host_needed * ranks_per_node)} on a node of {ranks_per_node} rank(s)"
        rows.append(
            [
                "start (CPU memory)",
                *(format_bytes(stage.start_host) for stage in stages),
                f"at most before the first step; step and start need {of_node}",
            ]
        )
        share = format_bytes(device.host_memory_bytes) or "unknown"
        rows.append(["available (CPU memory)", share, *blank, "a rank's share of the node; megalm plan --host-memory"])
    return table([*headings, "holds"], rows)


def _no_data(plan: Plan) -> str:
    if plan.resolved.config.data.recipe is not None:
        return "unknown until the run prepares it"
    return f"none, but a run needs some: {how_to_give_data(plan.resolved.config)}"


def _learning_rate(plan: Plan) -> str:
    rows = table(["step", "rate"], [[step, f"{rate:.3e}"] for step, rate in plan.learning_rates])
    return "\n".join([*map(str, plan.schedules), rows])


def _documented(plan: Plan) -> str:
    judgements = judge(plan)
    rows = [[it.claim, it.computed, it.verdict] for it in judgements]
    refuted = sum(it.refuted for it in judgements)
    lines = [table(["documented", "computed", "verdict"], rows)]
    lines.append(f"{refuted} of {len(judgements)} claims do not hold. {tolerances()}")
    others = changed_keys(plan)
    if others:
        lines.append(f"computed for this run, which differs from the document in {', '.join(others)}")
    return "\n".join(lines)


def _stage_words(plan: Plan, stage: MemoryPlan) -> str:
    numbers = plan.resolved.pipeline.stages_of(stage.stage)
    words = f"stage{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    return f"{words}, the fullest" if stage is plan.memory else words
