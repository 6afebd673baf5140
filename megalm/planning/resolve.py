"""What a run amounts to on this many ranks of this device: every "auto" and every default made explicit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from megalm.config.deepspeed.json_reader import DeepSpeedConfig
from megalm.config.loading import LoadedConfig, config_to_yaml
from megalm.config.precision import DeviceFacts, Precision, choose_precision
from megalm.config.schema import DocumentedSection, RunConfig
from megalm.cost_model.memory import MemoryCase, estimate_memory
from megalm.cost_model.pipeline_balance import LARGE_BUBBLE
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.batch_size import BatchPlan, chooses_micro_batch, plan_batch
from megalm.planning.checks.parallel import parallel_notices
from megalm.planning.checks.run_checks import check_run
from megalm.planning.diagnostics import Diagnostics, wanted_diagnostics
from megalm.planning.lr_schedule import ScheduleFacts, fit_warmup, schedule_facts
from megalm.topology import Topology, bubble_share

__all__ = ["BatchPlan", "DeviceFacts", "OptimizerFacts", "ResolvedRun", "memory_case", "resolve"]

# An estimate is no measurement, and allocators fragment: "auto" leaves this much of the memory alone.
_USABLE_MEMORY = 0.85
UNKNOWN_VOCAB_SIZE = 50_304  # GPT-2's, padded
_BYTES_VOCAB_SIZE = 257
_NEVER = 10**9  # steps_per_print: DeepSpeed's own lines would interrupt megalm's


@dataclass(frozen=True)
class OptimizerFacts:
    """Adam's numbers; `kind` "adam" adds weight decay to the gradient, "adamw" takes it from the weight."""

    kind: Literal["adamw", "adam"]
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


