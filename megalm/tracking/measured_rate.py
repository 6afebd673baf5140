"""The speed that a run has measured, as the rate of a plan."""

from __future__ import annotations

from pathlib import Path

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.errors import ConfigError
from megalm.planning.run_plan import Rate
from megalm.tracking.compare_runs import read_run, results


def measured_rate(folder: Path, device: DeviceFacts) -> Rate:
    """Return the median speed of a run's steps: as MFU between GPUs with data sheets, else for the same device alone.

    Raises:
        ConfigError: the run has no measured speed, or another device without a data sheet.
        DataError: its metrics cannot be read.
    """
    run = read_run(folder)
    found, facts = results(run), run.environment
    flops, ranks = facts.get("flops_per_token"), facts.get("world_size")
    if not found.tokens_per_second or not isinstance(flops, int) or not isinstance(ranks, int):
        raise ConfigError(f"--rate-of {folder}: the run has not measured its speed; name a run that has trained steps")
    origin = f"the median of {folder}"
    theirs = str(facts.get("device"))
    if found.mfu and data_sheet_peak(theirs, low_precision=True) and data_sheet_peak(device.name or "", True):
        return Rate(found.mfu, origin)
    is_same = device.kind == "cpu" == facts.get("device_kind") or device.name == theirs
    if not is_same:
        here = device.name or device.kind
        raise ConfigError(
            f"--rate-of {folder}: its speed on {theirs} does not carry over to {here}: only between GPUs with a data "
            "sheet does it; state a share of the peak with --mfu"
        )
    return Rate(found.mfu or 0.0, origin, flops=found.tokens_per_second * flops / ranks)
