"""Freed memory is used again: counted by page faults, in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.jobs import finish, launcher

pytestmark = pytest.mark.e2e

SCRIPT = """
import resource, sys
import torch
from megalm.engine.device import tune_malloc

if sys.argv[1] == "keep":
    tune_malloc()

def step():
    # More than the 32 MB up to which glibc may learn to keep them by itself.
    tensors = [torch.ones(12_000_000) for _ in range(3)]  # 48 MB each

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(folder: Path, how: str) -> int:
    (script := folder / "faults.py").write_text(SCRIPT)
    done = finish(folder, [*launcher("forked"), script, how])
    assert done.code == 0, done.explain()
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_not_mapped_anew(tmp_path: Path) -> None:
    """Twenty steps touch 2.9 GB: without it nearly every page again."""
    assert _faults(tmp_path, "keep") < _faults(tmp_path, "default") / 10
