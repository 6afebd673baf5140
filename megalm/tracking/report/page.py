"""One page about a run: a single HTML file without scripts, images or other files to load.

It is rendered from a template; the template engine escapes all content.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from megalm.errors import ConfigError
from megalm.runs.metrics_log import ReadBatches, read_batches
from megalm.runs.run_folder import ResumeCommand, RunFolder
from megalm.tracking.report.curves import charts, event_step
from megalm.tracking.report.headline import moment, numbers, outcome
from megalm.tracking.report.notable_events import findings
from megalm.tracking.report.run_data import ReportData, read_run, step_of_file, text_of
from megalm.tracking.report.svg_chart import FRAME
from megalm.utils.addresses import hide_credentials_in_word
from megalm.utils.atomic_files import refuse_overwriting_inputs, write_atomically, writing_to
from megalm.utils.formatting import format_bytes, format_duration

REPORT_FILE = "report.html"
_TEMPLATE = "page.html"
_SAMPLE_BYTES = 12_000


def write_report(run_dir: Path, output: Path | None = None, read: ReadBatches = read_batches) -> Path:
    """Write the page of a run, which may still be training; return its path.

    Args:
        output: None: report.html in the run folder.

    Raises:
        ConfigError: there is no run folder, its configuration is damaged, or the page cannot be written, or `output` is
            a file of the run.
        DataError: a line of metrics.jsonl before the last is damaged.
    """
    path = output or run_dir / REPORT_FILE
    refuse_overwriting_inputs([path], RunFolder(run_dir).records)
    now = time.time()
    content = render(read_run(run_dir, now, read), now).encode("utf-8", errors="replace")
    with writing_to(path, "choose another path with --output", ConfigError):
        write_atomically(path, lambda file: file.write(content), durable=False)
    return path


def render(run: ReportData, now: float) -> str:
    """Return the complete page as HTML, as of unix time `now`."""
    history = run.history
    return template(_TEMPLATE).render(
        run=run,
        outcome=outcome(run, now),
        made=moment(now),
        numbers=numbers(run),
        charts=charts(history),
        frame=FRAME,
        unusual=findings(run),
        experts=_experts(run),
        work=_work(run),
        profile=_profile(run.profile),
        samples=_samples(run.samples),
        differing=[setting for setting in run.settings if setting.base is not None],
        all_settings=[(setting.name, setting.value) for setting in run.settings],
        base=f"the preset {run.preset}" if run.preset else "the defaults",
        deepspeed=json.dumps(run.deepspeed, indent=2, ensure_ascii=False) if run.deepspeed else "",
        changes=_changes(run),
        environment=_environment(run.environment),
        data=_data(run),
        commands=next_commands(run),
    )


def template(name: str) -> jinja2.Template:
    """Return a template of this folder; it escapes all that is put into it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "duration": format_duration}
    return environment.get_template(name)


def _work(run: ReportData) -> list[tuple[str, float, float]]:
    """Return name, seconds and share of the total time of each activity."""
    starts = [row.get("startup_seconds") for row in run.events("start", "resume")]
    known = [seconds for seconds in starts if isinstance(seconds, (int, float))]
    work = {**({"start-up, before the first step": float(sum(known))} if known else {}), **run.history.seconds}
    total = sum(work.values())
    return [(name, seconds, seconds / total) for name, seconds in work.items() if total and seconds > 0]


def _experts(run: ReportData) -> dict[str, Any]:
    """Return the last event `experts`: its steps, its highest load, and the load of each expert by layer."""
    rows = run.events("experts")
    load = rows[-1].get("load") if rows else None
    if not isinstance(load, dict) or not any(load.values()):
        return {}
    steps = {name: rows[-1][f"{name}_step"] for name in ("first", "last")}
    return {**steps, "layers": load, "highest": max(map(max, load.values()))}


