"""`megalm checkpoint`: what is saved, whether it is whole, and what becomes of it.

All but `diff` and `convert` read JSON and bytes only: they need no torch.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from megalm.checkpoint.discovery import (
    BEST,
    LATEST,
    Entry,
    list_checkpoints,
    read_entry,
    read_pointer,
    resolve_pointer,
    step_folders,
)
from megalm.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    damaged_file,
    hashed_blocks,
    read_manifest,
    set_status,
    wrong_file,
)
from megalm.checkpoint.retention import Retention, prune
from megalm.cli.find_run import checkpoint_at, find_run, verify
from megalm.cli.options import Precision
from megalm.errors import CheckpointError
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.runs.run_folder import CONFIG_FILE, DEEPSPEED_FILE, read_mapping
from megalm.utils.formatting import format_bytes, table
from megalm.utils.progress import ProgressBar

_LONGEST_VALUE = 76  # with its name within a hundred columns

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_command(run: str = typer.Argument(help="Run folder, or a name under runs/.")) -> None:
    """List a run's checkpoints in the order of their steps; a loss stands beside the tokens that it is over."""
    run_dir = find_run(run)
    checkpoints = run_dir / "checkpoints"
    folders = step_folders(checkpoints)
    if not folders:
        typer.echo(f"{run_dir}: no checkpoints yet")
        return
    entries = {entry.path: entry for entry in list_checkpoints(checkpoints)}
    marks = {LATEST: read_pointer(checkpoints, LATEST), BEST: read_pointer(checkpoints, BEST) or _lowest_loss(entries)}
    rows = [_row(folder, entries.get(folder), marks) for folder in folders]
    typer.echo(table(["name", "step", "tokens", "created", "size", "validation loss", "over", "status", ""], rows))
    damaged = [problem for entry in entries.values() if (problem := _problem(entry))]
    if damaged:
        raise CheckpointError(f"{len(damaged)} damaged: {damaged[0]}")


@app.command("show")
def show_command(path: Path = typer.Argument(help="Checkpoint folder, or a run folder for its newest.")) -> None:
    """Show one checkpoint: where training was, and whether its files are there in full size."""
    folder = checkpoint_at(path)
    manifest = read_manifest(folder)
    facts = [
        [name, _plain(_created(manifest) if name == "created" else value)]
        for name, value in manifest.content.items()
        if name not in ("files", "tensors")
    ]
    typer.echo(table(["checkpoint", str(folder)], [*facts, ["tensors", f"{len(manifest.tensors)} parameters"]]))
    if segments := manifest.schedule.segments:
        rates = [["learning rate", str(ScheduleSegment.of(stored))] for stored in segments]
        typer.echo("\n" + table(["in force", ""], rates))
    rows = [
        [name, format_bytes(stored.bytes), _presence(folder / name, stored.bytes)]
        for name, stored in manifest.files.items()
    ]
    typer.echo("\n" + table(["file", "size", "on disk"], rows))
    if problem := wrong_file(folder, manifest):
        raise CheckpointError(problem)


@app.command("verify")
def verify_command(path: Path = typer.Argument(help="Checkpoint folder, or a run folder for all of its.")) -> None:
    """Hash every file and compare it with what the manifest says."""
    path = resolve_pointer(path)
    entries = (
        [read_entry(path)] if (path / MANIFEST).exists() else list_checkpoints(find_run(str(path)) / "checkpoints")
    )
    problems = []
    for entry in entries:
        problem = _problem(entry)
        if not problem and entry.manifest is not None:
            with ProgressBar(f"checking {entry.path.name}", hashed_blocks(entry.manifest)) as counter:
                problem = damaged_file(entry.path, entry.manifest, on_progress=counter.advance)
        typer.echo(f"{entry.path}: {problem or 'every file is as it was written'}")
        problems += [problem] if problem else []
    if not entries:
        raise CheckpointError(f"{path}: no complete checkpoint there")
    if problems:
        raise CheckpointError(f"{len(problems)} of {len(entries)} damaged: {problems[0]}")


@app.command("mark-bad")
def mark_bad_command(
    path: Path = typer.Argument(help="Checkpoint folder."),
    reason: str = typer.Option(None, help="Why; it is kept with the mark and shown when somebody asks for it."),
    good: bool = typer.Option(False, "--good", help="Undo it: mark it good again."),
) -> None:
    """Keep --resume from ever taking a checkpoint (with --good: let it again)."""
    path = resolve_pointer(path)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: no checkpoint; `megalm checkpoint list RUN` names them")
    if not (reason or good):
        raise CheckpointError(f"{path}: a mark needs its reason; add --reason TEXT")
    set_status(path, "good" if good else "bad", reason)
    typer.echo(f"{path}: marked {'good' if good else 'bad'}{f' ({reason})' if reason else ''}")