@dataclass(frozen=True)
class ResolvedRun:
    """A run that can be started.

    Attributes:
        deepspeed: what engine/ hands to `deepspeed.initialize` and the run folder keeps; no optimizer, no scheduler.
        notices: one line for everything that was decided, left out or worth knowing.
    """

    config: RunConfig
    sources: dict[str, str]
    preset: str | None
    deepspeed_source: DeepSpeedConfig
    topology: Topology
    device: DeviceFacts
    batch: BatchPlan
    precision: Precision
    schedule: ScheduleFacts
    optimizer: OptimizerFacts
    deepspeed: dict[str, Any]
    notices: tuple[str, ...]
    documented_by_preset: DocumentedSection = field(default_factory=DocumentedSection)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @cached_property
    def config_yaml(self) -> str:
        """The whole configuration, as the run folder keeps it."""
        return config_to_yaml(self.config, self.documented_by_preset)

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_source.settings.zero_optimization.stage

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch * self.config.data.sequence_length


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
        world_size: ranks in all.
        device: what each rank computes on; equal on every rank.
        vocab_size: the tokenizer's, for an "auto" micro-batch; None takes the configuration's, or a guess and says so.
        ranks_per_node: for a notice of groups that leave their node; None: all ranks are on one.
        data_needed: whether a run without data is refused; a plan needs none.

    Raises:
        ConfigError: the first rule of planning/checks that the run breaks.
    """
    loaded = loaded.with_implied(ds.run_settings, ds.path)
    check_run(loaded, ds, world_size, device, data_needed)
    loaded, warmup_notices = fit_warmup(loaded)
    config, settings = loaded.config, ds.settings
    topology = Topology(world_size, config.parallel.tensor, config.parallel.pipeline)
    precision, precision_notices = choose_precision(settings, device)
    schedule, schedule_notices = schedule_facts(loaded, ds)
    shape, vocab_notices = _shape(config, vocab_size)

    def fits(batch: BatchPlan) -> bool:
        # Large micro-batches are few, and leave a pipeline's stages waiting for each other.
        if batch.micro_batch > 1 and bubble_share(topology.pipeline, batch.accumulation) > LARGE_BUBBLE:
            return False
        case = memory_case(config, ds, shape, topology, precision, device, batch)
        return estimate_memory(case).total <= device.memory_bytes * _USABLE_MEMORY

    batch, batch_notices = plan_batch(settings, topology.data, ds.path, fits)
    if topology.pipeline > 1 and chooses_micro_batch(settings):
        batch_notices.append(
            f"parallel.pipeline={topology.pipeline}: micro-batches are kept so small that stages wait for at most "
            f"{LARGE_BUBBLE:.0%} of a step, where train_batch_size allows it"
        )
    optimizer, optimizer_notices = _optimizer(ds)
    deepspeed, deepspeed_notices = _deepspeed_dict(ds, batch, precision)
    diagnostics, diagnostics_notices = wanted_diagnostics(config.train, ds)
    return ResolvedRun(
        config=config,
        sources=loaded.sources,
        preset=loaded.preset,
        deepspeed_source=ds,
        topology=topology,
        device=device,
        batch=batch,
        precision=precision,
        schedule=schedule,
        optimizer=optimizer,
        deepspeed=deepspeed,
        notices=(
            *ds.notices,
            *precision_notices,
            *vocab_notices,
            *batch_notices,
            *warmup_notices,
            *schedule_notices,
            *optimizer_notices,
            *deepspeed_notices,
            *diagnostics_notices,
            *_interval_notices(config),
            *parallel_notices(config, ranks_per_node or world_size),
        ),
        documented_by_preset=loaded.documented_by_preset,
        diagnostics=diagnostics,
    )


def memory_case(
    config: RunConfig,
    ds: DeepSpeedConfig,
    shape: ModelConfig,
    topology: Topology,
    precision: Precision,
    device: DeviceFacts,
    batch: BatchPlan,
) -> MemoryCase:
    """The run as the memory estimate sees it."""
    settings = ds.settings
    return MemoryCase(
        shape=shape,
        sequence_length=config.data.sequence_length,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        precision=precision,
        gradient_precision=settings.data_types.grad_accum_dtype or ("fp16" if precision == "fp16" else "fp32"),
        communication_precision=settings.communication_data_type or ("fp16" if precision == "fp16" else "fp32"),
        zero=settings.zero_optimization,
        topology=topology,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        checkpoint_activations_every=config.train.checkpoint_activations_every,
        embedding_weight_decay=config.train.embedding_weight_decay,
        document_mask=config.data.document_mask,
        one_memory=device.kind == "cpu",
        checkpoint_copy=config.checkpoint.asynchronous,
        sequence_parallel=config.parallel.sequence,
    )


def expected_vocab_size(config: RunConfig, of_tokenizer: int | None) -> int | None:
    """The vocabulary that a run will have, as far as it is known before there is a tokenizer."""
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
        notices = [f"vocabulary not known yet: {UNKNOWN_VOCAB_SIZE:,} entries are assumed"]
    return build_model_config(config.model, expected or UNKNOWN_VOCAB_SIZE, config.data.sequence_length), notices


def _optimizer(ds: DeepSpeedConfig) -> tuple[OptimizerFacts, list[str]]:
    section = ds.settings.optimizer
    if section is None:
        facts = OptimizerFacts("adamw", (0.9, 0.95), 1e-8, 0.1)
        return facts, [f"{ds.path} states no optimizer: AdamW, betas 0.9 and 0.95, eps 1e-8, weight_decay 0.1"]
    params = section.params
    # DeepSpeed's "Adam" is AdamW too, unless adam_w_mode is false.
    adamw = section.type.lower() == "adamw" or params.adam_w_mode
    notices = [
        f"{ds.path} states no optimizer.params.{name}: {value}"
        for name, value in (("betas", params.betas), ("eps", params.eps), ("weight_decay", params.weight_decay))
        if f"optimizer.params.{name}" not in ds.stated
    ]
    return OptimizerFacts("adamw" if adamw else "adam", params.betas, params.eps, params.weight_decay), notices


def _deepspeed_dict(ds: DeepSpeedConfig, batch: BatchPlan, precision: Precision) -> tuple[dict[str, Any], list[str]]:
    stated = ds.stated_dict()
    notices = []
    clipping = ds.settings.gradient_clipping
    if clipping is None:
        clipping = 1.0
        notices.append(f"{ds.path} states no gradient_clipping: 1.0, DeepSpeed's default; state 0 for none")
    resolved = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": clipping,
        "steps_per_print": _NEVER,
        **{key: value for key, value in stated.items() if key not in (*_NOT_PASSED_ON, *_MADE_EXPLICIT)},
        "fp16": {**stated.get("fp16", {}), "enabled": precision == "fp16"},
        "bf16": {**stated.get("bf16", {}), "enabled": precision == "bf16"},
        "zero_optimization": {"stage": 0, **stated.get("zero_optimization", {})},
    }
    if precision == "bf16":
        # DeepSpeed would add up and send gradients in bf16, which loses what accumulation adds.
        resolved["data_types"] = {"grad_accum_dtype": "fp32", **stated.get("data_types", {})}
        resolved.setdefault("communication_data_type", "fp32")
        low = [
            f"{name} is {value}, lower than fp32: accumulated gradients lose low bits"
            for name, value in (
                ("data_types.grad_accum_dtype", resolved["data_types"]["grad_accum_dtype"]),
                ("communication_data_type", resolved["communication_data_type"]),
            )
            if value != "fp32"
        ]
        notices += low
    return resolved, notices


_NOT_PASSED_ON = ("optimizer", "flops_profiler", "comms_logger", "timers")  # megalm serves them itself
_MADE_EXPLICIT = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def _interval_notices(config: RunConfig) -> list[str]:
    steps = config.train.steps
    return [
        f"{name}.interval_steps={interval} is more than train.steps={steps}: only at the end"
        for name, interval in (
            ("evaluate", config.evaluate.interval_steps),
            ("sample", config.sample.interval_steps),
            ("checkpoint", config.checkpoint.interval_steps),
        )
        if interval is not None and interval > steps
    ]