def _profile(content: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """Return name, milliseconds and share of each part of a profiled step, and the rank that it takes longest on."""
    found = []
    for row in content.get("times", ()):
        seconds = row["rank_seconds"]
        most = max(seconds)
        longest = f"{1e3 * most:.2f} ms on rank {seconds.index(most)}" if len(seconds) > 1 else ""
        if row["hidden_seconds"]:
            longest = f"{1e3 * row['hidden_seconds']:.2f} ms more beside computation; {longest}".removesuffix("; ")
        if row["seconds"] or longest:
            found.append((str(row["part"]), 1e3 * row["seconds"], row["share"], longest))
    return found


def _samples(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the first, the middle and the last sample."""
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    found = []
    for path in (paths[index] for index in chosen):
        text, left_out = text_of(path, _SAMPLE_BYTES)
        found.append({"step": step_of_file(path), "name": path.name, "text": text, "left_out": left_out})
    return found


def _changes(run: ReportData) -> list[tuple[str, list[str]]]:
    """Return the title and the changes of each start and resume that reported any."""
    rows = [row for row in run.events("start", "resume") if row.get("changed")]
    return [
        (
            f"Attempt {row.get('attempt')}, {row.get('event')} at step {event_step(row):,}",
            [str(line) for line in row["changed"]],
        )
        for row in rows
    ]


def _environment(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts of the last attempt, the most important first."""
    packages, git = content.get("packages"), content.get("git")
    rows: list[tuple[str, object]] = [
        (name, content[key])
        for name, key in (
            ("device", "device"),
            ("ranks", "world_size"),
            ("threads per rank", "threads_per_rank"),
            ("precision", "precision"),
            ("ZeRO stage", "zero_stage"),
            ("host", "host"),
            ("platform", "platform"),
            ("Python", "python"),
        )
        if content.get(key) is not None
    ]
    if isinstance(packages, dict):
        rows += [(name, version) for name, version in packages.items() if version is not None]
    if isinstance(git, dict) and git.get("commit"):
        rows.append(("git commit", f"{git['commit']}{', with uncommitted changes' if git.get('changed') else ''}"))
    command = content.get("command")
    if isinstance(command, list):
        rows.append(("command", shlex.join(hide_credentials_in_word(str(word)) for word in command)))
    return [(name, str(value)) for name, value in rows]


def _data(run: ReportData) -> list[tuple[str, str]]:
    content = run.environment
    rows = [("training data", f"{prefix}: {part} planned" if part else prefix) for prefix, part in run.datasets]
    entropy = content.get("unigram_entropy")
    if isinstance(entropy, (int, float)):
        rows.append(("unigram entropy", f"{entropy:.4f} nats per token"))
    for name in ("data.train", "data.recipe", "data.validation", "data.split", "data.tokenizer"):
        value = run.setting(name)
        if value not in (None, "null"):
            rows.append((name, str(value)))
    fingerprints = ("dataset_fingerprint", "tokenizer_fingerprint")
    rows += [(name.replace("_", " "), str(content[name])) for name in fingerprints if content.get(name)]
    return rows


def next_commands(run: ReportData) -> list[tuple[str, str]]:
    """Return the shell commands that are useful next, with their names."""
    folder, planned = run.run_dir, run.planned_steps
    command = ResumeCommand.by_folder(folder).shell
    done = planned is not None and (run.results.steps or 0) >= planned
    words = ["--resume", "auto", *([f"train.steps={2 * planned}"] if done and planned else [])]
    rows = [("train longer" if done else "resume", command(*words))]
    if run.checkpoints:
        rows.append(("checkpoints", shlex.join(["megalm", "checkpoint", "list", str(folder)])))
        rows.append(("generate", shlex.join(["megalm", "generate", str(folder), "--prompt", "The "])))
    rows.append(("compare", shlex.join(["megalm", "compare", str(folder), "OTHER_RUN"])))
    rows.append(("this page again", shlex.join(["megalm", "report", str(folder)])))
    return rows