@app.command("diff")
def diff_command(
    first: Path = typer.Argument(help="Checkpoint folder, or a run folder for its newest."),
    second: Path = typer.Argument(help="Another one; any layout."),
) -> None:
    """What two checkpoints say differently of themselves, and how far their tensors are apart."""
    from megalm.checkpoint.checkpoint_reader import CheckpointReader
    from megalm.checkpoint.diff import different_facts, different_shapes, largest_differences  # imports torch

    readers = CheckpointReader(checkpoint_at(first)), CheckpointReader(checkpoint_at(second))
    facts = different_facts(*(_account(reader.path, reader.manifest) for reader in readers))
    titles = [str(reader.path) for reader in readers]
    typer.echo(table(["said of it", *titles], facts) if facts else "both say the same of themselves")
    if shapes := different_shapes(*readers):
        typer.echo("\n" + table(["shape", *titles], shapes))
    with ProgressBar("comparing", len(readers[0].shapes())) as counter:
        differences = largest_differences(*readers, counter.advance)
    rows = [[part, *(f"{value:.3g}" for value in row.values())] for part, row in differences.items()]
    kinds = list(next(iter(differences.values()), {}))
    typer.echo("\n" + table(["largest absolute difference", *kinds], rows))


@app.command("prune")
def prune_command(
    run: str = typer.Argument(help="Run folder, or a name under runs/."),
    keep_last: int = typer.Option(..., min=1, help="Keep so many good ones, those written last."),
    keep_every: int = typer.Option(None, min=1, help="And every good one whose step divides by this."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would go."),
) -> None:
    """Delete old checkpoints. The best one stays, and suspect and bad ones newer than what is kept."""
    checkpoints = find_run(run) / "checkpoints"
    gone = prune(checkpoints, Retention(keep_last, keep_every, keep_best=True), dry_run=dry_run)
    for path in gone:
        typer.echo(f"{path}: {'would go' if dry_run else 'deleted'}")
    if not gone:
        typer.echo(f"{checkpoints}: nothing to delete")


@app.command("convert")
def convert_command(
    path: Path = typer.Argument(help="Checkpoint folder, or a run folder for its newest."),
    output: Path = typer.Argument(help="The safetensors file to write."),
    dtype: Precision = typer.Option(Precision.fp32, help="fp32 is exact; bf16 is rounded."),
) -> None:
    """Write the whole weights as one safetensors file, by canonical name, one parameter in memory at a time."""
    import torch

    from megalm.checkpoint.checkpoint_reader import CheckpointReader

    if output.exists():
        raise CheckpointError(f"{output} exists; name another file, or remove it")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent}: no such folder; make it first")
    reader = CheckpointReader(checkpoint_at(path))
    verify(reader)
    stored, parameters = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype.value], len(reader.shapes())
    with ProgressBar("writing", parameters) as counter:
        written = reader.write_weights(output, stored, counter.advance)
    typer.echo(f"{output}: {parameters} parameters of {reader.path} in {dtype.value}, {format_bytes(written)}")


def _account(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest, with the configuration that is kept beside it."""
    kept = {"config": read_mapping(path / CONFIG_FILE), "deepspeed": read_mapping(path / DEEPSPEED_FILE)}
    return {**manifest.content, **kept}


def _problem(entry: Entry) -> str:
    return entry.problem if entry.manifest is None else wrong_file(entry.path, entry.manifest)


def _row(folder: Path, entry: Entry | None, marks: Mapping[str, str | None]) -> list[object]:
    note = " ".join(word for word, name in marks.items() if name == folder.name)
    if entry is None:
        return [folder.name, *[None] * 6, "incomplete", note]
    manifest = entry.manifest
    if manifest is None:
        return [folder.name, entry.step, *[None] * 5, "damaged", note]
    loss, over, whole = manifest.validation_loss, manifest.validation_tokens, manifest.whole_validation_loss
    told = None if whole is None else f"{whole:.4f} over {manifest.whole_validation_tokens:,}"
    return [
        folder.name,
        entry.step,
        manifest.tokens,
        _created(manifest),
        format_bytes(manifest.bytes),
        None if loss is None else f"{loss:.4f}",
        None if over is None else f"{over:,}",
        "damaged" if _problem(entry) else entry.status,
        " ".join(filter(None, [note, told, manifest.status_reason])),
    ]


def _lowest_loss(entries: Mapping[Path, Entry]) -> str | None:
    """Of the good ones; losses over a part of the validation sets and over all of them are not compared."""
    known = [
        (loss, path.name, manifest.validation_tokens)
        for path, entry in entries.items()
        if (manifest := entry.manifest) is not None and manifest.status == "good"
        if (loss := manifest.validation_loss) is not None and math.isfinite(loss)
    ]
    if not known:
        return None
    (over, count), *_ = Counter(over for _, _, over in known).most_common(1)
    if count == 1 < len(known):  # no two can be compared
        return None
    return min((loss, name) for loss, name, of in known if of == over)[1]


def _presence(file: Path, expected_bytes: int) -> str:
    if not file.is_file():
        return "missing"
    found = file.stat().st_size
    return "ok" if found == expected_bytes else f"{found} bytes instead of {expected_bytes}"


def _created(manifest: Manifest) -> object:
    """Unix seconds or text, as text."""
    seconds = manifest.created_at
    if isinstance(manifest.created, str) or seconds is None:
        return manifest.created
    try:
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return manifest.created


def _plain(value: Any) -> str:
    """One line; the long ones are for programs to read."""
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, Mapping) and not any(isinstance(part, (Mapping, list)) for part in value.values()):
        text = ", ".join(f"{name} {part}" for name, part in value.items())
    if len(text) <= _LONGEST_VALUE:
        return text
    cut = f"... ({len(text)} characters)"
    return text[: _LONGEST_VALUE - len(cut)] + cut
