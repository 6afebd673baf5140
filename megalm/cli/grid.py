"""The grid of ranks as text: groups along each axis, what stays in a node, the pipeline's stages and its bubble."""

from __future__ import annotations

from collections.abc import Sequence

from megalm.cli import show
from megalm.config.resolve import ResolvedRun
from megalm.estimate.balance import balanced_blocks, parameter_costs
from megalm.model.shape import ModelShape
from megalm.topology import AXES, Axis, Topology, bubble_share

# An axis of many groups is told by its first and its last; a pipeline of many stages likewise.
_STAGES_SHOWN = 8
_TALK: dict[Axis, str] = {
    "pipeline": "hidden states, each micro-batch",
    "data": "gradients, each step",
    "tensor": "hidden states, several times a layer",
}


def grid_text(run: ResolvedRun, shape: ModelShape, ranks_per_node: int) -> str:
    """The "Ranks" section of a plan; nodes hold `ranks_per_node` consecutive ranks each."""
    topology = run.topology
    nodes = -(-topology.world_size // ranks_per_node)
    lines = [
        f"{topology.world_size} = pipeline {topology.pipeline} x data {topology.data} x tensor {topology.tensor}",
        f"{nodes:,} node(s) of {ranks_per_node} ranks",
    ]
    if topology.world_size > 1:
        lines += ["", _axes(topology, ranks_per_node)]
    if topology.pipeline > 1:
        lines += ["", *_stages(topology, shape, ranks_per_node)]
        if run.config.parallel.balance == "time":
            lines.append("(blocks as balanced by parameters; parallel.balance=time measures at the start)")
        lines += ["", _bubble(run)]
    return "\n".join(lines)


def ranks_text(ranks: Sequence[int]) -> str:
    """(0, 1, 2, 3) -> `0-3`; (0, 8, 16, 24) -> `0, 8 .. 24`."""
    if len(ranks) < 3:
        return ", ".join(map(str, ranks))
    if ranks[1] - ranks[0] == 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]}, {ranks[1]} .. {ranks[-1]}"


def _axes(topology: Topology, ranks_per_node: int) -> str:
    rows: list[list[object]] = []
    for axis in reversed(AXES):  # the innermost first: it talks most
        groups = topology.groups(axis)
        place = "alone" if topology.size(axis) == 1 else "within a node"
        if not topology.stays_in_a_node(axis, ranks_per_node):
            place = "between nodes"
        last = ranks_text(groups[-1]) if len(groups) > 1 else None
        rows.append([axis, topology.size(axis), len(groups), ranks_text(groups[0]), last, place, _TALK[axis]])
    return show.table(["axis", "degree", "groups", "first group", "last group", "where", "talks of"], rows)


def _stages(topology: Topology, shape: ModelShape, ranks_per_node: int) -> list[str]:
    """Ranks, nodes and blocks of each stage, the middle ones left out where there are many."""
    size = topology.data * topology.tensor
    blocks = balanced_blocks(shape.num_hidden_layers, topology.pipeline, parameter_costs(shape))
    lines = []
    for stage, count in enumerate(blocks):
        first, last = stage * size, (stage + 1) * size - 1
        held = ["embedding"] * (stage == 0) + [f"{count} block(s)"] + ["head"] * (stage == topology.pipeline - 1)
        nodes = _range(first // ranks_per_node, last // ranks_per_node)
        lines.append(f"stage {stage}: ranks {_range(first, last)} on node {nodes}: {', '.join(held)}")
    if len(lines) > _STAGES_SHOWN:
        half = _STAGES_SHOWN // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more stages ...", *lines[-half:]]
    return lines


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _bubble(run: ResolvedRun) -> str:
    stages, micro_batches = run.topology.pipeline, run.batch.accumulation
    share = bubble_share(stages, micro_batches)
    return (
        f"bubble: each stage waits {share:.1%} of a step = (stages - 1) / (micro-batches + stages - 1) = "
        f"{stages - 1} / {micro_batches + stages - 1}, where stages take equal time"
    )
