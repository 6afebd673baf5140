"""Resolve a run for its ranks and its device: check it, and make every "auto" and every default explicit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, choose_precision
from megalm.config.deepspeed.json_schema import Precision
from megalm.config.loading import DEFAULT_PRESET, LoadedConfig, config_to_yaml, value_of
from megalm.config.schema import DataSection, DocumentedSection, Recompute, RunConfig, ScheduleSection
from megalm.config.validation import shown
from megalm.cost_model.memory import MemoryCase, estimate_memory, shares
from megalm.cost_model.pipeline_balance import LARGE_BUBBLE, micro_batches_for
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.model.model_config import ModelConfig, build_model_config, recomputed_flops_per_token
from megalm.parallel.pipeline_schedules import PipelineSchedule
from megalm.planning.batch_size import BatchPlan, RunBatch, TrainingStages, chooses_micro_batch, plan_batch
from megalm.planning.diagnostics import Diagnostics, wanted_diagnostics
from megalm.planning.engine_checks import (
    CheckContext,
    compile_notices,
    float8_notices,
    frozen_notices,
    no_recomputation,
    offload_notices,
    runs_compiled,
)
from megalm.planning.lr_schedule import ENDLESS, ScheduleFacts, learning_rate
from megalm.planning.memory_fit import MemoryFit, memory_notices
from megalm.planning.optimizer_facts import OptimizerFacts, optimizer_facts
from megalm.planning.parallel_checks import parallel_notices, second_copy_notices
from megalm.planning.run_checks import check_run, interval_notices, stage_notices, with_steps
from megalm.topology import Topology

__all__ = ["BatchPlan", "DeviceFacts", "OptimizerFacts", "ResolvedRun", "loss_chunk_tokens", "resolve"]

UNKNOWN_VOCAB_SIZE = 50_304  # GPT-2's, padded
_BYTES_VOCAB_SIZE = 257
_NEVER = 10**9  # steps_per_print: DeepSpeed's own lines would interrupt megalm's


# Products of fewer tokens leave parts of a GPU idle: with 2,048, a layer that holds 4,096 features has 256 tiles of
# 128 x 256, two for each processor. Of four chunks one is not hidden.
_CHUNK_TOKENS = 2048
_MOST_CHUNKS = 4


@dataclass(frozen=True)
class ResolvedRun:
    """A run that can be started.

    Attributes:
        batch: the largest of the run.
        stages: the batch and the sequence length of each step.
        deepspeed: the dictionary for `deepspeed.initialize` and the run folder, without optimizer and scheduler; its
            batch is that of the first step.
        whole_gradients: ZeRO 2 adds up each rank's gradients of a step, and reduces them once.
        recompute: what the backward pass computes again in each block that it does not recompute whole.
        notices: one line for each decision that the configuration leaves open, and for each slow or unsafe setting.
    """

    config: RunConfig
    sources: dict[str, str]
    preset: str | None
    deepspeed_source: DeepSpeedConfig
    topology: Topology
    device: DeviceFacts
    batch: BatchPlan
    stages: TrainingStages
    precision: Precision
    schedule: ScheduleFacts
    optimizer: OptimizerFacts
    deepspeed: dict[str, Any]
    notices: tuple[str, ...]
    whole_gradients: bool = False
    recompute: Recompute = "none"
    documented_by_preset: DocumentedSection = field(default_factory=DocumentedSection)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @cached_property
    def config_yaml(self) -> str:
        """The complete configuration, as saved in the run folder."""
        return config_to_yaml(self.config, self.documented_by_preset)

    @property
    def compiled(self) -> bool:
        """Whether blocks and loss run compiled."""
        return runs_compiled(self.config, self.device, self.deepspeed_source.settings.zero_optimization)

    @property
    def tensor_chunks(self) -> int:
        """Chunks of a micro-batch, of which a tensor group communicates one while it multiplies the next; 1: none."""
        wanted = self.config.parallel.overlap_tensor_communication
        if self.topology.tensor == 1 or not (self.device.kind == "cuda" if wanted == "auto" else wanted):
            return 1
        tokens = self.batch.micro_batch * self.config.data.sample_length // self.topology.context
        return max(1 if wanted == "auto" else 2, min(tokens // _CHUNK_TOKENS, _MOST_CHUNKS))

    @property
    def pipeline(self) -> PipelineSchedule:
        """A step of the largest batch."""
        return pipeline_schedule(self.config, self.topology, self.batch)

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_source.settings.zero_optimization.stage

    def memory_case(self, shape: ModelConfig) -> MemoryCase:
        """The facts that the estimate of the run's memory needs."""
        decided = self.precision, self.device, self.batch, self.whole_gradients, self.recompute
        return _memory_case(self.config, self.deepspeed_source, shape, self.topology, *decided)


