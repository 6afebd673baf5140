"""Resolve a run for its ranks and its device: check it, and make every "auto" and every default explicit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, choose_precision
from megalm.config.deepspeed.json_schema import AdjustRate, Precision
from megalm.config.loading import DEFAULT_PRESET, LoadedConfig, config_to_yaml, value_of
from megalm.config.schema import DataSection, DocumentedSection, Recompute, RunConfig, ScheduleSection
from megalm.config.validation import shown
from megalm.cost_model.memory import MemoryCase
from megalm.cost_model.pipeline_balance import LARGE_BUBBLE, micro_batches_for
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.parameter_groups import Algorithm, RateScales
from megalm.parallel.pipeline_schedules import PipelineSchedule
from megalm.planning.batch_size import BatchPlan, RunBatch, TrainingStages, chooses_micro_batch, plan_batch
from megalm.planning.diagnostics import MEASURING_SECTIONS, Diagnostics, wanted_diagnostics
from megalm.planning.engine_checks import engine_notices, runs_compiled
from megalm.planning.lr_schedule import ENDLESS, ScheduleFacts, learning_rate
from megalm.planning.memory_fit import RunMemory, memory_notices
from megalm.planning.parallel_checks import grid_notices
from megalm.planning.run_checks import check_run, has_grid, length_notices, with_steps
from megalm.topology import Topology

__all__ = ["BatchPlan", "DeviceFacts", "ResolvedRun", "resolve"]

UNKNOWN_VOCAB_SIZE = 50_304  # GPT-2's, padded
_BYTES_VOCAB_SIZE = 257
_NEVER = 10**9  # steps_per_print: DeepSpeed's own lines would interrupt megalm's


# Products of fewer tokens leave parts of a GPU idle: with 2,048, a layer that holds 4,096 features has 256 tiles of
# 128 x 256, two for each processor. Of four chunks one is not hidden.
_CHUNK_TOKENS = 2048
_MOST_CHUNKS = 4


@dataclass(frozen=True)
class MuonFacts:
    """Muon's settings; names as in torch.optim.Muon."""

    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    adjust_lr_fn: AdjustRate

    def __str__(self) -> str:
        nesterov = ", nesterov" if self.nesterov else ""
        return f"muon, momentum {self.momentum:g}{nesterov}, {self.ns_steps} steps, rate by shape: {self.adjust_lr_fn}"


