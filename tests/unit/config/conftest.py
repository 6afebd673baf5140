"""A run that resolves, to be bent in one place by each test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_cases import BASE, CPU, Write

from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.planning.resolve import ResolvedRun, resolve


@pytest.fixture
def write_json(tmp_path: Path) -> Write:
    """Write BASE with these top-level keys instead; None removes one."""

    def write(**changes: Any) -> Path:
        content = {key: value for key, value in (BASE | changes).items() if value is not None}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def start(write_json: Write) -> Callable[..., ResolvedRun]:
    """Load, read and resolve: the way of every run."""

    def go(
        *overrides: str,
        ranks: int = 2,
        device: DeviceFacts = CPU,
        config: str | None = None,
        ranks_per_node: int | None = None,
        **changes: Any,
    ) -> ResolvedRun:
        ds = read_deepspeed_json(write_json(**changes))
        return resolve(load_run_config(config, overrides), ds, ranks, device, ranks_per_node=ranks_per_node)

    return go
