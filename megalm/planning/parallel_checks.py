"""Rules of the parallel degrees; see run_checks.py. A refused grid of ranks names the nearest legal degree.

Slow but legal grids get a notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import get_args

from megalm.config.schema import ParallelSection
from megalm.parallel.pipeline_schedules import virtual_stages_of
from megalm.planning.batch_size import nearest_multiples
from megalm.planning.engine_checks import CheckContext, Need, Rule, runs_compiled, unmet
from megalm.topology import AXES, PipelineScheduleName, divisors, nearest

_NEEDS: tuple[Need, ...] = (
    ("parallel.sequence", "divides the sequence over a tensor group", "parallel.tensor", "2 or more"),
    ("parallel.overlap_tensor_communication", "overlaps what a tensor group sends", "parallel.tensor", "2 or more"),
    ("parallel.context_method", "divides sequences over a context group", "parallel.context", "2 or more"),
    ("parallel.virtual_stages", "divides the work of a pipeline", "parallel.pipeline", "2 or more"),
    ("parallel.pipeline_schedule", "divides the work of a pipeline", "parallel.pipeline", "2 or more"),
    ("parallel.expert", "divides the experts of a model", "model.num_experts", "8"),
)


def degrees_have_what_they_divide(case: CheckContext) -> Iterator[str]:
    """Raises ConfigError if the degrees do not divide the ranks."""
    _ = case.topology
    yield from unmet(case.config, _NEEDS)


def tensor_divides_the_model(case: CheckContext) -> Iterator[str]:
    """Each rank of a tensor group holds whole heads and an equal part of the MLP; vocabularies are padded instead."""
    shape, degree = case.shape, case.config.parallel.tensor
    heads, key_heads, inner = shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size
    wrong = ""
    if heads % degree:
        wrong = f"parallel.tensor={degree} does not divide model.num_attention_heads={heads}"
    elif inner % degree:
        wrong = f"parallel.tensor={degree} does not divide the MLP's inner size (model.intermediate_size)={inner}"
    elif not _shares_key_value_heads(key_heads, degree):
        wrong = f"parallel.tensor={degree} and model.num_key_value_heads={key_heads}: one must divide the other"
    if wrong:
        others = case.config.parallel.context * case.config.parallel.pipeline
        legal = (n for n in divisors(heads) if inner % n == 0 and _shares_key_value_heads(key_heads, n))
        yield f"{wrong}; {_use(case, degree, legal, others)}"


def context_divides_the_heads(case: CheckContext) -> Iterator[str]:
    """Attention of a context group exchanges positions for whole heads, which its tensor groups divide first."""
    parallel, model, shape = case.config.parallel, case.config.model, case.shape
    if parallel.context_method == "ring":
        if model.attention_dropout:
            yield (
                f"parallel.context_method=ring has no dropout of attention, but model.attention_dropout="
                f"{model.attention_dropout:g}; use all_to_all, or model.attention_dropout=0"
            )
        return
    if parallel.context == 1:
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
        of_heads = (n for n in divisors(heads) if n % parallel.tensor == 0 and _shares_key_value_heads(key_heads, n))
        legal, others = (n // parallel.tensor for n in of_heads), parallel.tensor * parallel.pipeline
        yield (
            f"{wrong}; {_use(case, parallel.context, legal, others, 'parallel.context=')}, or "
            "parallel.context_method=ring, which divides no heads"
        )


def sequences_divide_into_slices(case: CheckContext) -> Iterator[str]:
    """A context group divides a sequence, and with `parallel.sequence` each of its tensor groups the part of it."""
    parallel = case.config.parallel
    dividing = {}
    if parallel.context > 1:
        is_ring = parallel.context_method == "ring"
        two = " and context_method=ring, of which each rank holds two," * is_ring
        dividing[f"parallel.context={parallel.context}{two}"] = parallel.context * (2 if is_ring else 1)
    if parallel.sequence:
        dividing[f"parallel.sequence=true with parallel.tensor={parallel.tensor}"] = parallel.tensor
    slices = math.prod(dividing.values())
    for length in case.config.data.sequence_lengths:
        if length % slices:
            yield (
                f"{' and '.join(dividing)}: data.sequence_length={length} does not divide into {slices} slices; use "
                f"{nearest_multiples(length, slices)}"
            )
            return


def expert_groups_fit(case: CheckContext) -> Iterator[str]:
    """DeepSpeed's ways to reduce gradients that it has for experts too, and what a test compares with one rank."""
    degree, experts = case.config.parallel.expert, case.config.model.num_experts
    if degree == 1:
        return
    if experts is not None and experts % degree:
        legal = (n for n in divisors(experts) if case.topology.data_context % n == 0)
        yield (f"parallel.expert={degree} does not divide model.num_experts={experts}; {_use(case, degree, legal)}")
    here = f"{case.ds.path}: parallel.expert={degree} with"
    if case.zero.stage in (1, 2) and not case.zero.reduce_scatter:
        yield f"{here} zero_optimization.reduce_scatter=false reduces all gradients over the same ranks; remove it"
    if case.zero.stage == 2 and not case.zero.contiguous_gradients:
        yield f"{here} zero_optimization.contiguous_gradients=false is without experts only; remove it"
    if case.zero.secondary_ranks:
        yield (f"{here} zero_optimization.zero_hpz_partition_size copies weights that all ranks share; remove it")
    if case.zero.optimizer_device == "nvme":
        yield f"{here} offload_optimizer.device=nvme is not proven; use cpu"


