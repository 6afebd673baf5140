"""The sections of a DeepSpeed JSON that megalm supports, typed, with the names and meanings of DeepSpeed 0.19.8.

The defaults are DeepSpeed's. A key that the JSON leaves out is not passed to DeepSpeed either, except for those that
planning/resolve.py makes explicit.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from megalm.config.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability

Auto = Literal["auto"]
Switch = bool | Auto
Precision = Literal["fp32", "bf16", "fp16"]


class DeepSpeedSection(BaseModel):
    """Base of all sections: frozen, unknown keys are errors, a field goes by its name or DeepSpeed's alias."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
    )


AdjustRate = Literal["original", "match_rms_adamw"]


class OptimizerParams(DeepSpeedSection):
    """Of Adam and AdamW, and of Muon with its AdamW: DeepSpeed's names, and those of torch.optim.Muon."""

    lr: PositiveFloat | None = None
    muon_lr: PositiveFloat | None = Field(default=None, description="of Muon's matrices; null: lr")
    adam_lr: PositiveFloat | None = Field(default=None, description="of Muon's other parameters; null: lr")
    momentum: Probability = 0.95
    nesterov: bool = True
    ns_steps: PositiveInt = Field(default=5, le=50)
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    adjust_lr_fn: AdjustRate = "original"
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    torch_adam: bool = False
    adam_w_mode: bool = True


MUON_PARAMS = ("muon_lr", "adam_lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn")


class OptimizerSection(DeepSpeedSection):
    type: str
    params: OptimizerParams = OptimizerParams()

    @property
    def is_muon(self) -> bool:
        return self.type.lower() == "muon"


class Fp16Section(DeepSpeedSection):
    enabled: Switch = False
    loss_scale: NonNegativeFloat = Field(default=0.0, description="0: dynamic")
    initial_scale_power: NonNegativeInt = 16
    loss_scale_window: PositiveInt = 1000
    hysteresis: NonNegativeInt = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: NonNegativeInt = 1


class Bf16Section(DeepSpeedSection):
    enabled: Switch = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True


class DataTypesSection(DeepSpeedSection):
    grad_accum_dtype: Precision | None = None


OffloadDevice = Literal["none", "cpu", "nvme"]


class OffloadParamSection(DeepSpeedSection):
    device: OffloadDevice = "none"
    nvme_path: str | None = None
    buffer_count: PositiveInt = 5
    buffer_size: PositiveInt = 100_000_000
    max_in_cpu: NonNegativeInt = 1_000_000_000
    pin_memory: bool = True


class OffloadOptimizerSection(DeepSpeedSection):
    device: OffloadDevice = "none"
    nvme_path: str | None = None
    buffer_count: PositiveInt = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False


class ZeroSection(DeepSpeedSection):
    """Every `stage3_` field also goes by its name without the prefix, as in DeepSpeed."""

    stage: Literal[0, 1, 2, 3] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: PositiveInt = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: PositiveInt = 500_000_000
    overlap_comm: bool | None = Field(default=None, description="null: only in stage 3")
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    load_from_fp32_weights: bool = True
    sub_group_size: NonNegativeInt = Field(default=1_000_000_000, description="0: each parameter by itself")
    offload_param: OffloadParamSection | None = None
    offload_optimizer: OffloadOptimizerSection | None = None
    prefetch_bucket_size: NonNegativeInt = Field(default=50_000_000, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: NonNegativeInt = Field(default=100_000, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: NonNegativeInt = Field(default=2**63 - 1, alias="stage3_model_persistence_threshold")
    max_live_parameters: NonNegativeInt = Field(default=1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: NonNegativeInt = Field(default=1_000_000_000, alias="stage3_max_reuse_distance")
    module_granularity_threshold: NonNegativeInt = Field(default=0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: bool = Field(default=False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: bool = Field(default=False, alias="stage3_allgather_sequential")
    zero_hpz_partition_size: NonNegativeInt = Field(
        default=1, description="ranks that share a second copy of the weights; 0 and 1: there is none"
    )
    memory_efficient_linear: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False

    @property
    def optimizer_device(self) -> OffloadDevice:
        """Where the optimizer's states lie; none: beside the weights."""
        return "none" if self.offload_optimizer is None else self.offload_optimizer.device

    @property
    def parameter_device(self) -> OffloadDevice:
        """Where the weights lie; none: on the device that computes."""
        return "none" if self.offload_param is None else self.offload_param.device

    @property
    def secondary_ranks(self) -> int:
        """Ranks that share a second copy of the weights (hpZ of ZeRO++); 0: there is none."""
        return self.zero_hpz_partition_size if self.zero_hpz_partition_size > 1 else 0


class AioSection(DeepSpeedSection):
    block_size: PositiveInt = 1_048_576
    queue_depth: PositiveInt = 8
    intra_op_parallelism: PositiveInt = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class FlopsProfilerSection(DeepSpeedSection):
    """Served by megalm's own profile of a step; never given to DeepSpeed."""

    enabled: bool = False
    recompute_fwd_factor: NonNegativeFloat = 0.0
    profile_step: NonNegativeInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLoggerSection(DeepSpeedSection):
    """Served by megalm's own counter of traffic; never given to DeepSpeed."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    debug: bool = False
    prof_ops: tuple[str, ...] = ()


class ThroughputTimerSection(DeepSpeedSection):
    """Off unless the JSON has `enabled: true`: the rate of every step is in metrics.jsonl."""

    enabled: bool = True
    synchronized: bool = True


class TimersSection(DeepSpeedSection):
    throughput: ThroughputTimerSection = ThroughputTimerSection()


class DeepSpeedSettings(DeepSpeedSection):
    """The contents of the JSON, which `read_deepspeed_json` of json_reader.py reads."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | Auto | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: NonNegativeFloat | None = Field(default=None, description="0: off")
    optimizer: OptimizerSection | None = None
    fp16: Fp16Section = Fp16Section()
    bf16: Bf16Section = Bf16Section()
    data_types: DataTypesSection = DataTypesSection()
    communication_data_type: Precision | None = None
    zero_optimization: ZeroSection = ZeroSection()
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    aio: AioSection | None = None
    steps_per_print: PositiveInt | None = None
    flops_profiler: FlopsProfilerSection = FlopsProfilerSection()
    comms_logger: CommsLoggerSection = CommsLoggerSection()
    timers: TimersSection = TimersSection()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False

    @property
    def uses_muon(self) -> bool:
        return self.optimizer is not None and self.optimizer.is_muon

    @property
    def peak_learning_rate(self) -> tuple[str, float] | None:
        """Key and value of the schedule's peak rate; None: the run configuration has it."""
        params = OptimizerParams() if self.optimizer is None else self.optimizer.params
        both = params.muon_lr is not None and params.adam_lr is not None
        name, rate = ("muon_lr", params.muon_lr) if both else ("lr", params.lr)
        return None if rate is None else (f"optimizer.params.{name}", rate)
