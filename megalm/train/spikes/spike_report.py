"""The report of a spike: its numbers, text, largest gradients, the decision, and what to try next.

`runs/NAME/incidents/step-XXXXXXXX.json` is for programs, the same as `.md` for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.communicator import Communicator
from megalm.data.analysis.sample_sources import spans_of
from megalm.data.sampling.mixture import BlendedSamples
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.engine.interface import Engine
from megalm.errors import DataError
from megalm.runs.run_folder import ResumeCommand
from megalm.train.console import RunConsole
from megalm.train.spikes.spike_guard import Verdict

# Limits that keep a report readable: text pieces shown, and characters of each.
_SHOWN_PIECES = 40
_SHOWN_CHARACTERS = 400
_SHOWN_PARAMETERS = 20


@dataclass(frozen=True)
class SpikeReport:
    """The facts of one step that was out of bounds."""

    step: int
    attempt: int
    loss: float
    grad_norm: float
    learning_rate: float
    verdict: Verdict
    window: dict[str, Any]
    samples: tuple[int, int]  # [first, end) of its global batch
    saved_step: int


class SpikeReportWriter:
    """Writes reports into `folder`.

    Args:
        samples, tokenizer: of the text in a batch.
        invocation: the command that resumes this run; a report suggests it with further options.
    """

    def __init__(
        self,
        folder: Path,
        samples: BlendedSamples,
        tokenizer: Tokenizer,
        invocation: ResumeCommand,
        comm: Communicator,
        reporter: RunConsole,
    ) -> None:
        self._folder, self._samples, self._tokenizer = folder, samples, tokenizer
        self._invocation, self._comm, self._reporter = invocation, comm, reporter

    def write(self, engine: Engine, incident: SpikeReport) -> Path:
        """Write both files; return the path of the readable report. Collective."""
        gradients = engine.refused_gradients()
        path = self._folder / report_name(incident.step, incident.attempt)
        if self._comm.is_main:
            try:
                self._write(path, incident, gradients)
            except (OSError, DataError) as error:  # a missing report does not change the decision
                self._reporter.info(f"WARNING: cannot write the report of step {incident.step}: {error}")
        return path

    def _write(self, path: Path, incident: SpikeReport, gradients: dict[str, float]) -> None:
        self._folder.mkdir(exist_ok=True)
        first, end = incident.samples
        documents = [
            {
                "sample": piece.sample,
                "dataset": str(piece.prefix),
                "document": piece.document,
                "source": None if piece.source is None else str(piece.source),
                "first_token": piece.first,
                "end_token": piece.end,
                "text": self._tokenizer.decode(list(piece.tokens)),
            }
            for piece in spans_of(self._samples, first, end - first)
        ]
        largest = sorted(gradients.items(), key=lambda item: -item[1])
        try_next = next_command(self._invocation, incident)
        finding = incident.verdict.finding
        facts: dict[str, Any] = {
            "step": incident.step,
            "attempt": incident.attempt,
            "loss": incident.loss,
            "grad_norm": incident.grad_norm,
            "learning_rate": incident.learning_rate,
            "finding": finding.as_json() if finding else None,
            "window": incident.window,
            "samples": {"first": first, "end": end},
            "documents": documents,
            "gradient_norms": dict(largest),
            "decided": incident.verdict.action,
            "why": incident.verdict.why,
            "next_command": try_next,
        }
        path.with_suffix(".json").write_text(
            json.dumps(_strict(facts), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        path.write_text("\n".join(_readable(incident, documents, largest, try_next)) + "\n", encoding="utf-8")


def report_name(step: int, attempt: int) -> str:
    """Return the report's file name; it has the attempt, so that a later attempt does not overwrite earlier reports."""
    return f"step-{step:08d}.md" if attempt == 1 else f"step-{step:08d}.attempt-{attempt}.md"


def next_command(invocation: ResumeCommand, incident: SpikeReport) -> str:
    """Return the command to try first."""
    if incident.verdict.action in ("skip", "rollback"):
        return "none: the run continues by itself"
    if incident.saved_step == 0:
        return invocation.shell("--resume", "auto", f"schedule.peak_learning_rate={incident.learning_rate / 2:.2g}")
    behind = incident.step - incident.saved_step
    return invocation.shell("--resume", str(incident.saved_step), "--skip-steps", str(behind))


def _readable(
    incident: SpikeReport, documents: Sequence[dict[str, Any]], largest: Sequence[tuple[str, float]], try_next: str
) -> list[str]:
    window, verdict = incident.window, incident.verdict
    why = f" ({verdict.why})" if verdict.why else ""
    first, end = incident.samples
    lines = [
        f"# Step {incident.step}: {verdict.finding}",
        "",
        f"Decided: **{verdict.action}**{why}. Next command to try: `{try_next}`",
        "",
        "| | this step | median of the window | deviation | highest |",
        "|---|---|---|---|---|",
        f"| loss | {incident.loss:.4f} | {_of(window, 'loss')} |",
        f"| gradient norm | {incident.grad_norm:.4g} | {_of(window, 'grad_norm', ' (of the logarithm)')} |",
        "",
        f"The window holds {window['steps']} steps; the learning rate was {incident.learning_rate:.3g}; "
        f"attempt {incident.attempt}; samples {first} to {end - 1}.",
        "",
        "## Parameters with the largest gradients",
        "",
    ]
    lines += [f"- `{name}` {norm:.4g}" for name, norm in largest[:_SHOWN_PARAMETERS]]
    lines += [] if largest else ["None: the gradient is not finite, or the guard let the update pass."]
    lines += ["", "## Text of the batch", ""]
    for it in documents[:_SHOWN_PIECES]:
        origin = it["source"] or f"document {it['document']} of {it['dataset']}"
        lines += [
            f"### Sample {it['sample']}: {origin}, tokens {it['first_token']} to {it['end_token'] - 1}",
            "",
            *("    " + line for line in it["text"][:_SHOWN_CHARACTERS].splitlines()),
            "",
        ]
    if len(documents) > _SHOWN_PIECES:
        lines.append(f"{len(documents) - _SHOWN_PIECES} more pieces are in the JSON file beside this one.")
    return lines


def _of(window: dict[str, Any], name: str, scale: str = "") -> str:
    if f"{name}_median" not in window:
        return "none yet | | "
    return f"{window[f'{name}_median']:.4g} | {window[f'{name}_sigma']:.3g}{scale} | {window[f'{name}_max']:.4g}"


def _strict(value: Any) -> Any:
    """Replace numbers that are not finite by strings: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value
