"""The commands that a run tells a person to try: they have to work as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

from megalm.train.invocation import Invocation


def test_says_no_more_than_is_needed() -> None:
    told = Invocation(Path("runs/mine")).again("--resume", "auto", "train.steps=40")
    assert told == "deepspeed launch/pretrain.py run.name=mine --resume auto train.steps=40"


def test_says_where_and_how_many_and_quotes_for_a_shell() -> None:
    told = Invocation(Path("/data/my runs/mine"), ranks=2).again("--resume", "auto")
    assert shlex.split(told) == [
        *("deepspeed", "--num_gpus", "2", "launch/pretrain.py"),
        *("run.root=/data/my runs", "run.name=mine", "--resume", "auto"),
    ]
