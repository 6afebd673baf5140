"""A rank's device: GPUs that do not work, ranks that differ, NUMA nodes. What no CPU has is made up, torch is not."""

from __future__ import annotations

import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from megalm.checkpoint.checkpointer import HostStaging
from megalm.checkpoint.shard_spec import Fragment, FragmentKey
from megalm.config.deepspeed.json_reader import DeviceFacts, named_json, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.engine import device as device_module
from megalm.engine.deepspeed_patches import decompose_tanh, use_expandable_segments
from megalm.engine.device import (
    DeviceReport,
    claim_device,
    cores_next_to,
    device_facts,
    make_deterministic,
    open_device,
    pin_batch,
    speed_up_fp32_products,
)
from megalm.engine.distributed import agree_on_device
from megalm.errors import ConfigError
from megalm.model.attention_kernels import _compiled_flex_attention, flex_blocks
from megalm.planning.resolve import resolve
from megalm.rank_environment import RankFacts, sign_of_gpus
from megalm.train import setup
from tests.messages import assert_names

ONE = RankFacts(0, 1, 0, 1, threads=1)
GIB = 2**30
A100 = DeviceFacts("cuda", True, 80 * GIB, 128 * GIB, "NVIDIA A100-SXM4-80GB")
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update it."


@pytest.fixture
def gpu_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with a GPU too


