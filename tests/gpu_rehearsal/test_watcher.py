"""The watcher finds what it is for: each fault is made on a fake GPU, one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.rehearsal import fake_cuda_library
from megalm.rehearsal.fake_cuda_library import build_library
from megalm.utils.child_process import child_environment

# Runs in a process of its own: the library is loaded before torch, and torch.cuda is replaced for good.
FAULTS = """
import ctypes, json, os, sys
from pathlib import Path
from megalm.rehearsal.fake_cuda_library import load_library
load_library(Path(sys.argv[1]))
ctypes.CDLL(sys.argv[2])  # as a torch with CUDA registers its own devices later
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from megalm.rehearsal import stand_ins
from megalm.rehearsal.fake_cuda import FakeCuda, GpuProperties
from megalm.rehearsal.watcher import Watcher

watcher = Watcher()
FakeCuda(GpuProperties("A100", 80 << 30, 8, 0), 8, watcher).install()
stand_ins.install((8, 0), watcher)
torch.cuda.set_device(3)
found = {}

def event(name, work):
    watcher.begin()
    try:
        work()
    except Exception as error:
        found[name] = type(error).__name__
        return
    found[name] = [[item.kind, item.count, item.bytes] for item in watcher.events()]

def copied_into(gpu, source):
    gpu.copy_(source, non_blocking=True)

with FakeTensorMode(allow_non_fake_inputs=True), watcher:
    gpu, cpu = torch.ones(4, 256, device="cuda"), torch.ones(4, 256)
    found["device"] = str(gpu.device)
    event("nothing", lambda: gpu * 2 + gpu.sum())
    event("read", lambda: gpu.sum().item())
    event("condition", lambda: bool((gpu > 0).all()))
    event("to host", lambda: gpu.cpu())
    event("to device", lambda: cpu.to("cuda"))
    event("not pinned", lambda: cpu.to("cuda", non_blocking=True))
    event("pinned", lambda: cpu.pin_memory().to("cuda", non_blocking=True))
    event("pinned copy", lambda: copied_into(gpu, cpu.pin_memory()))
    event("synchronize", torch.cuda.synchronize)
    event("stream", torch.cuda.Stream().synchronize)
    event("index", lambda: gpu[torch.tensor([0, 1])])
    event("number", lambda: gpu * torch.tensor(2.0))
    event("both", lambda: gpu + cpu)
    event("other device", lambda: gpu + torch.ones(4, 256, device="cuda:0"))
    event("size", lambda: gpu.nonzero())

    memory = watcher.memory["cuda"]
    watcher.begin()
    before = memory.live
    first = torch.empty(1000, device="cuda")
    view = first[10:]
    del first
    found["one storage"] = memory.live - before
    del view
    found["freed"] = memory.live - before
    weight = torch.nn.Linear(64, 64, bias=False, device="cuda").to(torch.bfloat16)
    found["converted"] = memory.live - before
    weight(torch.ones(8, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    found["with gradient"] = memory.live - before
    found["peak"] = memory.peak - before
    found["allocated"] = torch.cuda.memory_allocated() - before
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


def _devices_of_a_torch_with_cuda(folder: Path) -> Path:
    """A library that registers CUDA's devices as a torch with CUDA does; whoever uses them dies."""
    source = Path(fake_cuda_library.__file__).with_name("fake_cuda.cpp").read_text()
    for ours, of_cuda in (
        ("c10::REGISTRY_PREFERRED", "c10::REGISTRY_DEFAULT"),
        ("Device before", "std::abort(); Device before"),
        ("return Device(kCUDA, current);\n}", "std::abort();\n}"),
    ):
        assert ours in source
        source = source.replace(ours, of_cuda)
    changed = folder / "cuda.cpp"
    changed.write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_cuda_library, "_SOURCE", changed)
        patch.setenv("MEGALM_CACHE", str(folder))
        return build_library()


@pytest.fixture(scope="module")
def cuda_devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _devices_of_a_torch_with_cuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def found(cuda_devices: Path) -> dict[str, object]:
    command = [sys.executable, "-c", FAULTS, str(build_library()), str(cuda_devices)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


_BYTES = 4 * 256 * 4


@pytest.mark.parametrize(
    ("fault", "events"),
    [
        ("nothing", []),
        ("read", [["read", 1, 4]]),
        ("condition", [["read", 1, 1]]),
        ("to host", [["to_host", 1, _BYTES]]),
        ("to device", [["to_device", 1, _BYTES]]),
        ("not pinned", [["to_device", 1, _BYTES]]),
        ("pinned", [["prefetch", 1, _BYTES]]),
        ("pinned copy", [["prefetch", 1, _BYTES]]),
        ("synchronize", [["synchronize", 1, 0]]),
        ("stream", [["synchronize", 1, 0]]),
        ("index", [["mixed", 1, 0]]),
        ("number", []),
        ("both", "FakeTensorDeviceMismatchError"),
        ("other device", "FakeTensorDeviceMismatchError"),
        ("size", "DynamicOutputShapeException"),
    ],
)
def test_a_fault_is_found(fault: str, events: object, found: dict[str, object]) -> None:
    assert found[fault] == events


def test_tensors_are_on_the_devices_that_the_process_has_set(found: dict[str, object]) -> None:
    assert found["device"] == "cuda:3"


def test_memory_is_counted_by_storage_in_units_of_the_allocator(found: dict[str, object]) -> None:
    assert found["one storage"] == 4096  # 1000 floats and their view, in units of 512 bytes
    assert found["freed"] == 0
    assert found["converted"] == 64 * 64 * 2
    assert found["with gradient"] == found["allocated"] == 2 * 64 * 64 * 2
    assert isinstance(found["peak"], int)
    assert found["peak"] > 2 * 64 * 64 * 2


def test_the_library_is_compiled_once(cuda_devices: Path) -> None:
    before = cuda_devices.stat().st_mtime_ns
    assert _devices_of_a_torch_with_cuda(cuda_devices.parent) == cuda_devices
    assert cuda_devices.stat().st_mtime_ns == before
    assert list(cuda_devices.parent.glob("*.so*")) == [cuda_devices]