def pipeline_has_legal_stages(case: CheckContext) -> Iterator[str]:
    """Each stage has a block, and a schedule its number of virtual stages; any number of micro-batches is legal."""
    config, parallel, layers = case.config, case.config.parallel, case.config.model.num_hidden_layers
    degree, virtual, name = parallel.pipeline, parallel.virtual_stages, parallel.pipeline_schedule
    if degree == 1:
        return
    here = f"parallel.pipeline={degree}"
    if degree > layers:
        yield (
            f"{here} is more than model.num_hidden_layers={layers}, but each stage needs a block; "
            f"{_use(case, degree, range(1, layers + 1), parallel.tensor * parallel.context)}"
        )
    elif layers < degree * virtual:
        yield (
            f"{here} x parallel.virtual_stages={virtual} is more than model.num_hidden_layers={layers}, but each stage "
            f"needs a block; use parallel.virtual_stages={layers // degree}"
        )
    legal = virtual_stages_of(parallel.schedule_name)
    if virtual not in legal:
        count = f"{legal[0]} or more" if len(legal) > 1 else str(legal[0])
        fitting = [other for other in get_args(PipelineScheduleName) if virtual in virtual_stages_of(other)]
        yield (
            f"parallel.pipeline_schedule={name} with parallel.virtual_stages={virtual}: it has {count} on each rank; "
            f"use parallel.virtual_stages={legal[0]}, or parallel.pipeline_schedule={' or '.join(fitting)}"
        )
    why, chunk = "", config.train.mlp_chunk_tokens
    if runs_compiled(config, case.device, case.zero):
        why = "compiled blocks compute all gradients at once; set compile=false"
    elif chunk is not None:
        why = (
            f"train.mlp_chunk_tokens={chunk} computes all gradients of a tile at once, and keeps none of it; remove "
            "one of them"
        )
    if why and parallel.schedule_name == "zb_v":
        yield f"parallel.pipeline_schedule=zb_v puts gradients of weights off, but {why}"


def pipeline_keeps_whole_states(case: CheckContext) -> Iterator[str]:
    here, path = f"parallel.pipeline={case.config.parallel.pipeline}", case.ds.path
    if case.config.parallel.pipeline == 1:
        return
    if case.zero.stage >= 2:
        yield (
            f"{here} with zero_optimization.stage={case.zero.stage} ({path}): a pipeline keeps whole gradients over "
            "its micro-batches; use stage 1"
        )
    devices = {"offload_optimizer": case.zero.optimizer_device, "offload_param": case.zero.parameter_device}
    for name, device in devices.items():
        if device != "none":
            yield f"{here} cannot offload ({name} in {path}); remove {name}, or the pipeline"


def second_copy_is_shared_by_equal_ranks(case: CheckContext) -> Iterator[str]:
    size, key = case.zero.secondary_ranks, "zero_optimization.zero_hpz_partition_size"
    if not size:
        return
    problems = []
    if case.zero.stage != 3:
        problems.append(f"it needs zero_optimization.stage 3, but the stage is {case.zero.stage}")
    if case.zero.parameter_device != "none":
        problems.append("with offload_param no test compares it with the one-rank model")
    if case.topology.data < case.world_size:
        axes = (axis for axis in AXES if axis != "data" and case.topology.size(axis) > 1)
        others = " and ".join(f"parallel.{axis}={case.topology.size(axis)}" for axis in axes)
        problems.append(f"neighbouring ranks share a copy, but with {others} they hold other weights")
    if case.world_size % size:
        problems.append(f"it does not divide {case.world_size} ranks; use the number of ranks of a node")
    if problems:
        yield f"{case.ds.path}: {key}={size}: {'; '.join(problems)}; change that, or remove {key}"


PARALLEL_RULES: tuple[Rule, ...] = (
    degrees_have_what_they_divide,
    tensor_divides_the_model,
    context_divides_the_heads,
    sequences_divide_into_slices,
    expert_groups_fit,
    pipeline_has_legal_stages,
    pipeline_keeps_whole_states,
    second_copy_is_shared_by_equal_ranks,
)


def grid_notices(parallel: ParallelSection, secondary_ranks: int, ranks_per_node: int) -> Iterator[str]:
    """Yield a notice for each group of ranks that leaves its node and communicates several times a step.

    Args:
        secondary_ranks: ranks that share a second copy of the weights.
    """
    degree, context, size = parallel.tensor, parallel.context, secondary_ranks
    if size and ranks_per_node % size:
        yield (
            f"zero_optimization.zero_hpz_partition_size={size} does not divide the {ranks_per_node} ranks of a node: "
            f"weights are gathered over the network in each micro-batch; use {ranks_per_node}"
        )
    if ranks_per_node % degree:
        relation = "is more than" if degree > ranks_per_node else "does not divide"
        fitting = max(n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0 and degree % n == 0)
        yield (
            f"parallel.tensor={degree} {relation} the {ranks_per_node} ranks of a node: tensor groups communicate over "
            f"the network in every layer, which is slow; parallel.tensor={fitting} with parallel.pipeline="
            f"{degree // fitting} uses the same number of ranks"
        )
    elif context > 1 and ranks_per_node % (degree * context):
        yield (
            f"parallel.context={context} with parallel.tensor={degree} takes {degree * context} ranks that share each "
            f"layer's attention, and a node has {ranks_per_node}: they exchange queries, keys and values over the "
            "network, which is slow"
        )


def _use(case: CheckContext, degree: int, legal: Iterable[int], others: int = 1, key: str = "") -> str:
    """Return the advice to use the nearest of the legal degrees that divide the ranks with the `others`."""
    fitting = (n for n in legal if case.world_size % (n * others) == 0)
    return f"on {case.world_size} ranks use {key}{' or '.join(map(str, nearest(degree, fitting)))}"


def _shares_key_value_heads(heads: int, degree: int) -> bool:
    """Return whether ranks hold whole key/value heads; if there are fewer heads than ranks, several hold the same."""
    return heads % degree == 0 or degree % heads == 0
