"""The peak speeds of GPUs by their data sheets, for dense matrix products: no torch."""

from __future__ import annotations

import re

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

# Model name, FLOP/s of bf16 and fp16 with fp32 sums, and of fp32 without TF32; NVIDIA's data sheets, without sparsity.
# A name matches whole, because a laptop, PCIe or NVL card of a similar name has other speeds.
_DATA_SHEETS: tuple[tuple[str, float, float], ...] = (
    ("H200 NVL", 835.5e12, 60e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835.5e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 4090", 165.2e12, 82.6e12),
)
# These suffixes, form factor and memory, do not change the speed.
_SAME_CHIP = r"(-?(SXM\d?|PCIE|\d+GB|HBM\w*)| )*$"


def data_sheet_peak(device_name: str, low_precision: bool) -> tuple[float, str] | None:
    """FLOP/s and source for a device as CUDA names it, "NVIDIA A100-SXM4-80GB"; None where the table has none."""
    for name, low, full in _DATA_SHEETS:
        if re.search(rf"\b{name}{_SAME_CHIP}", device_name, re.IGNORECASE):
            return (low if low_precision else full), f"data sheet of {name}"
    return None


# Memory in GiB, and whether the chip has bf16; "A100-40GB" is the same chip with another memory.
_GPUS: dict[str, tuple[float, bool]] = {
    "H200": (141, True),
    "H100": (80, True),
    "A100": (80, True),
    "A40": (48, True),
    "A10": (24, True),
    "L40S": (48, True),
    "L4": (24, True),
    "RTX 5090": (32, True),
    "RTX 4090": (24, True),
    "RTX 3090": (24, True),
    "V100": (32, False),
    "T4": (16, False),
}
# Of capability 8.9 and later.
_FLOAT8 = ("H200", "H100", "L40S", "L4", "RTX 5090", "RTX 4090")
_GIB = 2**30


def gpu_by_name(name: str) -> DeviceFacts:
    """The device of a rank by the name of its GPU: "A100", "a100-40gb", "RTX 4090".

    Raises:
        ConfigError: the table has no such GPU; the message lists all.
    """
    sized = re.fullmatch(r"(.+?)[\s_-]+(\d+)\s*GI?B", name.strip(), re.IGNORECASE)
    stem, memory = (sized[1], sized[2]) if sized else (name, "")
    chip = re.sub(r"[\s_-]", "", stem).upper()
    known = {key.replace(" ", "").upper(): key for key in _GPUS}
    if chip not in known:
        raise ConfigError(f"--gpu {name}: no such GPU{did_you_mean(chip, known)}; known: {', '.join(_GPUS)}")
    size, bf16 = _GPUS[known[chip]]
    full_name = f"{known[chip]}-{memory}GB" if memory else known[chip]
    capacity = int(float(memory or size) * _GIB)
    float8 = known[chip] in _FLOAT8
    return DeviceFacts(kind="cuda", bf16=bf16, memory_bytes=capacity, name=full_name, float8=float8)
