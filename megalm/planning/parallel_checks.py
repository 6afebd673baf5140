"""Rules of the parallel degrees; see run_checks.py. A refused grid of ranks names the nearest legal degree.

Slow but legal grids get a notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

from megalm.config.deepspeed.json_schema import ZeroSection
from megalm.config.schema import RunConfig
from megalm.errors import ConfigError
from megalm.parallel.pipeline_schedules import virtual_stages_of
from megalm.planning.engine_checks import CheckContext, Rule, float8_divides_the_model, runs_compiled
from megalm.topology import AXES, PipelineScheduleName, nearest


def degrees_divide_the_ranks(case: CheckContext) -> None:
    _ = case.topology  # raises


def tensor_divides_the_model(case: CheckContext) -> None:
    """Each rank of a tensor group holds whole heads and an equal part of the MLP; vocabularies are padded instead."""
    shape, degree = case.shape, case.config.parallel.tensor
    for name, size in (
        ("model.num_attention_heads", shape.num_attention_heads),
        ("the MLP's inner size (model.intermediate_size)", shape.intermediate_size),
    ):
        if size % degree:
            raise ConfigError(f"parallel.tensor={degree} does not divide {name}={size}; {_legal_tensor_degrees(case)}")
    if not _shares_key_value_heads(shape.num_key_value_heads, degree):
        raise ConfigError(
            f"parallel.tensor={degree} and model.num_key_value_heads={shape.num_key_value_heads}: one must divide the "
            f"other; {_legal_tensor_degrees(case)}"
        )


def context_divides_the_heads(case: CheckContext) -> None:
    """Attention of a context group exchanges positions for whole heads, which its tensor groups divide first."""
    parallel, shape = case.config.parallel, case.shape
    if parallel.context == 1 or parallel.context_method == "ring":
        return
    shared = f"parallel.tensor={parallel.tensor} x " * (parallel.tensor > 1) + f"parallel.context={parallel.context}"
    ranks = parallel.tensor * parallel.context
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
    wrong = ""
    if heads % ranks:
        wrong = f"{shared} does not divide model.num_attention_heads={heads}"
    elif not _shares_key_value_heads(key_heads, ranks):
        wrong = f"{shared} and model.num_key_value_heads={key_heads}: one must divide the other"
    if wrong:
        legal = (
            n
            for n in range(1, heads // parallel.tensor + 1)
            if heads % (n * parallel.tensor) == 0
            and _shares_key_value_heads(key_heads, n * parallel.tensor)
            and case.world_size % (n * parallel.tensor * parallel.pipeline) == 0
        )
        raise ConfigError(
            f"{wrong}; on {case.world_size} ranks use parallel.context={_nearest(parallel.context, legal)}, or "
            "parallel.context_method=ring, which divides no heads"
        )


def ring_attends_plainly(case: CheckContext) -> None:
    parallel, model = case.config.parallel, case.config.model
    if parallel.context_method != "ring":
        return
    if parallel.context == 1:
        raise ConfigError(
            "parallel.context_method=ring divides sequences over a context group, but parallel.context=1; use "
            "parallel.context=2 or more, or remove parallel.context_method"
        )
    if model.attention_dropout:
        raise ConfigError(
            f"parallel.context_method=ring has no dropout of attention, but model.attention_dropout="
            f"{model.attention_dropout:g}; use all_to_all, or model.attention_dropout=0"
        )


def sequence_has_a_tensor_group(case: CheckContext) -> None:
    if case.config.parallel.sequence and case.config.parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence=true divides the sequence over a tensor group, but parallel.tensor=1; "
            "use parallel.tensor=2 or more, or remove parallel.sequence"
        )


def sequences_divide_into_slices(case: CheckContext) -> None:
    """A context group divides a sequence, and with `parallel.sequence` each of its tensor groups the part of it."""
    parallel = case.config.parallel
    divisors = {}
    if parallel.context > 1:
        is_ring = parallel.context_method == "ring"
        two = " and context_method=ring, of which each rank holds two," * is_ring
        divisors[f"parallel.context={parallel.context}{two}"] = parallel.context * (2 if is_ring else 1)
    if parallel.sequence:
        divisors[f"parallel.sequence=true with parallel.tensor={parallel.tensor}"] = parallel.tensor
    slices = math.prod(divisors.values())
    for length in case.config.data.sequence_lengths:
        if length % slices:
            below = length // slices * slices
            use = f"{below} or {below + slices}" if below else f"{slices}"
            raise ConfigError(
                f"{' and '.join(divisors)}: data.sequence_length={length} does not divide into {slices} slices; "
                f"use {use}"
            )


def overlap_has_a_tensor_group(case: CheckContext) -> None:
    parallel = case.config.parallel
    if parallel.overlap_tensor_communication is True and parallel.tensor == 1:
        raise ConfigError(
            "parallel.overlap_tensor_communication=true overlaps what a tensor group sends, but parallel.tensor=1; "
            "use parallel.tensor=2 or more, or remove parallel.overlap_tensor_communication"
        )


def expert_groups_divide_the_experts(case: CheckContext) -> None:
    degree, experts = case.config.parallel.expert, case.config.model.num_experts
    if degree == 1:
        return
    if experts is None:
        raise ConfigError(
            f"parallel.expert={degree} divides the experts of a model, but model.num_experts is not set; set it, or "
            "remove parallel.expert"
        )
    if experts % degree:
        legal = (n for n in range(1, experts + 1) if experts % n == 0 and case.topology.data_context % n == 0)
        raise ConfigError(
            f"parallel.expert={degree} does not divide model.num_experts={experts}; on {case.world_size} ranks use "
            f"{_nearest(degree, legal)}"
        )


def expert_groups_reduce_gradients(case: CheckContext) -> None:
    """DeepSpeed's ways to reduce gradients that it has for experts too, and what a test compares with one rank."""
    degree = case.config.parallel.expert
    if degree == 1:
        return
    problems = []
    if case.zero.stage in (1, 2) and not case.zero.reduce_scatter:
        problems.append("zero_optimization.reduce_scatter=false reduces all gradients over the same ranks; remove it")
    if case.zero.stage == 2 and not case.zero.contiguous_gradients:
        problems.append("zero_optimization.contiguous_gradients=false is without experts only; remove it")
    if case.zero.secondary_ranks:
        problems.append("zero_optimization.zero_hpz_partition_size copies weights that all ranks share; remove it")
    if any(offload.device == "nvme" for _, offload in case.offloads):
        problems.append("offload_optimizer.device=nvme is not proven; use cpu")
    if problems:
        raise ConfigError(*(f"{case.ds.path}: parallel.expert={degree} with {it}" for it in problems))


