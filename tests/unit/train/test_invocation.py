"""The commands that a run tells a person to try: they have to work, so they say all that was said."""

from __future__ import annotations

import shlex

from megalm.train.invocation import Invocation


def test_says_all_that_was_said_but_what_is_said_anew() -> None:
    overrides = ("train.steps=20", "model.hidden_size=64", "run.name=other", "resume.allow=[order]")
    told = Invocation("b.json", None, overrides, "mine").again("--resume", "auto", "train.steps=40")
    assert told == (
        "deepspeed launch/pretrain.py --deepspeed_config b.json model.hidden_size=64 run.name=mine "
        "--resume auto train.steps=40"
    )


def test_says_file_and_ranks_and_quotes_for_a_shell() -> None:
    mixture = "data.train=[{prefix: data/a b, weight: 1}]"
    told = Invocation("b.json", "my run.yaml", (mixture,), "mine", ranks=2).again()
    assert told.startswith("deepspeed --num_gpus 2 launch/pretrain.py ")
    assert shlex.split(told)[-4:] == ["--config", "my run.yaml", mixture, "run.name=mine"]
