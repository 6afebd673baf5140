"""What the tests of the configuration share: a JSON that resolves, devices, and how a refusal is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.errors import ConfigError
from megalm.planning.resolve import ResolvedRun

Write = Callable[..., Path]

CPU = DeviceFacts(kind="cpu", bf16=True, memory_bytes=64 << 30)
GPU = DeviceFacts(kind="cuda", bf16=True, memory_bytes=40 << 30)

BASE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}


def refused(action: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The message that `action` refuses with, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        action(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def notice_of(run: ResolvedRun, name: str) -> str:
    """The one notice of a run in which `name` stands."""
    (notice,) = (notice for notice in run.notices if name in notice)
    return notice


def section_of(plan_text: str, title: str) -> str:
    """A section of a plan's text, without its title."""
    (section,) = (part for part in f"\n\n{plan_text}".split("\n\n") if part.startswith(title))
    return section.partition("\n")[2]


def read_refused(path: Path) -> str:
    return refused(read_deepspeed_json, path)
