"""What data sheets say of GPUs: dense matrix products, no sparsity. No torch."""

from __future__ import annotations

import re

# FLOP/s by NVIDIA's data sheets, without sparsity: bf16 and fp16 summed in fp32; then fp32, for which TF32 is off.
# Last the memory in GiB: what is sold as 80 GB has nearly 80 GiB. Of an A100, the smaller of the two.
# A whole model name each: a laptop's, a PCIe or an NVL card of the same name is another device.
_DATA_SHEETS: tuple[tuple[str, float, float, int], ...] = (
    ("H200 NVL", 835.5e12, 60e12, 140),
    ("H200", 989e12, 67e12, 140),
    ("H100 PCIe", 756e12, 51e12, 79),
    ("H100 NVL", 835.5e12, 60e12, 93),
    ("H100", 989e12, 67e12, 79),
    ("A100", 312e12, 19.5e12, 39),
    ("RTX 5090", 209.5e12, 104.8e12, 31),
    ("RTX 4090", 165.2e12, 82.6e12, 23),
)
KNOWN_GPUS = tuple(row[0] for row in _DATA_SHEETS)
# What may follow the name: form factor and memory of the same chip at the same speed.
_SAME_CHIP = r"(-?(SXM\d?|PCIE|\d+GB|HBM\w*)| )*$"


def data_sheet_peak(device_name: str, low_precision: bool) -> tuple[float, str] | None:
    """FLOP/s and source for a device as CUDA names it, "NVIDIA A100-SXM4-80GB"; None where the table has none."""
    row = _row(device_name)
    if row is None:
        return None
    name, low, full, _ = row
    return (low if low_precision else full), f"data sheet of {name}"


def data_sheet_memory(device_name: str) -> int | None:
    """Bytes of memory, by the size in the name ("A100-SXM4-80GB") or the data sheet; None where the table has none."""
    row = _row(device_name)
    if row is None:
        return None
    size = re.search(r"(\d+)GB", device_name, re.IGNORECASE)
    return (int(size[1]) - 1 if size else row[3]) * 2**30


def _row(device_name: str) -> tuple[str, float, float, int] | None:
    return next(
        (row for row in _DATA_SHEETS if re.search(rf"\b{row[0]}{_SAME_CHIP}", device_name, re.IGNORECASE)), None
    )