def pipeline_schedule(config: RunConfig, topology: Topology, batch: BatchPlan) -> PipelineSchedule:
    """The schedule of a step; without a pipeline, of one rank."""
    parallel = config.parallel
    return PipelineSchedule(parallel.schedule_name, topology.pipeline, parallel.virtual_stages, batch.accumulation)


def resolve(
    loaded: LoadedConfig,
    ds: DeepSpeedConfig,
    world_size: int,
    device: DeviceFacts,
    vocab_size: int | None = None,
    ranks_per_node: int | None = None,
    data_needed: bool = True,
) -> ResolvedRun:
    """Check a run and make everything in it explicit.

    Args:
        world_size: the number of all ranks.
        device: the device of each rank; equal on every rank.
        vocab_size: `known_vocab_size`, for an "auto" micro-batch; None: the configuration's, or a guess with a notice.
        ranks_per_node: for a notice about groups that leave their node; None: all ranks are on one node.
        data_needed: whether to refuse a run without data; a plan needs none.

    Raises:
        ConfigError: all that is wrong with the run, by run_checks.py.
    """
    check_run(loaded, ds, world_size, device, data_needed)
    loaded = loaded.with_implied(ds.run_settings, ds.path)
    config, settings = loaded.config, ds.settings
    topology = CheckContext(loaded, ds, world_size, device).topology
    precision, precision_notices = choose_precision(settings, device)
    shape, vocab_notices = _shape(config, vocab_size)

    given: Recompute = "none" if config.train.recompute == "auto" else config.train.recompute

    def memory(
        batch: BatchPlan,
        whole_gradients: bool = config.train.reduce_gradients == "step",
        recompute: Recompute = given,
    ) -> MemoryFit:
        case = _memory_case(config, ds, shape, topology, precision, device, batch, whole_gradients, recompute)
        return MemoryFit.of(estimate_memory(case), device)

    def fits(batch: BatchPlan) -> bool:
        # With few large micro-batches the stages of a pipeline wait for each other.
        if batch.micro_batch > 1 and pipeline_schedule(config, topology, batch).bubble_share > LARGE_BUBBLE:
            return False
        return memory(batch).leaves_room

    first_batch, batch_notices = plan_batch(settings, topology, ds.path, fits, RunBatch.of(loaded, ds))
    stages = TrainingStages.of(config, first_batch.global_batch)
    batch = first_batch.of(stages.largest_batch)
    if topology.pipeline > 1 and chooses_micro_batch(settings):
        batch_notices.append(_bubble_notice(topology, batch, pipeline_schedule(config, topology, batch)))
    whole_gradients, reduction_notices = _reduction(config, ds, batch, partial(memory, batch, whole_gradients=True))
    recompute, recompute_notices = _recompute(config, ds, shape, device, partial(memory, batch, whole_gradients))
    case = CheckContext(loaded, ds, world_size, device)
    loaded, steps_notices = with_steps(case, stages, shape.parameter_count())
    loaded, warmup_notices = _fit_warmup(loaded)
    config = loaded.config
    schedule, schedule_notices = schedule_facts(loaded, ds)
    optimizer, optimizer_notices = optimizer_facts(ds)
    deepspeed, deepspeed_notices = _deepspeed_dict(ds, first_batch, precision, _gathered_sizes(ds, shape, topology))
    diagnostics, diagnostics_notices = wanted_diagnostics(config, ds)
    return ResolvedRun(
        config=config,
        sources=loaded.sources,
        preset=loaded.preset,
        deepspeed_source=ds,
        topology=topology,
        device=device,
        batch=batch,
        stages=stages,
        precision=precision,
        schedule=schedule,
        optimizer=optimizer,
        deepspeed=deepspeed,
        whole_gradients=whole_gradients,
        recompute=recompute,
        notices=(
            *ds.notices,
            *_preset_notices(loaded, ds),
            *precision_notices,
            *float8_notices(config, device),
            *vocab_notices,
            *frozen_notices(config, shape),
            *batch_notices,
            *reduction_notices,
            *recompute_notices,
            *offload_notices(config, device),
            *memory_notices(memory(batch, whole_gradients, recompute)),
            *steps_notices,
            *warmup_notices,
            *schedule_notices,
            *optimizer_notices,
            *deepspeed_notices,
            *diagnostics_notices,
            *compile_notices(config, device),
            *interval_notices(config),
            *stage_notices(config),
            *second_copy_notices(ds.settings.zero_optimization, ranks_per_node or world_size),
            *parallel_notices(config, ranks_per_node or world_size),
        ),
        documented_by_preset=loaded.documented_by_preset,
        diagnostics=diagnostics,
    )


