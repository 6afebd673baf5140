"""Reports of spikes: none takes another's place, and the command they advise is whole."""

from __future__ import annotations

from pathlib import Path

from megalm.train.guard import Verdict
from megalm.train.incidents import Incident, next_command, report_name
from megalm.train.invocation import Invocation

RUN = Invocation(Path("runs/mine"))


def incident(saved_step: int) -> Incident:
    return Incident(8, 1, 9.0, 3.0, 0.2, Verdict("stop", None, ""), {}, (112, 128), saved_step)


def test_a_step_that_is_out_of_bounds_again_has_a_report_of_its_own() -> None:
    assert report_name(8, 1) == "step-00000008.md"
    assert report_name(8, 2) == "step-00000008.attempt-2.md"


def test_the_advice_is_past_the_data_or_where_nothing_is_saved_a_smaller_rate() -> None:
    assert next_command(RUN, incident(6)).endswith("launch/pretrain.py run.name=mine --resume 6 --skip-steps 2")
    told = next_command(RUN, incident(0))
    assert told.endswith("run.name=mine --resume auto schedule.peak_learning_rate=0.1")