@dataclass(frozen=True)
class OptimizerFacts:
    """Adam's settings, for all parameters or those that are not Muon's.

    Attributes:
        kind: "adam" adds weight decay to the gradient, "adamw" subtracts it from the weight; "muon" is AdamW beside it.
        rates: algorithm -> its peak learning rate, where it is not the schedule's.
    """

    kind: Literal["adamw", "adam", "muon"]
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    muon: MuonFacts | None = None
    rates: tuple[tuple[Algorithm, float], ...] = ()

    def rate_scales(self, peak: float, width_multiplier: float = 1.0) -> RateScales:
        """Return for each algorithm, and for hidden matrices, the factor of the learning rate to the schedule's.

        Args:
            peak: of the schedule.
            width_multiplier: m of the maximal-update parametrisation. An update of Adam has elements of one size, so
                its product with a layer's input grows with the width. An orthogonal matrix of Muon keeps lengths;
                `match_rms_adamw` multiplies it by the root of the width.
        """
        own: dict[Algorithm, float] = dict(self.rates)
        hidden: dict[Algorithm, float] = {"adam": 1 / width_multiplier, "muon": 1.0}
        if self.muon is not None and self.muon.adjust_lr_fn == "match_rms_adamw":
            hidden["muon"] = 1 / math.sqrt(width_multiplier)
        plain = {algorithm: own.get(algorithm, peak) / peak for algorithm in hidden}
        return {
            **{(algorithm, False): scale for algorithm, scale in plain.items()},
            **{(algorithm, True): scale * hidden[algorithm] for algorithm, scale in plain.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """Return it as a section of a DeepSpeed JSON; learning rates without their own are the schedule's."""
        kind = {"adamw": "AdamW", "adam": "Adam", "muon": "Muon"}[self.kind]
        parameters: dict[str, Any] = {
            "betas": list(self.betas),
            "eps": self.epsilon,
            "weight_decay": self.weight_decay,
        }
        if self.muon is not None:
            parameters |= asdict(self.muon) | {"ns_coefficients": list(self.muon.ns_coefficients)}
        return {"type": kind, "params": parameters | {f"{algorithm}_lr": rate for algorithm, rate in self.rates}}

    def __str__(self) -> str:
        return (
            f"{'adamw' if self.kind == 'muon' else self.kind}, betas {self.betas[0]:g} and {self.betas[1]:g}, "
            f"eps {self.epsilon:g}, weight decay {self.weight_decay:g}"
        )


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
    zero_stage: int
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

    def memory_case(self, shape: ModelConfig) -> MemoryCase:
        """The facts that the memory estimate of the largest batch needs."""
        memory = RunMemory(self.config, self.deepspeed_source, shape, self.topology, self.precision, self.device)
        return memory.case(self.batch, self.whole_gradients, self.recompute)


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
    case = check_run(loaded, ds, world_size, device, data_needed)
    config, train, topology = case.config, case.config.train, case.topology
    precision, precision_notices = choose_precision(ds.settings, device)
    shape, vocab_notices = _shape(config, vocab_size)
    memory = RunMemory(config, ds, shape, topology, precision, device)
    recompute: Recompute = "none" if train.recompute == "auto" else train.recompute

    def fits(batch: BatchPlan) -> bool:
        # Of a pipeline with few large micro-batches the stages wait for each other.
        is_coarse = topology.pipeline > 1 and batch.micro_batch > 1
        if is_coarse and pipeline_schedule(config, topology, batch).bubble_share > LARGE_BUBBLE:
            return False
        return memory.fit(batch, train.reduce_gradients == "step", recompute).leaves_room

    first_batch, batch_notices = plan_batch(ds.settings, topology, ds.path, fits, RunBatch.of(case.loaded, ds))
    stages = TrainingStages.of(config, first_batch.global_batch)
    batch = first_batch.of(stages.largest_batch)
    if topology.pipeline > 1 and chooses_micro_batch(ds.settings):
        batch_notices.append(_bubble_notice(topology, batch, pipeline_schedule(config, topology, batch)))
    whole_gradients, reduction_notices = memory.reduction(batch, recompute)
    recompute_notices = []
    if train.recompute == "auto":
        recompute, notice = memory.least_recomputation(batch, whole_gradients)
        recompute_notices = [notice]
    loaded, steps_notices = with_steps(case, stages, shape.parameter_count())
    loaded, warmup_notices = _fit_warmup(loaded)
    config = loaded.config
    schedule, schedule_notices = schedule_facts(loaded, ds)
    optimizer, optimizer_notices = optimizer_facts(ds)
    deepspeed, deepspeed_notices = _deepspeed_dict(ds, first_batch, precision, memory.gathered_sizes())
    diagnostics, diagnostics_notices = Diagnostics(), list[str]()
    if _measures(config, ds):
        diagnostics, diagnostics_notices = wanted_diagnostics(config, ds)
    notices_of_grid: Iterator[str] = iter(())
    if has_grid(case):
        notices_of_grid = grid_notices(config.parallel, case.zero.secondary_ranks, ranks_per_node or world_size)
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
        zero_stage=case.zero.stage,
        schedule=schedule,
        optimizer=optimizer,
        deepspeed=deepspeed,
        whole_gradients=whole_gradients,
        recompute=recompute,
        notices=(
            *ds.notices,
            *_preset_notices(loaded, ds),
            *precision_notices,
            *vocab_notices,
            *batch_notices,
            *reduction_notices,
            *recompute_notices,
            *memory_notices(memory.fit(batch, whole_gradients, recompute)),
            *steps_notices,
            *warmup_notices,
            *schedule_notices,
            *optimizer_notices,
            *deepspeed_notices,
            *diagnostics_notices,
            *engine_notices(config, device, shape),
            *length_notices(config),
            *notices_of_grid,
        ),
        documented_by_preset=loaded.documented_by_preset,
        diagnostics=diagnostics,
    )


def _measures(config: RunConfig, ds: DeepSpeedConfig) -> bool:
    own = config.profile.steps is not None or config.train.count_traffic
    return own or not MEASURING_SECTIONS.isdisjoint(key.partition(".")[0] for key in ds.explicit_keys)


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


def optimizer_facts(ds: DeepSpeedConfig) -> tuple[OptimizerFacts, list[str]]:
    """Return the optimizer of a JSON, and a notice for each default that a person may not expect."""
    section = ds.settings.optimizer
    if section is None:
        facts = OptimizerFacts("adamw", (0.9, 0.95), 1e-8, 0.1)
        return facts, [f"{ds.path} has no optimizer: AdamW, betas 0.9 and 0.95, eps 1e-8, weight_decay 0.1"]
    params = section.params
    if section.is_muon:  # DeepSpeed has other defaults for the Adam beside Muon
        defaults = {"betas": (0.9, 0.95), "eps": 1e-10}
        own = {name: it for name, it in defaults.items() if f"optimizer.params.{name}" not in ds.explicit_keys}
        params = params.model_copy(update=own)
    notices = [
        f"{ds.path} has no optimizer.params.{name}: {value}"
        for name, value in (("betas", params.betas), ("eps", params.eps), ("weight_decay", params.weight_decay))
        if f"optimizer.params.{name}" not in ds.explicit_keys
    ]
    adam = params.betas, params.eps, params.weight_decay
    if not section.is_muon:
        # DeepSpeed's "Adam" is AdamW too, unless adam_w_mode is false.
        adamw = section.type.lower() == "adamw" or params.adam_w_mode
        return OptimizerFacts("adamw" if adamw else "adam", *adam), notices
    muon = MuonFacts(params.momentum, params.nesterov, params.ns_coefficients, params.ns_steps, params.adjust_lr_fn)
    rates: tuple[tuple[Algorithm, float | None], ...] = (("muon", params.muon_lr), ("adam", params.adam_lr))
    given = tuple((algorithm, rate) for algorithm, rate in rates if rate is not None)
    return OptimizerFacts("muon", *adam, muon, given), notices


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
