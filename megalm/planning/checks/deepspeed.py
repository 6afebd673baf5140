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
            f"plan for a GPU with --gpu NAME, or set {ALLOW_CPU_FP16}=1 for a test"
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


def nvme_needs_stage_3_and_path(case: CheckContext) -> None:
    offload = case.zero.offload_optimizer
    if offload is None or offload.device != "nvme":
        return
    if case.zero.stage != 3:
        raise ConfigError(
            f"{case.ds.path}: offload_optimizer.device=nvme needs zero_optimization.stage 3, and the stage is "
            f"{case.zero.stage}; use cpu"
        )
    if offload.nvme_path is None:
        raise ConfigError(
            f"{case.ds.path}: offload_optimizer.device=nvme needs offload_optimizer.nvme_path, a folder on that disk"
        )


def gds_needs_a_gpu(case: CheckContext) -> None:
    if case.settings.aio is not None and case.settings.aio.use_gds and case.device.kind == "cpu":
        raise ConfigError(f"{case.ds.path}: aio.use_gds=true needs a GPU, and this device is a CPU; remove it")


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
    accumulation_precision,
    communication_precision,
    nvme_needs_stage_3_and_path,
    gds_needs_a_gpu,
    buckets_are_even,
    nvme_keeps_optimizer_states_only,
)
