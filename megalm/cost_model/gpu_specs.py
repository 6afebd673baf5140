"""GPUs by their data sheets: the peak speeds of dense matrix products, memory, capability. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean


@dataclass(frozen=True)
class _Gpu:
    """A GPU, or one of its forms that has other speeds.

    Attributes:
        name: as CUDA names it, without the maker and without what `_SAME_CHIP` has.
        low, full: peak TFLOP/s without sparsity: of bf16 and fp16 with fp32 sums, and of fp32 without TF32.
        float8: of float8 with fp32 sums; None where the chip has no such products.
        memory_gib: of the usual card; the data sheets' GB, which are close to what CUDA reports in GiB.
        capability: compute capability of the chip, major and minor.
        inline_ecc: ECC, on by default, keeps its bits in the memory itself (GDDR6), a sixteenth of it.
    """

    name: str
    low: float
    full: float
    memory_gib: float
    capability: tuple[int, int]
    float8: float | None = None
    inline_ecc: bool = False


# Compute capabilities from which on a chip computes in these types.
BF16_CAPABILITY, FLOAT8_CAPABILITY = (8, 0), (8, 9)

# By NVIDIA's data sheets; half of a number with sparsity. GeForce and RTX cards by the white papers of their
# architectures (Ampere GA102, Ada, Blackwell), "with FP32 accumulate", float8 included. B200 and B300: an eighth of an
# HGX board; GB200 and GB300: a 72nd of an NVL72 rack. A800 and H800 differ from A100 and H100 in NVLink and fp64 only.
_GPUS = (
    _Gpu("GB300", 2500, 80, 278, (10, 3), 5000),
    _Gpu("B300", 2250, 75, 268, (10, 3), 4500),
    _Gpu("GB200", 2500, 80, 186, (10, 0), 5000),
    _Gpu("B200", 2250, 75, 180, (10, 0), 4500),
    _Gpu("GH200", 989, 67, 96, (9, 0), 1979),
    _Gpu("H200 NVL", 835.5, 60, 141, (9, 0), 1670.5),
    _Gpu("H200", 989, 67, 141, (9, 0), 1979),
    _Gpu("H100 PCIe", 756, 51, 80, (9, 0), 1513),
    _Gpu("H100 NVL", 835.5, 60, 94, (9, 0), 1670.5),
    _Gpu("H100", 989, 67, 80, (9, 0), 1979),
    _Gpu("H800 PCIe", 756, 51, 80, (9, 0), 1513),
    _Gpu("H800", 989, 67, 80, (9, 0), 1979),
    _Gpu("H20", 148, 44, 96, (9, 0), 296),
    _Gpu("A100", 312, 19.5, 80, (8, 0)),
    _Gpu("A800", 312, 19.5, 80, (8, 0)),
    _Gpu("L40S", 362, 91.6, 48, (8, 9), 733, inline_ecc=True),
    _Gpu("L40", 181, 90.5, 48, (8, 9), 362, inline_ecc=True),
    _Gpu("L4", 121, 30.3, 24, (8, 9), 242.5, inline_ecc=True),
    _Gpu("A40", 149.7, 37.4, 48, (8, 6), inline_ecc=True),
    _Gpu("A10", 125, 31.2, 24, (8, 6), inline_ecc=True),
    _Gpu("RTX PRO 6000", 503.8, 126, 96, (12, 0), 1007.6),
    _Gpu("RTX 6000 Ada", 364.2, 91.1, 48, (8, 9), 728.5),
    _Gpu("RTX A6000", 154.8, 38.7, 48, (8, 6)),
    _Gpu("RTX 5090", 209.5, 104.8, 32, (12, 0), 419),
    _Gpu("RTX 4090", 165.2, 82.6, 24, (8, 9), 330.3),
    _Gpu("RTX 3090", 71, 35.6, 24, (8, 6)),
    _Gpu("V100 PCIe", 112, 14, 32, (7, 0)),
    _Gpu("V100", 125, 15.7, 32, (7, 0)),
    _Gpu("T4", 65, 8.1, 16, (7, 5), inline_ecc=True),
)
# A name matches whole, because a laptop or another card of a similar name has other speeds. These suffixes,
# form factor, memory and the fullest edition, do not change the speed; GH200 has the memory of its CPU there.
_SAME_CHIP = r"(-?(SXM\d?( AC)?|PCIE|\d+GB?|HBM\w*|Generation|Blackwell Workstation Edition)| )*$"
_GIB = 2**30
_BESIDE_ECC = 15 / 16


def data_sheet_peak(device_name: str, low_precision: bool, float8_share: float = 0.0) -> tuple[float, str] | None:
    """FLOP/s and source for a device as CUDA names it, "NVIDIA A100-SXM4-80GB"; None where the table has none.

    Args:
        float8_share: of all operations; the peak is then that of both kinds one after the other.
    """
    gpu = _known(device_name)
    if gpu is None:
        return None
    peak, source = (gpu.low if low_precision else gpu.full) * 1e12, f"data sheet of {gpu.name}"
    if not float8_share or gpu.float8 is None:
        return peak, source
    seconds = float8_share / (gpu.float8 * 1e12) + (1 - float8_share) / peak
    return 1 / seconds, f"{source}, {float8_share:.0%} of the operations in float8"


def compute_capability(device_name: str) -> tuple[int, int] | None:
    """CUDA's major and minor number of a device as CUDA names it; None where the table has none."""
    gpu = _known(device_name)
    return None if gpu is None else gpu.capability


def _known(device_name: str) -> _Gpu | None:
    for gpu in _GPUS:
        name = gpu.name.replace(" ", "[ -]")
        if re.search(rf"\b{name}{_SAME_CHIP}", device_name, re.IGNORECASE):
            return gpu
    return None


def known_gpus() -> tuple[str, ...]:
    return tuple(gpu.name for gpu in _GPUS)


def gpu_by_name(name: str) -> DeviceFacts:
    """The device of a rank by the name of its GPU: "A100", "a100-40gb", "RTX 4090", "A6000", "pro-6000".

    Raises:
        ConfigError: the table has no such GPU; the message lists all.
    """
    known = {_plain(gpu.name): gpu for gpu in _GPUS}
    sized = re.fullmatch(r"(.+?)[\s_-]+(\d+)\s*GI?B?", name.strip(), re.IGNORECASE)
    stem, memory = (sized[1], sized[2]) if sized else (name, "")
    chip = _plain(stem)
    gpu = known.get(chip) or known.get(f"RTX{chip}")
    if gpu is None:
        raise ConfigError(f"--gpu {name}: no such GPU{did_you_mean(chip, known)}; known: {', '.join(known_gpus())}")
    if gpu.name == "GH200" and memory == "480":
        memory = ""  # as CUDA names it: 480 GB of the CPU's memory
    full_name = f"{gpu.name}-{memory}GB" if memory else gpu.name
    bf16, float8 = gpu.capability >= BF16_CAPABILITY, gpu.capability >= FLOAT8_CAPABILITY
    capacity = int(float(memory or gpu.memory_gib) * _GIB * (_BESIDE_ECC if gpu.inline_ecc else 1.0))
    return DeviceFacts("cuda", bf16, capacity, name=full_name, float8=float8)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|tesla", "", name, flags=re.IGNORECASE).upper()
