"""Which number format a run computes in, and what a device must tell for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalm.config.deepspeed.json_schema import DeepSpeedSettings

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class DeviceFacts:
    """What one rank computes on.

    Attributes:
        bf16: the device computes in bf16 by itself.
        memory_bytes: memory that this rank may use; on a CPU its share of the machine's.
        host_memory_bytes: of a GPU's rank, its share of the machine's CPU memory; None: unknown.
        name: as CUDA names the GPU; None: unknown.
    """

    kind: Literal["cpu", "cuda"]
    bf16: bool
    memory_bytes: int
    host_memory_bytes: int | None = None
    name: str | None = None


def choose_precision(settings: DeepSpeedSettings, device: DeviceFacts) -> tuple[Precision, list[str]]:
    """The precision that the JSON means on this device, and a notice where "auto" decided it.

    "auto" is bf16 where the device has it, else fp32; fp16 must be asked for, because it needs a loss scale.
    """
    if settings.fp16.enabled is True:
        return "fp16", []
    if settings.bf16.enabled is True:
        emulated = 'bf16.enabled=true: this CPU emulates bf16, many times slower than fp32; "auto" chooses fp32 here'
        return "bf16", [] if device.bf16 else [emulated]
    if "auto" in (settings.bf16.enabled, settings.fp16.enabled):
        if settings.bf16.enabled == "auto" and device.bf16:
            return "bf16", ['bf16.enabled ("auto"): true']
        reason = "this device does not compute in bf16" if not device.bf16 else "fp16 is never chosen by itself"
        return "fp32", [f'precision ("auto"): fp32, {reason}']
    return "fp32", []