def _bubble_notice(topology: Topology, batch: BatchPlan, schedule: PipelineSchedule) -> str:
    share = schedule.bubble_share
    key = f"parallel.pipeline={topology.pipeline}"
    waits = f"{key}: with {batch.accumulation} micro-batches ranks wait {share:.0%} of a step"
    if share <= LARGE_BUBBLE:
        return waits
    enough = micro_batches_for(schedule, LARGE_BUBBLE) * topology.data
    return f"{waits}; a batch of {batch.global_batch} allows no more, one of {enough} makes it {LARGE_BUBBLE:.0%}"


# Of a preset, the keys that decide the size, the length and the rate of a run.
_DECISIVE = ("model.", "data.sequence_length", "data.recipe", "schedule.", "train.steps")


def _preset_notices(loaded: LoadedConfig, ds: DeepSpeedConfig) -> list[str]:
    """Name the default preset's values under somebody's own model: it is written for another size."""
    if loaded.preset != DEFAULT_PRESET or not any(key.startswith("model.") for key in loaded.explicit_keys):
        return []
    origin = f"preset {DEFAULT_PRESET}"
    decisive = _DECISIVE if ds.settings.train_batch_size is not None else (*_DECISIVE, "batch.")
    theirs = [
        f"{key}={shown(value_of(loaded.config, key))}"
        for key, source in loaded.sources.items()
        if source == origin and key.startswith(decisive)
    ]
    if not theirs:
        return []
    return [f"{origin}, made for a small model, sets what you leave out: {', '.join(theirs)}"]


def _fit_warmup(loaded: LoadedConfig) -> tuple[LoadedConfig, list[str]]:
    """Shorten a preset's warm-up for a short run; run_checks.py has refused a person's own.

    Changes the configuration itself, so that the run folder's YAML starts the same run. A warm-up of DeepSpeed's may
    be longer than the run.
    """
    schedule, steps = loaded.config.schedule, loaded.config.train.steps
    source = loaded.sources["schedule.warmup_steps"]
    is_deepspeed_s = schedule.step_convention == "deepspeed" and not source.startswith(("default", "preset "))
    if schedule.warmup_steps < steps or is_deepspeed_s:
        return loaded, []
    warmup = steps // 10
    notice = f"schedule.warmup_steps={schedule.warmup_steps} ({source}) is not below train.steps={steps}: {warmup}"
    config = loaded.config.model_copy(update={"schedule": schedule.model_copy(update={"warmup_steps": warmup})})
    sources = loaded.sources | {"schedule.warmup_steps": f"{source}, shortened"}
    return replace(loaded, config=config, sources=sources), [notice]


