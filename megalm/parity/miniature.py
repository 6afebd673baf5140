"""A person's configuration in miniature: the same layout, ZeRO stage, precision and features, as small as shows them.

Sizes shrink until a CPU trains them in seconds; degrees of parallelism shrink to 2. Whatever changes is listed, and so
is what a CPU cannot show.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts
from megalm.config.deepspeed.translate import translate
from megalm.config.loading import LoadedConfig
from megalm.config.schema import (
    BatchStage,
    DataSection,
    DataStage,
    LayerChoice,
    ModelSection,
    ParallelSection,
    RunConfig,
    ScheduleSection,
)
from megalm.config.validation import shown
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.engine_checks import ALLOW_CPU_FP16
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.runs.run_settings import ConfigFiles

VOCABULARY = 131  # no multiple of anything, so that padding somewhere would show
_CPU = DeviceFacts("cpu", bf16=True, memory_bytes=4 << 30)
_MICRO_BATCH = 2
_LENGTH = 24
# Adam moves a weight by a whole step however small its gradient is, down to about epsilon. At the usual 1e-8 it would
# make steps of gradients that are rounding alone; those of the miniature are about 1e-3, and low precision rounds them
# by up to 1e-5.
_EPSILON = {"fp32": 1e-5, "bf16": 1e-4, "fp16": 1e-4}
# Below the gradient norms of the first steps, so that a wrong norm makes wrong weights as well.
_CLIPPING = 0.5
_SCALE_POWER = 10  # of fp16: from 16 the first updates would be skipped, until the scale fits

# Sections that change no number of a step.
_NOT_TRAINED = ("run", "profile", "evaluate", "sample", "checkpoint", "guard", "resume", "tracking", "slurm")
# Keys of `parallel` that the run on one rank has at their defaults.
_DIVIDES = (
    *("tensor", "pipeline", "virtual_stages", "pipeline_schedule"),
    *("context", "context_method", "sequence", "expert", "overlap_tensor_communication"),
)
_NOT_PASSED_ON = (
    "aio",
    "flops_profiler",
    "comms_logger",
    "wall_clock_breakdown",
    "gradient_accumulation_steps",
    "steps_per_print",
)


@dataclass(frozen=True)
class Change:
    """A value that is another one in the miniature."""

    key: str
    own: object
    miniature: object

    def __str__(self) -> str:
        return f"{self.key} {shown(self.own)} -> {shown(self.miniature)}"


@dataclass(frozen=True)
class ParityCase:
    """A run in miniature, and the same job on one rank.

    Attributes:
        run, reference: in miniature; the reference has ZeRO 1, nothing divided, offloaded or recomputed.
        changes: what is smaller or otherwise than in the person's run.
        not_shown: one line for each thing that the comparison says nothing about.
    """

    run: ResolvedRun
    reference: ResolvedRun
    shape: ModelConfig
    changes: tuple[Change, ...]
    not_shown: tuple[str, ...]


def make_case(files: ConfigFiles, ranks: int, device: DeviceFacts, fp32: bool = False) -> ParityCase:
    """Return the miniature of a run on `ranks` ranks of a device.

    Args:
        fp32: compute in fp32, whatever the run's precision.

    Raises:
        ConfigError: the run itself would be refused.
    """
    own = resolve(_without_data(files.loaded), files.deepspeed, ranks, device, data_needed=False)
    wanted = own.precision
    if fp32:
        own = replace(own, precision="fp32")
    config = _small_config(own)
    settings = _small_json(own, config)
    degrees = config.parallel
    mini_ranks = 2 * degrees.tensor * degrees.context * degrees.pipeline
    run = _resolved(own, config, settings, mini_ranks)
    undivided = {name: ParallelSection.model_fields[name].default for name in _DIVIDES}
    alone = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=undivided),
            "train": config.train.model_copy(
                update={
                    "checkpoint_activations_every": 0,
                    "recompute": "none",
                    "reduce_gradients": "auto",
                    "loss_chunk_tokens": 1024,
                    "mlp_chunk_tokens": None,
                    "offload_activations": False,
                }
            ),
        }
    )
    reference = _resolved(own, alone, {**settings, "zero_optimization": {"stage": 1}}, 1)
    shape = build_model_config(config.model, VOCABULARY, config.data.sample_length)
    changes = [Change("precision", wanted, run.precision)] if wanted != run.precision else []
    return ParityCase(run, reference, shape, (*changes, *_changes(own, run)), tuple(_not_shown(own, run)))


def _without_data(loaded: LoadedConfig) -> LoadedConfig:
    """Return the configuration without names of files, which need not be on this machine."""
    data = loaded.config.data
    stages = tuple(stage.model_copy(update={"blend": ()}) for stage in data.stages if stage.sequence_length)
    kept = DataSection(sequence_length=data.sequence_length, stages=stages, document_mask=data.masks_documents)
    # A recipe or a tokenizer may decide the vocabulary, on which nothing here depends.
    return replace(loaded, config=loaded.config.model_copy(update={"data": kept}))


def _resolved(own: ResolvedRun, config: RunConfig, settings: dict[str, Any], ranks: int) -> ResolvedRun:
    deepspeed = DeepSpeedConfig.of(own.deepspeed_source.path, translate(settings))
    loaded = LoadedConfig(config, own.sources, None)
    with _fp16_on_a_cpu():
        return resolve(loaded, deepspeed, ranks, _CPU, VOCABULARY, data_needed=False)


@contextlib.contextmanager
def _fp16_on_a_cpu() -> Iterator[None]:
    """Let the checks pass fp16, which is slow on a CPU, but not in a miniature."""
    before = os.environ.get(ALLOW_CPU_FP16)
    os.environ[ALLOW_CPU_FP16] = "1"
    try:
        yield
    finally:
        os.environ.pop(ALLOW_CPU_FP16)
        if before is not None:
            os.environ[ALLOW_CPU_FP16] = before


def _small_config(own: ResolvedRun) -> RunConfig:
    config = own.config
    model, train, parallel = config.model, config.train, config.parallel
    tensor, pipeline, context = (min(2, it) for it in (parallel.tensor, parallel.pipeline, parallel.context))
    virtual = min(2, parallel.virtual_stages)
    layers = max(pipeline * virtual, min(4, model.num_hidden_layers))
    accumulation = _small_accumulation(own)
    heads = model.num_key_value_heads or model.num_attention_heads
    grouped = None if heads == model.num_attention_heads else min(2, heads)
    own_head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    sets_head_dim = own_head_dim * model.num_attention_heads != model.hidden_size
    reduction = "auto"
    if own.zero_stage == 2:
        reduction = "step" if own.whole_gradients else "micro_batch"
    updates: dict[str, Any] = {
        "model": model.model_copy(
            update={
                "hidden_size": 32,
                "mup_base_width": _small_base_width(model),
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": grouped,
                "head_dim": 16 if sets_head_dim else None,
                "intermediate_size": 88,
                "moe_intermediate_size": 48 if model.num_experts else None,
                **_small_choices(model, layers, min(2, parallel.expert)),
                "vocab_size": None,
                "vocab_multiple": None,
                "max_position_embeddings": None,
                "dropout": 0.0,
                "attention_dropout": 0.0,
            }
        ),
        "data": _small_data(config.data),
        "schedule": ScheduleSection(batch=_small_stages(own, accumulation)),
        "train": train.model_copy(
            update={
                "steps": 40,
                "tokens": None,
                "tokens_per_parameter": None,
                "checkpoint_activations_every": min(train.checkpoint_activations_every, layers),
                "reduce_gradients": reduction,
                "loss_chunk_tokens": 40,  # more than one chunk
                "mlp_chunk_tokens": None if train.mlp_chunk_tokens is None else 20,
            }
        ),
        "parallel": parallel.model_copy(
            update={
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_stages": virtual,
                "context": context,
                "expert": min(2, parallel.expert),
                "balance": "parameters",
                "overlap_tensor_communication": own.tensor_chunks > 1,
            }
        ),
        "precision": config.precision.model_copy(update={"float8": False}),
        "compile": False,
    }
    defaults = RunConfig()
    plain = {name: getattr(defaults, name) for name in (*_NOT_TRAINED, "batch", "documented")}
    return config.model_copy(update={**updates, **plain, "preset": None, "deepspeed_config": None})


def _small_base_width(model: ModelSection) -> int | None:
    """Return a base width that the miniature is as many times as wide as the run's model, up to 16 times."""
    if model.mup_base_width is None:
        return None
    return max(2, round(32 * model.mup_base_width / model.hidden_size))


