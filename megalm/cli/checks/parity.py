"""`megalm parity`: a configuration in miniature on this machine's CPU, compared with one rank."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from megalm.cli.options import Config, DeepSpeedJson, Overrides
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.errors import EXIT_FAILED
from megalm.parity.miniature import ParityCase, dropped_by_rounding, make_case
from megalm.parity.parity_process import PARTS, run_parity
from megalm.parity.parity_report import Line, ParityReport
from megalm.runs.run_settings import ANY_DEVICE, read_settings
from megalm.utils.formatting import format_duration, sections_text, table
from megalm.utils.progress import ProgressBar
from megalm.utils.terminal import echo, echo_text


def command(
    overrides: Overrides = None,
    config: Config = None,
    deepspeed_config: DeepSpeedJson = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks", min=1, help="The ranks of the run. Default: the recipe's documented GPUs, else as few as can be."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="The GPU of each rank, for precision and batch. Default: any."),
    ] = None,
    fp32: Annotated[
        bool, typer.Option("--fp32", help="Compute in fp32, where 1e-5 is allowed, whatever the run's precision.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Train a configuration in miniature on this CPU, in its layout and on one rank, and compare the numbers.

    The layout, the ZeRO stage, the precision and the features are the run's own, sizes and degrees small; engine,
    DeepSpeed and checkpoints are the real ones. No data and no GPU are needed. Exits with 0 if all is equal, 1 if not.

    \b
    megalm parity --ranks 64 --deepspeed_config zero1.json parallel.tensor=8 parallel.sequence=true
    """
    device = ANY_DEVICE if gpu is None else gpu_by_name(gpu)
    files = read_settings(config, overrides or [], deepspeed_config, resume=False, ranks=ranks or 1)
    own = files.loaded.config
    ranks = ranks or own.documented.devices or own.parallel.fewest_ranks
    case = make_case(files, ranks, device, fp32)
    began = time.monotonic()
    with ProgressBar("comparing", PARTS) as bar:
        report = run_parity(case, bar.advance)
    seconds = time.monotonic() - began
    if as_json:
        echo_text(json.dumps(_as_json(case, report, seconds), indent=2))
    else:
        echo(_text(case, report, seconds))
    if not report.equal:
        raise typer.Exit(EXIT_FAILED)


def _as_json(case: ParityCase, report: ParityReport, seconds: float) -> dict[str, Any]:
    run = case.run

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no nan

    return {
        "verdict": "equal" if report.equal else "not equal",
        "failure": report.failure,
        "layout": asdict(run.topology) | {"data": run.topology.data},
        "zero_stage": run.zero_stage,
        "precision": run.precision,
        "comparisons": [
            {**asdict(line), "difference": number(line.difference), "equal": line.equal} for line in report.lines
        ],
        "losses": [[number(value) for value in pair] for pair in report.losses],
        "norms": [[number(value) for value in pair] for pair in report.norms],
        "changes": [asdict(change) for change in case.changes],
        "not_shown": list(case.not_shown),
        "seconds": round(seconds, 1),
    }


def _text(case: ParityCase, report: ParityReport, seconds: float) -> str:
    sections = {
        "Verdict": "\n".join(_verdict(case, report)),
        "Compared": f"{_layout(case)} with one rank, in {format_duration(seconds)}",
        **({"Steps": _steps(report), "Differences": _differences(report)} if report.lines else {}),
        "Smaller or otherwise here": "\n".join(map(str, case.changes)) or "nothing",
        "Not shown": "\n".join(case.not_shown),
    }
    return sections_text(sections)


def _verdict(case: ParityCase, report: ParityReport) -> list[str]:
    if report.failure is not None:
        return ["not equal", report.failure]
    different = [f"- {line.what} differ from {line.against}" for line in report.lines if not line.equal]
    return ["not equal", *different, *dropped_by_rounding(case.run)] if different else ["equal"]


def _layout(case: ParityCase) -> str:
    run, topology = case.run, case.run.topology
    sequence = " with sequence parallelism" if run.config.parallel.sequence else ""
    return (
        f"{topology.world_size} ranks ({topology}"
        f"{sequence}), ZeRO {run.zero_stage}, {run.precision}, batch {run.batch.global_batch}"
    )


def _steps(report: ParityReport) -> str:
    rows: list[list[object]] = [
        [step, *(f"{value:.6f}" for value in (*losses, *norms))]
        for step, (losses, norms) in enumerate(zip(report.losses, report.norms, strict=True), start=1)
    ]
    return table(["step", "loss", "one rank", "gradient norm", "one rank"], rows)


def _differences(report: ParityReport) -> str:
    rows: list[list[object]] = [
        [line.what, line.against, _shown(line.difference, line), _shown(line.allowed, line), _word(line)]
        for line in report.lines
    ]
    return table(["numbers", "compared with", "difference", "allowed", ""], rows)


def _shown(value: float, line: Line) -> str:
    return f"{value:.0f} elements" if line.unit == "elements" else f"{value:.0e}" if value else "0"


def _word(line: Line) -> str:
    return "equal" if line.equal else "DIFFERS"
