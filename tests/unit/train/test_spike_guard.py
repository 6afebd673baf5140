"""What counts as a spike, on written numbers and on the curve of a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.schema import GuardSection
from megalm.engine.interface import StepResult, UpdateVerdict
from megalm.train.spikes.spike_guard import History, SpikeGuard, Verdict
from tests.messages import assert_names

# (loss, gradient norm) of the 400 steps of the quickstart on two CPU cores in bf16.
CURVE = json.loads((Path(__file__).parent / "quickstart_curve.json").read_text())


def findings(curve: list[list[float]], **other: Any) -> dict[int, str]:
    """Step -> quantity of what is found, as the guard would go on after it."""
    history, found = History(GuardSection(**other)), {}
    for step, (loss, norm) in enumerate(curve, start=1):
        finding = history.judge(loss, norm)
        if finding is None:
            history.accept(loss, norm)
        else:
            found[step] = finding.quantity
    return found


def test_a_normal_run_has_none() -> None:
    """Not with the defaults, and not with thresholds that are three times as strict."""
    assert len(CURVE) == 400
    assert findings(CURVE) == {}
    assert findings(CURVE, warmup_steps=20, loss_sigmas=4.0, norm_sigmas=4.0, norm_factor=2.5) == {}


@pytest.mark.parametrize(
    ("step", "loss", "norm", "quantity"),
    [
        (250, 9.58, 1.0, "loss"),
        (399, 7.5, 0.6, "loss"),
        (250, 3.7, 40.0, "gradient norm"),
        (60, 4.8, 41.0, "gradient norm"),
    ],
)
def test_spikes_on_top_of_it_are_found(step: int, loss: float, norm: float, quantity: str) -> None:
    curve = [list(row) for row in CURVE]
    curve[step - 1] = [loss, norm]
    assert findings(curve) == {step: quantity}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_no_number_is_found_from_the_first_step_on(loss: float, norm: float) -> None:
    finding = History(GuardSection()).judge(loss, norm)
    assert finding is not None
    assert finding.quantity == ("gradient norm" if math.isfinite(loss) else "loss")
    assert_names(finding, finding.quantity, finding.value)


def test_nothing_finite_is_judged_during_the_warm_up() -> None:
    history = History(GuardSection(warmup_steps=10))
    for _ in range(9):
        history.accept(1.0, 1.0)
    assert history.judge(100.0, 100.0) is None
    history.accept(1.0, 1.0)
    assert history.judge(100.0, 1.0) is not None


def test_one_spike_does_not_hide_the_next() -> None:
    """A mean and a standard deviation would be moved by it; median and MAD are not."""
    history = History(GuardSection(window=20, warmup_steps=20))
    for index in range(19):
        history.accept(3.0 + 0.01 * (index % 3), 1.0)
    history.accept(50.0, 1.0)
    finding = history.judge(4.0, 1.0)
    assert finding is not None
    assert finding.median == pytest.approx(3.01)
    assert finding.limit == pytest.approx(3.51)


def test_both_thresholds_of_a_pair_must_be_exceeded() -> None:
    noisy = np.random.default_rng(1).normal(3.0, 0.3, size=128)
    history = History(GuardSection())
    history.restart((float(loss), 1.0) for loss in noisy)
    assert history.judge(4.5, 1.0) is None, "five deviations of a noisy loss"
    history.restart((3.0 + 0.001 * (index % 5), 1.0) for index in range(128))
    assert history.judge(3.4, 1.0) is None, "a hundred deviations of a quiet one, but less than half a nat"
    assert history.judge(3.6, 1.0) is not None


def test_the_window_moves_on() -> None:
    history = History(GuardSection(window=10, warmup_steps=10))
    history.restart([(9.0, 1.0)] * 30 + [(3.0, 1.0)] * 10)
    assert history.judge(9.0, 1.0) is not None
    assert history.statistics()["loss_median"] == 3.0
    assert history.statistics()["steps"] == 10


def after(guard: SpikeGuard, step: int, loss: float) -> Verdict:
    """What the guard does after a step of this loss, judged as the engine has it judged."""
    return guard.respond(StepResult(loss, 1.0, 1.0, guard.judge(loss, 1.0)), step, 0)


def test_a_report_has_the_numbers_that_were_judged_by() -> None:
    history = History(GuardSection(warmup_steps=9))
    history.restart((3.0, norm) for norm in (0.1, 10.0, 1000.0) * 3)
    finding, window = history.judge(3.0, 1e30), history.statistics()
    assert finding is not None
    assert (finding.median, finding.sigma) == (window["grad_norm_median"], window["grad_norm_sigma"])
    assert finding.sigma == pytest.approx(1.4826 * math.log(100)), "not 1.4826 * 9.9, which is of the norms themselves"


def test_another_ranks_refusal_is_everybodys() -> None:
    refused = StepResult(3.0, 1.0, 1.0, UpdateVerdict(refuses=True))
    assert SpikeGuard(GuardSection(policy="skip")).respond(refused, 1, 0).action == "skip"


@pytest.mark.parametrize("policy", ["off", "stop", "skip", "rollback"])
def test_a_spike_is_refused_unless_the_guard_is_off(policy: Any) -> None:
    guard = SpikeGuard(GuardSection(policy=policy, window=10, warmup_steps=10))
    guard.history.restart([(3.0, 1.0)] * 10)
    before = guard.history.statistics()
    verdict = guard.judge(9.0, 1.0)
    assert verdict.refuses == (policy != "off")
    assert verdict.finding is not None
    assert verdict.finding.quantity == "loss"
    assert guard.judge(3.0, 1.0) == UpdateVerdict(refuses=False)
    assert guard.history.statistics() == before, "a preflight step is judged, too: nothing may be remembered of it"


def test_an_overflow_of_the_loss_scale_is_no_spike() -> None:
    guard = SpikeGuard(GuardSection(policy="stop"))
    overflow = StepResult(3.0, math.inf, 65536.0, verdict=None)
    assert overflow.skipped
    assert guard.respond(overflow, 1, 0).finding is None
    assert guard.history.statistics() == {"steps": 0}


def test_off_gets_used_to_a_level_that_has_come_to_stay() -> None:
    guard = SpikeGuard(GuardSection(policy="off", window=10, warmup_steps=10))
    for step in range(1, 11):
        after(guard, step, 3.0)
    actions = [after(guard, step, 5.0).action for step in range(11, 31)]
    assert actions[0] == "let pass"
    assert actions[-1] == "continue"


def test_a_resumed_run_remembers() -> None:
    """Rows that were taken back, spikes and overflows are no part of what is usual."""
    guard = SpikeGuard(GuardSection(window=4, warmup_steps=2))
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": float(step), "grad_norm": 1.0} for step in range(1, 9)
    ]
    rows.insert(6, {"kind": "event", "event": "spike", "step": 5, "at_step": 6})
    rows.insert(4, {"kind": "event", "event": "skip", "step": 4, "reason": "gradient overflow"})
    rows.append({"kind": "event", "event": "rollback", "step": 7})
    assert guard.steps_of(reversed(rows), 7) == [(2.0, 1.0), (3.0, 1.0), (5.0, 1.0), (7.0, 1.0)]
    assert guard.steps_of(reversed(rows), 3) == [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]


def row(kind: str, step: int, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    numbers = {"loss": float(step), "grad_norm": 1.0} if kind == "train" else {"event": kind}
    return {"kind": "train" if kind == "train" else "event", "step": step, "attempt": attempt, **numbers, **fields}


def test_a_resumed_run_remembers_what_the_run_itself_did() -> None:
    """A skip stands at the step before it, what was let pass counts, and a step may be tried again."""
    guard = SpikeGuard(GuardSection(window=9, warmup_steps=2))
    skipped = [row("spike", 2, at_step=3, decided="skip"), row("skip", 2, at_step=3, reason="loss")]
    rows = [*(row("train", step) for step in (1, 2)), *skipped, row("train", 3), row("train", 4)]
    assert guard.steps_of(reversed(rows), 4) == [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)]
    rows += [row("spike", 4, at_step=5, decided="let pass"), row("train", 5)]
    assert guard.steps_of(reversed(rows), 5)[-1] == (5.0, 1.0)
    rows += [row("spike", 5, at_step=6, decided="rollback"), row("rollback", 4, 2)]
    rows += [row("train", step, 2) for step in (5, 6)]
    assert [loss for loss, _ in guard.steps_of(reversed(rows), 6)] == [1.0, 2.0, 4.0, 5.0, 6.0]