def _small_choices(model: ModelSection, layers: int, expert: int) -> dict[str, Any]:
    """Return a model's choices that have a size: each of them still has an effect."""

    def of_layers(choice: LayerChoice | None) -> LayerChoice | None:
        if choice is None or isinstance(choice, int):
            return choice and min(choice, layers)
        kept = tuple(layer for layer in choice if layer < layers)
        return kept if not choice or 0 < len(set(kept)) < layers else (layers - 1,)

    # An even number, which expert groups of two ranks divide, if expert groups divide the run's.
    experts = model.num_experts and min(model.num_experts, 4) // expert * expert
    scaling = model.rope_scaling
    if scaling is not None and scaling.original_max_position_embeddings is not None:
        scaling = scaling.model_copy(update={"original_max_position_embeddings": _LENGTH // 2})
    return {
        "no_rope_layers": of_layers(model.no_rope_layers),
        "full_attention_layers": of_layers(model.full_attention_layers),
        "num_experts": experts,
        "num_experts_per_token": min(model.num_experts_per_token, 2),
        "moe_layers": of_layers(model.moe_layers),
        "num_dense_layers": min(model.num_dense_layers, layers - 1),
        "sliding_window": model.sliding_window and min(model.sliding_window, _LENGTH // 3),
        "rope_scaling": scaling,
    }


def _small_data(data: DataSection) -> DataSection:
    """Return a sequence length that doubles right after the save, if the run's changes."""
    if len(set(data.sequence_lengths)) == 1:
        return DataSection(sequence_length=_LENGTH, document_mask=data.masks_documents)
    stages = (DataStage(from_step=3, sequence_length=_LENGTH),)
    return DataSection(sequence_length=_LENGTH // 2, stages=stages, document_mask=data.masks_documents)


def _small_accumulation(own: ResolvedRun) -> int:
    return 2 if own.batch.accumulation > 1 or own.topology.pipeline > 1 else 1


def _small_stages(own: ResolvedRun, accumulation: int) -> tuple[BatchStage, ...]:
    """Return a batch that grows before the save and right after it, if the run's grows."""
    if len({stage.sequences for stage in own.stages.stages}) == 1:
        return ()
    return tuple(
        BatchStage(from_step=step, sequences=2 * _MICRO_BATCH * (accumulation + more))
        for step, more in ((2, 1), (3, 2))
    )


def _small_json(own: ResolvedRun, config: RunConfig) -> dict[str, Any]:
    given = own.deepspeed_source.to_dict()
    settings = {key: value for key, value in given.items() if key not in _NOT_PASSED_ON}
    accumulation = _small_accumulation(own)
    optimizer = own.optimizer.as_json()
    optimizer["params"] = {**given.get("optimizer", {}).get("params", {}), **optimizer["params"]}
    optimizer["params"]["eps"] = max(_EPSILON[own.precision], own.optimizer.epsilon)
    optimizer["params"].pop("lr", None)
    fp16 = {**given.get("fp16", {}), "enabled": own.precision == "fp16"}
    if own.precision == "fp16":
        fp16["initial_scale_power"] = min(_SCALE_POWER, own.deepspeed_source.settings.fp16.initial_scale_power)
    return {
        **settings,
        "train_batch_size": 2 * _MICRO_BATCH * accumulation,
        "train_micro_batch_size_per_gpu": _MICRO_BATCH,
        "gradient_clipping": _CLIPPING if own.deepspeed["gradient_clipping"] else 0.0,
        "optimizer": optimizer,
        "bf16": {**given.get("bf16", {}), "enabled": own.precision == "bf16"},
        "fp16": fp16,
        "zero_optimization": _small_zero(own, given.get("zero_optimization", {})),
    }


def _small_zero(own: ResolvedRun, given: dict[str, Any]) -> dict[str, Any]:
    zero = {**given, "stage": own.zero_stage}
    offload = zero.get("offload_optimizer")
    if offload is not None and offload.get("device") == "nvme":
        zero["offload_optimizer"] = {"device": "cpu"}
    if own.deepspeed_source.settings.zero_optimization.secondary_ranks:
        zero["zero_hpz_partition_size"] = 2
    if own.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else every parameter of the miniature stays whole
    return zero


def _changes(own: ResolvedRun, run: ResolvedRun) -> Iterator[Change]:
    before, after = own.topology, run.topology
    pairs: list[tuple[str, object, object]] = [
        ("data ranks", before.data, after.data),
        ("parallel.tensor", before.tensor, after.tensor),
        ("parallel.pipeline", before.pipeline, after.pipeline),
        (
            "parallel.virtual_stages",
            own.config.parallel.virtual_stages,
            run.config.parallel.virtual_stages,
        ),
        ("parallel.context", before.context, after.context),
        ("parallel.expert", before.expert, after.expert),
        ("micro-batch", own.batch.micro_batch, run.batch.micro_batch),
        ("micro-batches in a step", own.batch.accumulation, run.batch.accumulation),
        *([("schedule.batch", _in_short(own), _in_short(run))] if own.stages.grow else []),
        ("data.sequence_length", own.config.data.sample_length, run.config.data.sample_length),
    ]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "sliding_window")
    of_experts = ("num_experts", "num_experts_per_token", "moe_intermediate_size", "moe_layers", "num_dense_layers")
    for name in (*sizes, "full_attention_layers", "no_rope_layers", "mup_base_width", *of_experts):
        pairs.append((f"model.{name}", getattr(own.config.model, name), getattr(run.config.model, name)))
    for name in ("dropout", "attention_dropout"):
        pairs.append((f"model.{name}", getattr(own.config.model, name), getattr(run.config.model, name)))
    pairs += [
        (
            "train.checkpoint_activations_every",
            own.config.train.checkpoint_activations_every,
            run.config.train.checkpoint_activations_every,
        ),
        (
            "zero_optimization.zero_hpz_partition_size",
            own.deepspeed_source.settings.zero_optimization.zero_hpz_partition_size,
            run.deepspeed_source.settings.zero_optimization.zero_hpz_partition_size,
        ),
        ("gradient_clipping", own.deepspeed["gradient_clipping"], run.deepspeed["gradient_clipping"]),
        ("optimizer.params.eps", own.optimizer.epsilon, run.optimizer.epsilon),
    ]
    yield from (Change(*pair) for pair in pairs if pair[1] != pair[2])


def _in_short(run: ResolvedRun) -> str:
    return ", ".join(
        f"{stage.sequences} x {stage.sequence_length} from step {stage.first_step}" for stage in run.stages.stages
    )


def dropped_by_rounding(run: ResolvedRun) -> list[str]:
    """Return why a layout without a fault may be found unequal, and what to do."""
    if run.precision == "fp32" or run.config.train.expert_capacity_factor is None:
        return []
    return [
        f"train.expert_capacity_factor in {run.precision}: a token that rounding sends to another expert drops a third "
        "one, and layouts round differently; compare with --fp32"
    ]


def _not_shown(own: ResolvedRun, run: ResolvedRun) -> Iterator[str]:
    yield "GPUs: NCCL, CUDA's kernels and streams, memory, speed; here gloo on the CPU (megalm rehearse, megalm plan)"
    if own.precision != "fp32":
        yield f"{own.precision} of a GPU's kernels, and differences that its rounding hides; --fp32 compares to 1e-5"
    yield from dropped_by_rounding(own)
    if own.compiled:
        yield "torch.compile: blocks and loss run uncompiled"
    if own.config.precision.float8:
        yield f"precision.float8: linear layers multiply in {own.precision}"
    if own.topology.world_size > run.topology.world_size:
        yield (
            f"what depends on more than {run.topology.world_size} ranks: groups across nodes, the data ranks' number, "
            "unequal pipeline stages"
        )
    if own.config.parallel.balance == "time":
        yield "parallel.balance=time: stages are cut by parameters, not by measured times"
    if own.config.model.dropout or own.config.model.attention_dropout:
        yield "dropout: a layout draws masks of its own for its micro-batches, so it is off"
    if own.precision == "fp16" and run.deepspeed["fp16"] != own.deepspeed["fp16"]:
        yield f"fp16's first loss scale: it begins at 2^{_SCALE_POWER}, and skips no update"
    if own.zero_stage:
        yield "several buckets: one of DeepSpeed's holds the whole miniature"
    offload = own.deepspeed_source.settings.zero_optimization.offload_optimizer
    if offload is not None and offload.device == "nvme":
        yield "offload_optimizer.device=nvme: the states are in memory, not on a disk"
    if any(not source.startswith("default") for key, source in own.sources.items() if key.startswith("schedule.")):
        yield "your data, learning-rate schedule and spike guard: steps have synthetic tokens and a constant rate"
    else:
        yield "your data and spike guard: steps have synthetic tokens and a constant rate"