def pipeline_has_enough_layers(case: CheckContext) -> None:
    parallel, layers = case.config.parallel, case.config.model.num_hidden_layers
    degree, others, virtual = parallel.pipeline, parallel.tensor * parallel.context, parallel.virtual_stages
    if degree > layers:
        legal = (n for n in range(1, layers + 1) if case.world_size % (n * others) == 0)
        raise ConfigError(
            f"parallel.pipeline={degree} is more than model.num_hidden_layers={layers}, but each stage needs a block; "
            f"on {case.world_size} ranks use {_nearest(degree, legal)}"
        )
    if 1 < degree <= layers < degree * virtual:
        raise ConfigError(
            f"parallel.pipeline={degree} x parallel.virtual_stages={virtual} is more than model.num_hidden_layers="
            f"{layers}, but each stage needs a block; use parallel.virtual_stages={layers // degree}"
        )


def pipeline_schedule_is_legal(case: CheckContext) -> None:
    """Its number of virtual stages; any number of micro-batches is legal."""
    parallel = case.config.parallel
    name, virtual = parallel.pipeline_schedule, parallel.virtual_stages
    if parallel.pipeline == 1:
        given = [f"parallel.virtual_stages={virtual}"] * (virtual > 1)
        given += [f"parallel.pipeline_schedule={name}"] * (name is not None)
        if given:
            raise ConfigError(
                f"{' and '.join(given)} divide the work of a pipeline, but parallel.pipeline=1; "
                "use parallel.pipeline=2 or more"
            )
        return
    legal = virtual_stages_of(parallel.schedule_name)
    if virtual not in legal:
        count = f"{legal[0]} or more" if len(legal) > 1 else str(legal[0])
        fitting = [other for other in get_args(PipelineScheduleName) if virtual in virtual_stages_of(other)]
        raise ConfigError(
            f"parallel.pipeline_schedule={name} with parallel.virtual_stages={virtual}: it has {count} on each rank; "
            f"use parallel.virtual_stages={legal[0]}, or parallel.pipeline_schedule={' or '.join(fitting)}"
        )


def backward_passes_divide(case: CheckContext) -> None:
    config, why = case.config, ""
    if config.parallel.schedule_name != "zb_v":
        return
    if runs_compiled(config, case.device, case.zero):
        why = "compiled blocks compute all gradients at once; set compile=false"
    elif config.train.mlp_chunk_tokens is not None:
        why = (
            f"train.mlp_chunk_tokens={config.train.mlp_chunk_tokens} computes all gradients of a tile at once, and "
            "keeps none of it; remove one of them"
        )
    if why:
        raise ConfigError(f"parallel.pipeline_schedule=zb_v puts gradients of weights off, but {why}")


