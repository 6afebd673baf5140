"""A lock that was left in the folder of a compiled extension."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from megalm.engine.cpp_extensions import compiling_alone, load_async_io
from megalm.errors import ConfigError
from tests.messages import assert_names


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "an_op").mkdir()
    return tmp_path / "an_op" / "lock"


def test_the_lock_of_a_killed_process_is_taken_away(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert baton.fd is not None
    os.close(baton.fd)  # as the kernel does
    with compiling_alone("an_op"):
        assert FileBaton(str(lock)).try_acquire(), "torch would wait for ever"


def test_the_lock_of_one_that_compiles_is_waited_for(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    entered = threading.Event()

    def compile_too() -> None:
        with compiling_alone("an_op"):
            entered.set()

    thread = threading.Thread(target=compile_too)
    thread.start()
    assert not entered.wait(0.6)
    baton.release()
    thread.join(10)
    assert entered.is_set()


def test_one_at_a_time(lock: Path) -> None:
    inside: list[str] = []

    def second() -> None:
        with compiling_alone("an_op"):
            inside.append("second")

    with compiling_alone("an_op"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "second"]


def test_nvme_offload_beside_a_gpu_names_the_missing_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's builder joins CUDA_HOME, which is None, with a folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(ConfigError) as caught:
        load_async_io()
    assert_names(caught.value, "offload_optimizer.device=nvme", "nvcc", "12.8", "CUDA_HOME")
