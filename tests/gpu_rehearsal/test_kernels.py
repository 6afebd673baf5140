"""Kernels for GPUs that are not there: Inductor writes them, Triton compiles them, and each fits its shared memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.rehearsal.fake_cuda_library import build_library
from megalm.utils.child_process import child_environment
from tests.conftest import require

_SCRIPT = Path(__file__).with_name("offline_kernels.py")
_TRITON = "pip install --no-deps triton==3.7.1"

# Capability -> bytes of shared memory that a block may have, by NVIDIA's CUDA C++ Programming Guide.
_SHARED = {70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@pytest.mark.slow
@pytest.mark.parametrize("capability", _SHARED)
def test_kernels_compile_and_fit_the_shared_memory(capability: int) -> None:
    """The chunk's loss, and attention under a document mask at head size 64 and 128, forward and backward."""
    require("triton", importlib.util.find_spec("triton") is not None, _TRITON)
    words = [str(build_library()), str(capability), str(_SHARED[capability])]
    command = [sys.executable, str(_SCRIPT), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    templates = [name for name, _, _ in kernels if name.startswith("triton_tem")]
    assert len(templates) == 4  # two of attention at each head size
    assert any("softmax" in name for name, _, _ in kernels)
    for name, shared, code in kernels:
        assert shared <= _SHARED[capability], name
        assert code > 0, name