@pytest.mark.parametrize(
    ("environment", "devices", "sign"),
    [
        ({}, [], None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [], "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, [], "CUDA_VISIBLE_DEVICES=GPU-8932f937"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, [], None),  # deepspeed --num_gpus 2 on a CPU
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, ["nvidia0"], "nvidia0"),
        ({"SLURM_GPUS_ON_NODE": "2"}, [], "SLURM_GPUS_ON_NODE=2"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_ID": "1"}, ["nvidia0"], None),  # a job without GPUs on a node with some
        ({}, ["nvidia1", "nvidia0", "nvidiactl"], "nvidia0"),
        ({}, ["nvidiactl"], None),
        ({"DS_ACCELERATOR": "cpu", "SLURM_GPUS_ON_NODE": "2"}, ["nvidia0"], None),
        ({"DS_ACCELERATOR": "cuda"}, [], "DS_ACCELERATOR=cuda"),
    ],
)
def test_what_says_that_a_job_is_for_gpus(
    environment: dict[str, str], devices: list[str], sign: str | None, tmp_path: Path
) -> None:
    for name in devices:
        (tmp_path / name).touch()
    expected = str(tmp_path / sign) if sign in devices else sign
    assert sign_of_gpus(environment, tmp_path) == expected


def test_a_cpu_build_of_torch_on_a_gpu_node(gpu_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError) as caught:
        claim_device(ONE)
    assert_names(caught.value, socket.gethostname(), "SLURM_GPUS_ON_NODE=2", torch.__version__, "DS_ACCELERATOR=cpu")


def test_torch_s_own_warning_is_the_reason(gpu_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    warnings.filterwarnings("ignore", module="torch")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(ConfigError) as caught:
        claim_device(ONE)
    assert "driver on your system is too old (found version 11040)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_runs_no_kernel_is_named(gpu_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch has no kernels for its architecture; here there is no such GPU at all."""
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 8),
        ("set_device", lambda device: None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    _, report = open_device(RankFacts(7, 8, 7, 8, threads=1))
    assert_names(report.problem, "GPU 7", socket.gethostname(), torch.__version__)
    assert report.facts.kind == "cpu"


def test_more_ranks_than_gpus(gpu_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 1)):
        monkeypatch.setattr(torch.cuda, name, value)
    _, report = open_device(RankFacts(3, 4, 3, 4, threads=1))
    assert_names(report.problem, "rank 3", "GPU 3", socket.gethostname(), "--num_gpus")


def test_by_wish_it_trains_on_the_cpu(gpu_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    device, report = open_device(ONE)
    assert (device.type, report.facts.kind, report.problem) == ("cpu", "cpu", "")


def _agree(*reports: DeviceReport) -> list[DeviceFacts | ConfigError]:
    """What each rank makes of the reports, through a real store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: list[Any] = [None] * len(reports)

    def rank(number: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        try:
            results[number] = agree_on_device(reports[number], RankFacts(number, len(reports), 0, 1, 1), own)
        except ConfigError as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return results


def test_one_bad_node_among_good_ones_is_named_on_every_rank() -> None:
    good, bad = (
        DeviceReport("node1", A100),
        DeviceReport("node2", DeviceFacts("cpu", False, GIB), "node2: driver 11040"),
    )
    results = _agree(good, bad, good)
    assert len(results) == 3
    for error in results:
        assert isinstance(error, ConfigError)
        assert_names(error, "node2", "11040")


def test_a_node_without_gpus_that_does_not_know_of_them_is_named() -> None:
    for error in _agree(DeviceReport("node1", A100), DeviceReport("node2", DeviceFacts("cpu", False, GIB))):
        assert isinstance(error, ConfigError)
        assert_names(error, "node1", "node2", "DS_ACCELERATOR=cpu")


def test_mixed_memory_counts_by_the_smallest() -> None:
    small = DeviceFacts("cuda", True, 40 * GIB, 64 * GIB, "NVIDIA A100-SXM4-40GB", compiles=False)
    facts = _agree(DeviceReport("node1", A100), DeviceReport("node2", small))
    assert facts[0] == facts[1]
    assert isinstance(facts[0], DeviceFacts)
    assert (facts[0].memory_bytes, facts[0].host_memory_bytes) == (40 * GIB, 64 * GIB)
    assert (facts[0].bf16, facts[0].compiles) == (True, False)


def test_float8_counts_where_all_gpus_have_it() -> None:
    h100 = replace(A100, name="NVIDIA H100 80GB HBM3", float8=True)
    for reports in ((h100, A100), (A100, h100)):
        facts = _agree(*(DeviceReport(f"node{number}", each) for number, each in enumerate(reports)))
        assert [each.float8 for each in facts if isinstance(each, DeviceFacts)] == [False, False]


@pytest.mark.parametrize(("major", "bf16"), [(7, False), (8, True)])
def test_emulated_bf16_is_none(monkeypatch: pytest.MonkeyPatch, major: int, bf16: bool) -> None:
    """torch's own function decides; a V100 emulates bf16."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    properties = SimpleNamespace(major=major, minor=0, total_memory=32 * GIB)
    for name, value in (
        ("is_available", lambda: True),
        ("current_device", lambda: 0),
        ("get_device_properties", lambda device=None: properties),
        ("get_device_name", lambda device=None: "Tesla V100"),
        ("_check_bf16_tensor_supported", lambda device: True),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    assert torch.cuda.is_bf16_supported()
    assert device_facts(1).bf16 == bf16


def _sysfs(folder: Path, nodes: int) -> Path:
    for node in range(nodes):
        place = folder / "devices/system/node" / f"node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{4 * node}-{4 * node + 1},{4 * node + 3}\n")
    gpu = folder / "bus/pci/devices/0000:c1:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    return folder


def test_a_gpu_has_cores_next_to_it(tmp_path: Path) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    two = _sysfs(tmp_path / "two", 2)
    assert cores_next_to(gpu, two) == {4, 5, 7}
    assert cores_next_to(gpu, _sysfs(tmp_path / "one", 1)) == set()
    (two / "bus/pci/devices/0000:c1:00.0/numa_node").write_text("-1\n")
    assert cores_next_to(gpu, two) == set()


def test_a_rank_stays_on_the_cores_that_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5})
    monkeypatch.setattr(device_module.os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    device_module.bind_to_numa_node(torch.device("cuda", 0), _sysfs(tmp_path / "two", 2))
    device_module.bind_to_numa_node(torch.device("cuda", 0), _sysfs(tmp_path / "one", 1))
    assert bound == [{4, 5}]


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_the_default(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "max_split_size_mb:64")
        if name != own:
            monkeypatch.delenv(name)
    use_expandable_segments()
    set_to = [device_module.os.environ.get(name) for name in names]
    if own is None:
        assert set_to == ["expandable_segments:True", None]
    else:
        assert set_to[names.index(own)] == "max_split_size_mb:64"
        assert set_to.count(None) == 1


@pytest.fixture
def _torch_own_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()  # a test before may have claimed the device
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_torch_own_products")
@pytest.mark.parametrize("cpu", ["vendor_id : AuthenticAMD", "vendor_id : GenuineIntel", None])
def test_fp32_products_stay_exact(monkeypatch: pytest.MonkeyPatch, cpu: str | None) -> None:
    if cpu is not None:  # None: this machine's own
        monkeypatch.setattr(device_module, "_cpu_info", lambda: cpu)
    speed_up_fp32_products()
    left, right = (torch.randn(300, 200, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    # Sums of 200 products of about 1: fp32 rounds them to about 1e-6, bf16 to about 1e-2.
    torch.testing.assert_close((left @ right.t()).double(), left.double() @ right.double().t(), rtol=0, atol=1e-4)
    if "Intel" in (cpu or ""):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("_torch_own_products")
def test_products_that_round_to_bf16_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_cpu_info", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(device_module, "_is_exact_in_fp32", lambda: False)  # a CPU with AMX
    speed_up_fp32_products()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("own", [None, "0"])
def test_a_decomposed_tanh_is_the_default(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    name = "TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH"
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    decompose_tanh()
    assert device_module.os.environ[name] == (own or "1")


def test_all_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    numbers = np.arange(6, dtype=np.int64).reshape(2, 3)
    micro = MicroBatch(numbers, numbers + 1, numbers.astype(np.int32))
    batch = pin_batch(GlobalBatch((micro, replace(micro, documents=None)), 12, (0, 4)))
    arrays = [
        array
        for each in batch.micro_batches
        for array in (each.tokens, each.labels, each.documents)
        if array is not None
    ]
    assert [torch.from_numpy(array).data_ptr() for array in arrays] == pinned, "a copy to the GPU reads pinned memory"
    assert len(pinned) == 5
    assert batch.micro_batches[0].labels.tolist() == (numbers + 1).tolist()
    assert batch.micro_batches[0].documents is not None
    assert batch.micro_batches[0].documents.dtype == np.int32
    assert (batch.target_count, batch.sample_range) == (12, (0, 4))


@pytest.mark.gpu
def test_a_gpu_reads_page_locked_memory() -> None:
    numbers = np.arange(6, dtype=np.int64).reshape(2, 3)
    (micro,) = pin_batch(GlobalBatch((MicroBatch(numbers, numbers, None),), 6, (0, 2))).micro_batches
    assert torch.from_numpy(micro.tokens).is_pinned()
    weight = torch.rand(1000, device="cuda")
    (copy,) = HostStaging().take([Fragment(FragmentKey("w", "master", (1000,), 0, 1000), weight)])
    assert copy.tensor.is_pinned()
    torch.testing.assert_close(copy.tensor, weight.cpu(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_gpu_is_deterministic_by_wish(deterministic: None, masked: bool) -> None:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    query, key, value = (torch.randn(2, 8, 2048, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    documents = torch.arange(2048, device="cuda", dtype=torch.int32).expand(2, -1) // 500
    blocks = flex_blocks(documents, documents) if masked else None

    def gradients() -> list[torch.Tensor]:
        if blocks is None:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = _compiled_flex_attention()(query, key, value, block_mask=blocks)
        return list(torch.autograd.grad(mixed.square().sum(), (query, key, value)))

    first = gradients()
    for _ in range(5):
        assert all(map(torch.equal, gradients(), first))


@pytest.mark.parametrize(
    ("json", "wanted", "done"),
    [
        ("zero2.json", (), []),
        ("zero2_offload.json", (), ["bound"]),
        ("zero2.json", ("train.deterministic=true",), ["deterministic, compiled True"]),
        ("zero2.json", ("train.deterministic=true", "compile=false"), ["deterministic, compiled False"]),
    ],
)
def test_a_run_s_settings_reach_the_process(
    monkeypatch: pytest.MonkeyPatch, json: str, wanted: tuple[str, ...], done: list[str]
) -> None:
    found: list[str] = []
    monkeypatch.setattr(setup, "bind_to_numa_node", lambda device: found.append("bound"))
    monkeypatch.setattr(
        setup, "make_deterministic", lambda compiled: found.append(f"deterministic, compiled {compiled}")
    )
    run = resolve(load_run_config(None, wanted), read_deepspeed_json(named_json(json)), 2, A100, 100)
    setup._prepare_process(run, torch.device("cuda", 0))
    assert found == done


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All settings of `make_deterministic` in the test, as they were behind it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.utils.deterministic.fill_uninitialized_memory
    make_deterministic(compiled=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch._inductor.config.deterministic = False


def test_deterministic_kernels(deterministic: None) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert device_module.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch._inductor.config.deterministic
