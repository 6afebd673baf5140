"""Offload on a machine that cannot compile, or from an environment that nobody has activated."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from megalm.engine.cpp_extensions import load_cpu_adam
from megalm.errors import ConfigError

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("tools", "why"), [((), "ninja not being installed"), (("ninja",), "c++: not found")], ids=["nothing", "ninja"]
)
def test_it_is_reported_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: tuple[str, ...], why: str
) -> None:
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "bin").mkdir()
    for tool in tools:
        found = shutil.which(tool, path=places)
        assert found is not None
        (tmp_path / "bin" / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match=r"cpu_adam, .* cannot be compiled \(.*g\+\+ and ninja on PATH") as caught:
        load_cpu_adam()
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