def decay_steps_of(schedule: ScheduleSection, steps: int) -> int:
    """Return over how many of `steps` the rate falls; the default is a fifth."""
    return schedule.decay_steps or max(1, steps // 5)


def schedule_facts(loaded: LoadedConfig, ds: DeepSpeedConfig) -> tuple[ScheduleFacts, list[str]]:
    """Return the schedule of both files together, and notices of rates that are not used or not reached."""
    schedule, steps = loaded.config.schedule, loaded.config.train.steps
    peak, notices = schedule.peak_learning_rate, []
    given = ds.settings.peak_learning_rate
    if given is not None:  # run_checks.py has refused another peak of a person's: this one is a preset's or a default
        (name, peak), source = given, loaded.sources["schedule.peak_learning_rate"]
        notices = [
            f"peak learning rate {peak:g} is {name} of {ds.path}; "
            f"schedule.peak_learning_rate={schedule.peak_learning_rate:g} ({source}) is not used"
        ]
    facts = ScheduleFacts(
        kind=schedule.kind,
        peak_learning_rate=peak,
        final_learning_rate=peak if schedule.kind in ENDLESS else _end_rate(schedule, "final", peak, peak / 10),
        warmup_steps=schedule.warmup_steps,
        decay_steps=decay_steps_of(schedule, steps),
        steps=steps,
        warmup_kind=schedule.warmup_kind,
        initial_learning_rate=_end_rate(schedule, "initial", peak, 0.0),
        decay_end_step=schedule.decay_end_step,
        step_convention=schedule.step_convention,
    )
    return facts, [*notices, *_unreached(facts)]


def _end_rate(schedule: ScheduleSection, end: Literal["initial", "final"], peak: float, default: float) -> float:
    rate, ratio = getattr(schedule, f"{end}_learning_rate"), getattr(schedule, f"{end}_ratio")
    return default if rate is None and ratio is None else peak * ratio if rate is None else rate


def _unreached(facts: ScheduleFacts) -> Iterator[str]:
    if facts.step_convention == "deepspeed" and facts.peak_step > facts.steps:
        yield f"train.steps={facts.steps} ends within the warm-up of {facts.warmup_steps} steps: no step has the peak"
    elif facts.decay_end_step is not None and facts.final_step > facts.steps:
        yield (
            f"train.steps={facts.steps} ends before schedule.decay_end_step={facts.decay_end_step}: the last rate is "
            f"{learning_rate(facts, facts.steps):.3g}, not {facts.final_learning_rate:.3g}"
        )
    elif facts.decay_end_step is not None and facts.final_step < facts.steps:
        yield (
            f"schedule.decay_end_step={facts.decay_end_step} is before train.steps={facts.steps}: the rate stays at "
            f"{facts.final_learning_rate:.3g} from step {facts.final_step} on"
        )


_CHUNK_ON_CPU, _CHUNK_ON_GPU = 1024, 8192  # tokens: logits that fit caches; matrix products that fill a GPU
_BYTES_PER_LOGIT = 8  # a logit and its gradient in the model's type, and an fp32 probability
_SHARE_OF_LOGITS = 1 / 16  # of a GPU's memory


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


def _memory_case(
    config: RunConfig,
    ds: DeepSpeedConfig,
    shape: ModelConfig,
    topology: Topology,
    precision: Precision,
    device: DeviceFacts,
    batch: BatchPlan,
    whole_gradients: bool,
    recompute: Recompute,
) -> MemoryCase:
    """Return the facts that the memory estimate needs."""
    settings = ds.settings
    # Without flash attention; `fused_attention` has the rule, and a GPU has it where it has bf16.
    dense_mask = config.model.attention_dropout > 0 and config.data.masks_documents
    repeats_keys = device.kind == "cuda" and (dense_mask or precision == "fp32" or not device.bf16)
    sizes = _gathered_sizes(ds, shape, topology)
    return MemoryCase(
        shape=shape,
        sequence_length=config.data.sample_length,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        precision=precision,
        gradient_precision=settings.data_types.grad_accum_dtype or ("fp16" if precision == "fp16" else "fp32"),
        communication_precision=settings.communication_data_type or ("fp16" if precision == "fp16" else "fp32"),
        zero=settings.zero_optimization.model_copy(update=sizes),
        topology=topology,
        loss_chunk_tokens=loss_chunk_tokens(config, shape, device),
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


def _gathered_sizes(ds: DeepSpeedConfig, shape: ModelConfig, topology: Topology) -> dict[str, int]:
    """Return ZeRO 3's sizes in elements that the JSON leaves open and for which DeepSpeed's defaults are no good.

    A block is gathered in one message, while the block before it computes. Small parameters travel with it: those that
    DeepSpeed keeps on every rank are gathered one by one after each update, and the device waits for them.
    """
    zero = ds.settings.zero_optimization
    if zero.stage != 3:
        return {}
    given = {key.removeprefix("zero_optimization.") for key in ds.explicit_keys}
    threshold = zero.param_persistence_threshold if "param_persistence_threshold" in given else 0
    parameters = next(shares(shape, topology)).parameters().items()
    counts = [math.prod(size) for name, size in parameters if name.startswith("layers.0.")]
    block = sum(count for count in counts if count > threshold)
    sizes = {
        "param_persistence_threshold": threshold,
        "prefetch_bucket_size": max(block, zero.prefetch_bucket_size),
        "max_live_parameters": max(2 * block, zero.max_live_parameters),
    }
    return {name: size for name, size in sizes.items() if name not in given and size != getattr(zero, name)}


def _reduction(
    config: RunConfig, ds: DeepSpeedConfig, batch: BatchPlan, need: Callable[[], MemoryFit]
) -> tuple[bool, list[str]]:
    """Return whether ZeRO 2 keeps whole gradients and sends them once a step, and a notice where "auto" decides it.

    Args:
        need: estimates the memory with whole gradients.
    """
    zero, wanted = ds.settings.zero_optimization, config.train.reduce_gradients
    if zero.stage != 2 or wanted != "auto" or batch.accumulation == 1 or batch.data_parallel == 1:
        return zero.stage == 2 and wanted == "step", []
    often = f'train.reduce_gradients ("auto"): gradients are reduced {batch.accumulation} times a step'
    if zero.offload_optimizer is not None and zero.offload_optimizer.device != "none":
        return False, [f"{often}: offload_optimizer keeps no whole ones"]
    if not (whole := need()).leaves_room:
        return False, [f"{often}, not once: with whole gradients {whole}"]
    return True, ['train.reduce_gradients ("auto"): gradients are kept whole and reduced once a step']


def _recompute(
    config: RunConfig,
    ds: DeepSpeedConfig,
    shape: ModelConfig,
    device: DeviceFacts,
    need: Callable[[Recompute], MemoryFit],
) -> tuple[Recompute, list[str]]:
    """Return what each block recomputes, and a notice where "auto" decides it: the least arithmetic that fits.

    Args:
        need: estimates the memory with a choice.
    """
    if config.train.recompute != "auto":
        return config.train.recompute, []
    length, tiles = config.data.sample_length, config.train.mlp_chunk_tokens is not None
    needs = {kind: need(kind) for kind in get_args(Recompute)}
    choices = [kind for kind in needs if not no_recomputation(kind, config, device, ds.settings.zero_optimization)]
    # "none" stays before "norms".
    choices.sort(key=lambda kind: recomputed_flops_per_token(shape, length, kind, tiles=tiles))
    chosen = next(
        (kind for kind in choices if needs[kind].leaves_room), min(choices, key=lambda kind: needs[kind].step)
    )
    notice = f'train.recompute ("auto"): {chosen}'
    return chosen, [notice if chosen == "none" else f"{notice}; without recomputation {needs['none']}"]


def known_vocab_size(data: DataSection) -> int | None:
    """Return the vocabulary size of the configured tokenizer file; None: there is none, run_checks.py reports that.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    if data.tokenizer in (None, "bytes") or not Path(data.tokenizer).exists():
        return None
    return load_tokenizer(data.tokenizer).vocab_size


def expected_vocab_size(config: RunConfig, of_tokenizer: int | None) -> int | None:
    """Return the run's vocabulary size, as far as it is known before a tokenizer exists."""
    if of_tokenizer is not None:
        return of_tokenizer
    if config.data.tokenizer == "bytes":
        return _BYTES_VOCAB_SIZE
    if config.data.tokenizer is None and config.data.recipe is not None:
        return config.data.recipe_vocab_size
    return config.model.vocab_size


def _shape(config: RunConfig, vocab_size: int | None) -> tuple[ModelConfig, list[str]]:
    expected = expected_vocab_size(config, vocab_size)
    notices = []
    if expected is None:
        notices = [f"the vocabulary is not known yet: {UNKNOWN_VOCAB_SIZE:,} entries are assumed"]
    return build_model_config(config.model, expected or UNKNOWN_VOCAB_SIZE, config.data.sample_length), notices


def _deepspeed_dict(
    ds: DeepSpeedConfig, batch: BatchPlan, precision: Precision, sizes: dict[str, int]
) -> tuple[dict[str, Any], list[str]]:
    given, stage_3 = ds.to_dict(), {f"stage3_{name}": size for name, size in sizes.items()}
    notices = []
    if stage_3:
        chosen = " ".join(f"{name}={size}" for name, size in stage_3.items())
        notices.append(f"{ds.path} leaves open {chosen}: blocks are gathered whole, one ahead")
    clipping = ds.settings.gradient_clipping
    if clipping is None:
        clipping = 1.0
        notices.append(f"{ds.path} has no gradient_clipping: 1.0, DeepSpeed's default; 0 turns it off")
    resolved = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": clipping,
        "steps_per_print": _NEVER,
        # On by default in DeepSpeed, where it waits for the device twice a micro-batch.
        "timers": {"throughput": {"enabled": False, **given.get("timers", {}).get("throughput", {})}},
        **{key: value for key, value in given.items() if key not in (*_NOT_PASSED_ON, *_MADE_EXPLICIT)},
        "fp16": {**given.get("fp16", {}), "enabled": precision == "fp16"},
        "bf16": {**given.get("bf16", {}), "enabled": precision == "bf16"},
        "zero_optimization": {"stage": 0, **given.get("zero_optimization", {}), **stage_3},
    }
    if precision == "bf16":
        # DeepSpeed would accumulate and send gradients in bf16, which loses their low bits.
        resolved["data_types"] = {"grad_accum_dtype": "fp32", **given.get("data_types", {})}
        resolved.setdefault("communication_data_type", "fp32")
        notices += [
            f"{name} is {value}, lower than fp32: accumulated gradients lose low bits"
            for name, value in (
                ("data_types.grad_accum_dtype", resolved["data_types"]["grad_accum_dtype"]),
                ("communication_data_type", resolved["communication_data_type"]),
            )
            if value != "fp32"
        ]
    return resolved, notices


# megalm serves these itself. DeepSpeed's wall clock would print each step, and end a pipeline's run in its first one.
_NOT_PASSED_ON = ("optimizer", "flops_profiler", "comms_logger", "wall_clock_breakdown")
_MADE_EXPLICIT = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "timers",
)
