"""The description of a run at a tracker: what it is, its data, its result, the next command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from megalm.tracking.mlflow_mirror.sink import RUNNING
from megalm.tracking.report.headline import numbers, outcome
from megalm.tracking.report.page import next_commands
from megalm.tracking.report.run_data import ReportData, read_run


def description(run_dir: Path, status: str) -> str:
    """Return Markdown about a run.

    Raises:
        MegalmError: a file of the run folder is damaged.
    """
    run = read_run(run_dir.resolve(), time.time())
    blocks = ["  \n".join(_what(run))]
    if status == RUNNING:
        blocks.append("**Training.**")
    else:
        blocks.append(f"**{outcome(run, time.time()).sentence}**")
        table = [f"| {one.name} | {one.value} | {one.note} |" for one in numbers(run)]
        if table:
            blocks.append("\n".join(["| | | |", "|---|---|---|", *table]))
    commands = [command for name, command in next_commands(run) if name in ("resume", "train longer", "generate")]
    blocks.append("\n".join(["Next:", "```", *commands, "```"]))
    return "\n\n".join(blocks)


def _what(run: ReportData) -> Iterator[str]:
    """Yield a line on the model, one on its training, and one for each dataset."""
    facts, setting = run.environment, run.setting
    count = run.results.parameters
    size = f": {count:,} parameters" if count is not None else ""
    layers, width = setting("model.num_hidden_layers"), setting("model.hidden_size")
    preset = f" (preset {run.preset})" if run.preset else ""
    yield f"**{setting('model.style')}, {layers} layers x {width}{size}**{preset}"
    device = facts.get("device") or "unknown device"
    yield f"{run.planned_steps or 0:,} steps in {facts.get('precision')} on {facts.get('world_size')} x {device}"
    found = facts.get("datasets")
    for part in found if isinstance(found, list) else ():
        epochs, tokens = part.get("epochs"), part.get("tokens_per_epoch")
        known = isinstance(epochs, (int, float)) and isinstance(tokens, int)
        yield f"data: `{part.get('prefix')}`" + (f", {epochs:.2f} epochs of {tokens:,} tokens" if known else "")
