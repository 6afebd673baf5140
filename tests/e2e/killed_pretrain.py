"""launch/pretrain.py, one rank of which kills itself at a chosen moment of a save; nothing of megalm is replaced.

Environment: MEGALM_TEST_KILL="RANK:SAVE:CALL:NUMBER", e.g. 0:2:rename:1 is rank 0 before the first rename of its second
save, the rehearsal's not counted.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megalm.checkpoint.checkpointer import CheckpointWriter  # noqa: E402
from tests.kill_points import counted  # noqa: E402

rank, wanted_save, call, number = os.environ["MEGALM_TEST_KILL"].split(":")
hook = counted(int(number), only=call)  # kept: it would end with its last reference
begin = CheckpointWriter.begin
saves = 0


def begin_and_count(self: CheckpointWriter, *arguments: Any) -> Path:
    global saves  # noqa: PLW0603
    saves += 1
    if saves == int(wanted_save) and os.environ["RANK"] == rank:
        hook.__enter__()  # until the end of this process
    return begin(self, *arguments)


CheckpointWriter.begin = begin_and_count  # type: ignore[method-assign]
sys.argv[0] = str(ROOT / "launch" / "pretrain.py")
runpy.run_path(sys.argv[0], run_name="__main__")