def pipeline_needs_low_zero(case: CheckContext) -> None:
    if case.config.parallel.pipeline > 1 and case.zero.stage >= 2:
        raise ConfigError(
            f"parallel.pipeline={case.config.parallel.pipeline} with zero_optimization.stage={case.zero.stage} "
            f"({case.ds.path}): a pipeline keeps whole gradients over its micro-batches; use stage 1"
        )


def pipeline_keeps_its_states(case: CheckContext) -> None:
    for name, _ in case.offloads:
        if case.config.parallel.pipeline > 1:
            raise ConfigError(
                f"parallel.pipeline={case.config.parallel.pipeline} cannot offload ({name} in {case.ds.path}); "
                f"remove {name}, or the pipeline"
            )


def second_copy_is_shared_by_equal_ranks(case: CheckContext) -> None:
    size, key = case.zero.secondary_ranks, "zero_optimization.zero_hpz_partition_size"
    if not size:
        return
    problems = []
    if case.zero.stage != 3:
        problems.append(f"it needs zero_optimization.stage 3, but the stage is {case.zero.stage}")
    if case.zero.offload_param is not None and case.zero.offload_param.device != "none":
        problems.append("with offload_param no test compares it with the one-rank model")
    if case.topology.data < case.world_size:
        axes = (axis for axis in AXES if axis != "data" and case.topology.size(axis) > 1)
        others = " and ".join(f"parallel.{axis}={case.topology.size(axis)}" for axis in axes)
        problems.append(f"neighbouring ranks share a copy, but with {others} they hold other weights")
    if case.world_size % size:
        problems.append(f"it does not divide {case.world_size} ranks; use the number of ranks of a node")
    if problems:
        raise ConfigError(f"{case.ds.path}: {key}={size}: {'; '.join(problems)}; change that, or remove {key}")


PARALLEL_RULES: tuple[Rule, ...] = (
    degrees_divide_the_ranks,
    tensor_divides_the_model,
    float8_divides_the_model,
    context_divides_the_heads,
    ring_attends_plainly,
    sequence_has_a_tensor_group,
    sequences_divide_into_slices,
    overlap_has_a_tensor_group,
    expert_groups_divide_the_experts,
    expert_groups_reduce_gradients,
    pipeline_has_enough_layers,
    pipeline_schedule_is_legal,
    backward_passes_divide,
    pipeline_needs_low_zero,
    pipeline_keeps_its_states,
    second_copy_is_shared_by_equal_ranks,
)


def second_copy_notices(zero: ZeroSection, ranks_per_node: int) -> list[str]:
    """Return a notice if ranks that share a second copy of the weights are not of one node."""
    size = zero.secondary_ranks
    if not size or ranks_per_node % size == 0:
        return []
    return [
        f"zero_optimization.zero_hpz_partition_size={size} does not divide the {ranks_per_node} ranks of a node: "
        f"weights are gathered over the network in each micro-batch; use {ranks_per_node}"
    ]


def parallel_notices(config: RunConfig, ranks_per_node: int) -> list[str]:
    """Return a notice if tensor or context groups, which communicate several times a layer, leave their node."""
    degree, context = config.parallel.tensor, config.parallel.context
    if ranks_per_node % degree == 0:
        if context == 1 or ranks_per_node % (degree * context) == 0:
            return []
        return [
            f"parallel.context={context} with parallel.tensor={degree} takes {degree * context} ranks that share each "
            f"layer's attention, and a node has {ranks_per_node}: they exchange queries, keys and values over the "
            "network, which is slow"
        ]
    relation = "is more than" if degree > ranks_per_node else "does not divide"
    fitting = max(n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0 and degree % n == 0)
    return [
        f"parallel.tensor={degree} {relation} the {ranks_per_node} ranks of a node: tensor groups communicate over the "
        f"network in every layer, which is slow; parallel.tensor={fitting} with parallel.pipeline={degree // fitting} "
        "uses the same number of ranks"
    ]


def _legal_tensor_degrees(case: CheckContext) -> str:
    shape = case.shape
    legal = (
        n
        for n in range(1, shape.num_attention_heads + 1)
        if shape.num_attention_heads % n == 0
        and shape.intermediate_size % n == 0
        and _shares_key_value_heads(shape.num_key_value_heads, n)
        and case.world_size % (n * case.config.parallel.context * case.config.parallel.pipeline) == 0
    )
    return f"on {case.world_size} ranks use {_nearest(case.config.parallel.tensor, legal)}"


def _nearest(degree: int, legal: Iterable[int]) -> str:
    return " or ".join(map(str, nearest(degree, legal)))


def _shares_key_value_heads(heads: int, degree: int) -> bool:
    """Return whether ranks hold whole key/value heads; if there are fewer heads than ranks, several hold the same."""
    return heads % degree == 0 or degree % heads == 0
