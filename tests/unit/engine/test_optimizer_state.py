"""What the engine makes of DeepSpeed's numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.engine.optimizer.optimizer_state import OptimizerState


@pytest.mark.parametrize(("deepspeed", "norm"), [(0.0, 0.0), (2.5, 2.5), (math.inf, math.inf), (-1.0, math.nan)])
def test_a_norm_of_minus_1_is_not_finite(deepspeed: float, norm: float) -> None:
    """Else the guard, which compares it with limits, lets such an update pass."""
    state: Any = SimpleNamespace(_outer=SimpleNamespace(_global_grad_norm=deepspeed))
    assert OptimizerState.gradient_norm(state) == pytest.approx(norm, nan_ok=True)
