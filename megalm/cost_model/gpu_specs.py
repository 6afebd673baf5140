"""The peak speeds of GPUs by their data sheets, for dense matrix products: no torch."""

from __future__ import annotations

import re

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
