"""Compile and load the C++ side of the fake CUDA devices; imports no torch, which must be imported after it.

torch's own extension builder would import torch first. One file and no dependency need only the compiler, and a cache
under the hash of all that goes in.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megalm.data.builder.stdlib_corpus import default_cache_dir
from megalm.errors import ConfigError
from megalm.utils.atomic_files import temporary_name

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC", "-w")
_LIBRARIES = ("libc10.so", "libtorch_cpu.so")
_SHOWN_CHARACTERS = 200


def build_library() -> Path:
    """Return the compiled library for the installed torch; compile it at the first use, in a few seconds.

    Raises:
        ConfigError: torch is not installed, or there is no compiler; says what to install.
    """
    torch = _torch_folder()
    parts = _SOURCE.read_bytes(), (torch / "version.py").read_bytes(), " ".join(_FLAGS).encode()
    library = default_cache_dir() / f"fake_cuda-{hashlib.sha256(b'/'.join(parts)).hexdigest()[:16]}.so"
    if not library.exists():
        compiler = shutil.which(os.environ.get("CXX") or "g++")
        if compiler is None:
            raise ConfigError(
                "a rehearsal compiles a small library at its first use and finds no C++ compiler; install g++ (Debian: "
                "apt-get install g++), or name yours in CXX"
            )
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, torch, library)
    return library


def load_library(library: Path) -> None:
    """Load the library into this process, which must not have imported torch."""
    assert "torch" not in sys.modules, "torch has looked for CUDA already"
    for name in _LIBRARIES:  # they resolve the library's symbols
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ConfigError("a rehearsal runs the engine itself, which needs torch and deepspeed; `make install`")
    return Path(spec.origin).parent


def _compile(compiler: str, torch: Path, library: Path) -> None:
    temporary = temporary_name(library)
    folders = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include")
    command = [compiler, *_FLAGS, *(f"-I{folder}" for folder in folders), str(_SOURCE), "-o", str(temporary)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"{compiler} ended with {done.returncode}"]
            why = next((line for line in lines if "error:" in line), lines[0])
            raise ConfigError(
                f"{compiler} cannot compile {_SOURCE.name} of a rehearsal ({why[:_SHOWN_CHARACTERS]}); install g++ 11 "
                "or later, or name another compiler in CXX"
            )
        temporary.replace(library)  # two processes may compile at once: either file is whole
    finally:
        temporary.unlink(missing_ok=True)
