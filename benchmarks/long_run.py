"""Times what reads a long metrics.jsonl: the page of a run, a comparison, and what a resume needs of it.

    python -m benchmarks long_run [--rows 1000000] [--folder .]

The run has a row for each step, a validation and a checkpoint event every thousand steps, and an attempt every tenth of
its length that goes back a hundred steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from megalm.cli.compare import command
from megalm.config.schema import GuardSection
from megalm.runs.metrics_log import read_newest_first
from megalm.runs.run_folder import RunFolder
from megalm.tracking.report.page import write_report
from megalm.train.spikes.spike_guard import SpikeGuard

CONFIG = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "run-0.1.0" / "small"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.folder / "long-run-benchmark")
    last_step = write_run(folder, arguments.rows)
    try:
        print(f"{arguments.rows:,} training rows, {folder.metrics.stat().st_size / 1e6:.0f} MB")
        timed("report", lambda: write_report(folder.path))
        timed("compare, two runs", lambda: compare(folder.path))
        timed("resume", lambda: resume(folder, last_step))
    finally:
        shutil.rmtree(folder.path)


def timed(what: str, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    print(f"{what}: {time.perf_counter() - start:.1f} s")


def compare(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command([str(path), str(path)], plot=path / "compare.png")


def resume(folder: RunFolder, step: int) -> None:
    """Read what a resume does: the number of its attempt, and the steps before it for the spike guard."""
    folder.next_attempt()
    SpikeGuard(GuardSection()).steps_of(read_newest_first(folder.metrics), step)


def write_run(folder: RunFolder, count: int) -> int:
    """Write the run; return its last step."""
    folder.path.mkdir(parents=True)
    for name in ("config.yaml", "deepspeed.resolved.json", "environment.json"):
        shutil.copy(CONFIG / name, folder.path)
    noise, step, attempt = random.Random(1), 0, 1
    with folder.metrics.open("wb") as file:

        def row(kind: str, **fields: object) -> None:
            file.write(orjson.dumps({"kind": kind, "time": 1.7e9 + file.tell() / 300, **fields}) + b"\n")

        row("event", event="start", step=0, attempt=1, startup_seconds=3.5)
        for number in range(count):
            if number and number % max(1, count // 10) == 0:
                step, attempt = max(0, step - 100), attempt + 1
                row("event", event="resume", step=step, attempt=attempt, startup_seconds=3.5)
            step += 1
            row(
                "train",
                step=step,
                tokens=step * 524288,
                samples=step * 256,
                loss=2.0 + 9.0 / math.sqrt(step) + noise.gauss(0, 0.02),
                lr=3e-4 * math.exp(-step / count),
                grad_norm=math.exp(noise.gauss(0, 0.2)),
                loss_scale=1.0,
                tokens_per_second=1.0e6 + noise.gauss(0, 1e4),
                step_seconds=0.52 + noise.gauss(0, 0.01),
                mfu=0.41 + noise.gauss(0, 0.005),
                memory_bytes=71_234_567_168,
                attempt=attempt,
            )
            if step % 1000 == 0:
                of = {"tokens": step * 524288, "dataset": "validation", "targets": 10**6, "attempt": attempt}
                row("eval", step=step, loss=2.1, perplexity=8.2, bits_per_byte=None, whole=False, **of)
                saved = {"path": f"step-{step:08d}", "saved_step": step, "bytes": 10**10, "pruned": []}
                row("event", event="checkpoint", step=step, attempt=attempt, seconds=9.0, stall_seconds=0.2, **saved)
    return step
