"""Rules within the DeepSpeed JSON and between it and the run configuration; see run_checks.py.

Several of the combinations refused here run in DeepSpeed 0.19.8 without any message and train something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from megalm.errors import ConfigError
from megalm.planning.checks.context import CheckContext

ALLOW_CPU_FP16 = "MEGALM_ALLOW_CPU_FP16"

_STATES_AND_GRADIENT = 4


def one_learning_rate(case: CheckContext) -> None:
    lr = case.settings.optimizer.params.lr if case.settings.optimizer else None
    if lr is not None and "schedule.peak_learning_rate" in case.loaded.stated:
        peak = case.config.schedule.peak_learning_rate
        source = case.loaded.sources["schedule.peak_learning_rate"]
        raise ConfigError(
            f"optimizer.params.lr={lr:g} ({case.ds.path}) and schedule.peak_learning_rate={peak:g} ({source}) "
            "state the same fact; remove one"
        )


def one_low_precision(case: CheckContext) -> None:
    if case.settings.fp16.enabled is True and case.settings.bf16.enabled is True:
        raise ConfigError(f"{case.ds.path}: fp16.enabled and bf16.enabled are both true; keep one")


def device_has_bf16(case: CheckContext) -> None:
    if case.settings.bf16.enabled is True and case.device.kind == "cuda" and not case.device.bf16:
        raise ConfigError(
            f'{case.ds.path}: bf16.enabled=true, but this device does not compute in bf16; use "auto", fp16 or fp32'
        )


def fp16_needs_a_gpu(case: CheckContext) -> None:
    if case.precision == "fp16" and case.device.kind == "cpu" and os.environ.get(ALLOW_CPU_FP16) != "1":
        raise ConfigError(
            f"{case.ds.path}: fp16.enabled=true, but a CPU computes in fp16 a thousand times slower; use bf16 or fp32, "
            f"or set {ALLOW_CPU_FP16}=1 for a test"
        )


def low_precision_needs_zero(case: CheckContext) -> None:
    # DeepSpeed's optimizers for stage 0 take a dummy step at the start: Adam's step counter is 1 before training.
    if case.zero.stage == 0 and case.precision != "fp32":
        raise ConfigError(
            f"{case.ds.path}: zero_optimization.stage=0 with {case.precision} trains wrongly in DeepSpeed 0.19.8; "
            "use stage 1"
        )


def accumulation_precision(case: CheckContext) -> None:
    kept = case.settings.data_types.grad_accum_dtype
    if kept is not None and kept not in (case.precision, "fp32"):
        raise ConfigError(
            f"{case.ds.path}: data_types.grad_accum_dtype={kept} cannot hold gradients of {case.precision}; use fp32"
        )


def communication_precision(case: CheckContext) -> None:
    sent = case.settings.communication_data_type
    if sent is not None and sent not in (case.precision, "fp32"):
        raise ConfigError(
            f"{case.ds.path}: communication_data_type={sent} cannot carry gradients of {case.precision}; use fp32"
        )


def offload_optimizer_needs_zero(case: CheckContext) -> None:
    offload = case.zero.offload_optimizer
    if offload is not None and offload.device != "none" and case.zero.stage == 0:
        raise ConfigError(f"{case.ds.path}: offload_optimizer needs zero_optimization.stage 1, 2 or 3; stage is 0")


def offload_param_needs_stage_3(case: CheckContext) -> None:
    offload = case.zero.offload_param
    if offload is not None and offload.device != "none" and case.zero.stage != 3:
        raise ConfigError(
            f"{case.ds.path}: offload_param needs zero_optimization.stage 3; stage is {case.zero.stage}, "
            "where only offload_optimizer works"
        )


def nvme_needs_stage_3_and_path(case: CheckContext) -> None:
    for name, offload in (
        ("offload_optimizer", case.zero.offload_optimizer),
        ("offload_param", case.zero.offload_param),
    ):
        if offload is None or offload.device != "nvme":
            continue
        if case.zero.stage != 3:
            raise ConfigError(f"{case.ds.path}: {name}.device=nvme needs zero_optimization.stage 3; use cpu")
        if offload.nvme_path is None:
            raise ConfigError(f"{case.ds.path}: {name}.device=nvme needs {name}.nvme_path, a folder on that disk")


def offload_has_its_own_adam(case: CheckContext) -> None:
    offload, optimizer = case.zero.offload_optimizer, case.settings.optimizer
    if offload is not None and offload.device != "none" and optimizer is not None and optimizer.params.torch_adam:
        raise ConfigError(
            f"{case.ds.path}: optimizer.params.torch_adam=true with offload_optimizer; DeepSpeed's CPU Adam is used "
            "there, remove torch_adam"
        )


def adamw_is_adamw(case: CheckContext) -> None:
    optimizer = case.settings.optimizer
    if optimizer is not None and optimizer.type.lower() == "adamw" and not optimizer.params.adam_w_mode:
        raise ConfigError(
            f'{case.ds.path}: optimizer.type "AdamW" with adam_w_mode=false, which DeepSpeed ignores; write type "Adam"'
        )


def buckets_are_even(case: CheckContext) -> None:
    size = case.zero.allgather_bucket_size
    if case.zero.stage in (1, 2) and size % 2:
        raise ConfigError(f"{case.ds.path}: zero_optimization.allgather_bucket_size={size} is odd; use {size + 1}")


def nvme_keeps_optimizer_states_only(case: CheckContext) -> None:
    optimizer, parameters = case.zero.offload_optimizer, case.zero.offload_param
    if parameters is not None and parameters.device == "nvme":
        raise ConfigError(
            f"{case.ds.path}: offload_param.device=nvme is not proven here; use cpu there, and nvme for "
            "offload_optimizer, which is six times as large"
        )
    if optimizer is None or optimizer.device != "nvme":
        return
    for name in ("pipeline_read", "pipeline_write"):
        if getattr(optimizer, name):
            raise ConfigError(f"{case.ds.path}: offload_optimizer.{name}=true is not proven here; remove it")
    if optimizer.buffer_count < _STATES_AND_GRADIENT:
        raise ConfigError(
            f"{case.ds.path}: offload_optimizer.buffer_count={optimizer.buffer_count}; a master, its moments and its "
            f"gradient are read at one time: {_STATES_AND_GRADIENT} or more"
        )
    if case.config.checkpoint.asynchronous:
        raise ConfigError(
            f"checkpoint.async=true writes from a copy in memory of what {case.ds.path} keeps out of it "
            "(offload_optimizer.device=nvme); leave one of them out"
        )


DEEPSPEED_RULES: tuple[Callable[[CheckContext], None], ...] = (
    one_learning_rate,
    one_low_precision,
    device_has_bf16,
    fp16_needs_a_gpu,
    low_precision_needs_zero,
    accumulation_precision,
    communication_precision,
    offload_optimizer_needs_zero,
    offload_param_needs_stage_3,
    nvme_needs_stage_3_and_path,
    offload_has_its_own_adam,
    adamw_is_adamw,
    buckets_are_even,
    nvme_keeps_optimizer_states_only,
)
