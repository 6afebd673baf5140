"""The peak that MFU counts against: by the device's whole name, else measured."""

from __future__ import annotations

import pytest
import torch

from megalm.cost_model.gpu_specs import compute_capability, data_sheet_peak, gpu_by_name, known_gpus
from megalm.engine.device import peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 149.7),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
    ],
)
def test_known_devices(name: str, tera: float) -> None:
    found = data_sheet_peak(name, low_precision=True)
    assert found is not None
    assert found[0] == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A1000",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA A10G",
        "NVIDIA A40-48Q",
        "NVIDIA L20",
        "Tesla V100S-PCIE-32GB",
    ],
)
def test_other_devices_are_not_taken_for_known_ones(name: str) -> None:
    assert data_sheet_peak(name, low_precision=True) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 1979),
        ("NVIDIA H20", 296),
        ("NVIDIA B200", 4500),
        ("NVIDIA L4", 242.5),
        ("NVIDIA GeForce RTX 4090", 330.3),
        ("NVIDIA A100-SXM4-80GB", 312),  # refused in a run
    ],
)
def test_operations_in_float8_have_their_own_peak(name: str, tera: float) -> None:
    whole, half, none = (data_sheet_peak(name, True, share) for share in (1.0, 0.5, 0.0))
    assert whole
    assert half
    assert none
    assert whole[0] == pytest.approx(tera * 1e12)
    # Half of the operations take half of the time that all would take, of each kind.
    assert 1 / half[0] == pytest.approx(0.5 / whole[0] + 0.5 / none[0])


def test_every_gpu_with_float8_has_its_peak() -> None:
    for name in known_gpus():
        low, rounded = (data_sheet_peak(name, True, share) for share in (0.0, 1.0))
        assert low
        assert rounded
        ratio = rounded[0] / low[0]
        assert ratio == pytest.approx(2, rel=0.02) if gpu_by_name(name).float8 else ratio == 1, name


def test_a_cpu_is_measured() -> None:
    flops, _ = peak_flops(torch.device("cpu"), low_precision=False)
    assert 1e9 < flops < 1e14  # FLOP/s of some cores: neither per millisecond nor of one product


def test_a_gpu_s_capability_says_what_it_computes_in() -> None:
    assert compute_capability("NVIDIA A100-SXM4-40GB") == (8, 0)
    assert compute_capability("NVIDIA L40S") == (8, 9)
    assert compute_capability("NVIDIA GeForce RTX 5090") == (12, 0)
    assert compute_capability("Other") is None
    kinds = {name: gpu_by_name(name) for name in ("V100", "A100", "L4", "H100")}
    assert {name: (it.bf16, it.float8) for name, it in kinds.items()} == {
        "V100": (False, False),
        "A100": (True, False),
        "L4": (True, True),
        "H100": (True, True),
    }


def test_where_ecc_lies_in_the_memory_it_takes_a_sixteenth() -> None:
    """As the driver reports these cards: 46,068 MiB of an L40S, 15,360 of a T4."""
    sizes = {name: gpu_by_name(name).memory_bytes / 2**30 for name in ("L40S", "A40-48GB", "L4", "T4", "A6000", "A100")}
    assert sizes == {"L40S": 45, "A40-48GB": 45, "L4": 22.5, "T4": 15, "A6000": 48, "A100": 80}
