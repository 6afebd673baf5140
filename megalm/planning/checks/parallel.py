"""Rules of the parallel degrees: which grids of ranks, with which ZeRO stage and which model, can train right.

Every refusal says why and names the nearest choice that is legal. What is legal but slow is a notice, not a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megalm.config.schema import RunConfig
from megalm.errors import ConfigError
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.checks.context import CheckContext
from megalm.topology import Topology


def degrees_divide_the_ranks(case: CheckContext) -> None:
    parallel = case.config.parallel
    Topology(case.world_size, parallel.tensor, parallel.pipeline)  # says so itself


def tensor_divides_the_model(case: CheckContext) -> None:
    """Every rank of a tensor group holds whole heads and an equal part of the MLP; vocabularies are padded instead."""
    shape, degree = _shape(case), case.config.parallel.tensor
    sizes = {
        "model.num_attention_heads": shape.num_attention_heads,
        "the MLP's inner size (model.intermediate_size)": shape.intermediate_size,
    }
    for name, size in sizes.items():
        if size % degree:
            raise ConfigError(
                f"parallel.tensor={degree} does not divide {name}={size}; {_legal_degrees(case, shape, degree)}"
            )
    if not _shares_key_value_heads(shape.num_key_value_heads, degree):
        raise ConfigError(
            f"parallel.tensor={degree} and model.num_key_value_heads={shape.num_key_value_heads}: one must divide the "
            f"other, so that each rank needs whole key/value heads; {_legal_degrees(case, shape, degree)}"
        )


def sequence_has_a_tensor_group(case: CheckContext) -> None:
    parallel, length = case.config.parallel, case.config.data.sequence_length
    if not parallel.sequence:
        return
    if parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence=true divides the sequence over the ranks of a tensor group, and parallel.tensor=1 has "
            "none; state parallel.tensor=2 or more, or remove parallel.sequence"
        )
    if length % parallel.tensor:
        below = length // parallel.tensor * parallel.tensor
        lengths = f"{below} or {below + parallel.tensor}" if below else f"{parallel.tensor}"
        raise ConfigError(
            f"parallel.sequence=true: data.sequence_length={length} does not divide into parallel.tensor="
            f"{parallel.tensor} slices; use {lengths}"
        )


def pipeline_has_enough_layers(case: CheckContext) -> None:
    degree, layers = case.config.parallel.pipeline, case.config.model.num_hidden_layers
    if degree > layers:
        legal = (n for n in range(1, layers + 1) if case.world_size % (n * case.config.parallel.tensor) == 0)
        raise ConfigError(
            f"parallel.pipeline={degree} is more than model.num_hidden_layers={layers}: each stage holds a block at "
            f"least; the nearest, on {case.world_size} ranks, is {_words(_near(degree, legal))}"
        )


def pipeline_needs_low_zero(case: CheckContext) -> None:
    if case.config.parallel.pipeline > 1 and case.zero.stage >= 2:
        raise ConfigError(
            f"parallel.pipeline={case.config.parallel.pipeline} with zero_optimization.stage={case.zero.stage} "
            f"({case.ds.path}): a pipeline keeps whole gradients over its micro-batches; use stage 1"
        )


def pipeline_clips_with_zero_1(case: CheckContext) -> None:
    # The engine leaves the later stages out of the gradient norm.
    if case.config.parallel.pipeline > 1 and case.zero.stage == 0 and case.settings.gradient_clipping != 0:
        raise ConfigError(
            f"parallel.pipeline={case.config.parallel.pipeline} with zero_optimization.stage=0 ({case.ds.path}) clips "
            "by a wrong gradient norm in DeepSpeed 0.19.8; use stage 1"
        )


def pipeline_sums_tied_gradients(case: CheckContext) -> None:
    # DeepSpeed adds up what the first and the last stage find for their common weight in `grad`, but accumulates fp16
    # gradients in fp32 elsewhere: each stage would train its own copy.
    apart = case.precision == "fp16" and case.settings.data_types.grad_accum_dtype == "fp32"
    if case.config.parallel.pipeline > 1 and apart and _shape(case).tie_word_embeddings:
        raise ConfigError(
            f"parallel.pipeline={case.config.parallel.pipeline} with fp16 and data_types.grad_accum_dtype=fp32 "
            f"({case.ds.path}) trains tied embeddings wrongly in DeepSpeed 0.19.8; remove grad_accum_dtype, use bf16, "
            "or state model.tie_word_embeddings=false"
        )


def pipeline_keeps_its_states(case: CheckContext) -> None:
    if case.config.parallel.pipeline == 1:
        return
    for name, offload in (
        ("offload_optimizer", case.zero.offload_optimizer),
        ("offload_param", case.zero.offload_param),
    ):
        if offload is not None and offload.device != "none":
            raise ConfigError(
                f"parallel.pipeline={case.config.parallel.pipeline} with {name} ({case.ds.path}): offload is for ZeRO "
                f"without a pipeline; remove {name}, or the pipeline"
            )


def parallel_notices(config: RunConfig, ranks_per_node: int) -> list[str]:
    """What is legal and slow: tensor groups talk several times a layer, and should not leave a node."""
    degree = config.parallel.tensor
    if ranks_per_node % degree == 0:
        return []
    what = "is more than" if degree > ranks_per_node else "does not divide"
    fitting = [n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0 and degree % n == 0]
    advice = f"parallel.tensor={fitting[-1]}" + (f" with parallel.pipeline={degree // fitting[-1]}")
    return [
        f"parallel.tensor={degree} {what} the {ranks_per_node} ranks of a node: groups that talk in every layer do it "
        f"over the network, which is slow; {advice} takes as many ranks"
    ]


PARALLEL_RULES: tuple[Callable[[CheckContext], None], ...] = (
    degrees_divide_the_ranks,
    tensor_divides_the_model,
    sequence_has_a_tensor_group,
    pipeline_has_enough_layers,
    pipeline_needs_low_zero,
    pipeline_clips_with_zero_1,
    pipeline_sums_tied_gradients,
    pipeline_keeps_its_states,
)


def _near(degree: int, legal: Iterable[int]) -> list[int]:
    """The nearest legal degree below and above."""
    degrees = sorted(legal)
    return [n for n in degrees if n < degree][-1:] + [n for n in degrees if n > degree][:1]


def _legal_degrees(case: CheckContext, shape: ModelConfig, degree: int) -> str:
    legal = (
        n
        for n in range(1, shape.num_attention_heads + 1)
        if shape.num_attention_heads % n == 0
        and shape.intermediate_size % n == 0
        and _shares_key_value_heads(shape.num_key_value_heads, n)
        and case.world_size % (n * case.config.parallel.pipeline) == 0
    )
    return f"the nearest that does, on {case.world_size} ranks, is {_words(_near(degree, legal))}"


def _shares_key_value_heads(heads: int, degree: int) -> bool:
    """Fewer key/value heads than ranks: each is held by several."""
    return heads % degree == 0 or degree % heads == 0


def _shape(case: CheckContext) -> ModelConfig:
    config = case.config
    return build_model_config(
        config.model, vocab_size=1, sequence_length=config.data.sequence_length
    )  # no rule asks for V


def _words(values: list[int]) -> str:
    return " or ".join(map(str, values))
