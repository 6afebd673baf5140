"""`megalm checkpoint`: list, inspect, verify, mark, compare, delete, copy, fetch, convert and average checkpoints.

All commands except `diff`, `convert` and `average` read only JSON and bytes, and need no torch.
"""

from __future__ import annotations

import datetime
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from megalm.checkpoint.copies.copy_process import CopyRequest, copy_now
from megalm.checkpoint.copies.copy_status import CopyStatus
from megalm.checkpoint.copies.copy_store import COPY_SCHEMES, CopyStore
from megalm.checkpoint.copies.fetch import fetch_copy
from megalm.checkpoint.discovery import (
    BEST,
    LATEST,
    Entry,
    first_whole,
    list_checkpoints,
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
from megalm.cli.find_run import checkpoint_at, find_run, verify, warn
from megalm.cli.options import Place, Precision, Run, StoredPrecision
from megalm.errors import CheckpointError, ConfigError, TrainingError
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.runs.run_folder import CONFIG_FILE, RunFolder, read_deepspeed_settings, read_mapping
from megalm.utils.formatting import format_bytes, table
from megalm.utils.progress import ProgressBar, sizes
from megalm.utils.remote_files import check_address, is_remote, tried_again
from megalm.utils.terminal import echo

_COLUMNS = ("name", "step", "tokens", "created", "size", "validation loss", "over", "status", "")
_PATIENCE_SECONDS = 60.0  # for a server that does not answer
_LONGEST_VALUE = 76  # characters; a line with its name has up to 100

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_command(run: Run) -> None:
    """List a run's checkpoints by step, with the validation loss, its number of tokens, and whether they are copied.

    Also of a run's copies: megalm checkpoint list s3://BUCKET/FOLDER/RUN
    """
    if is_remote(run):
        _list_copies(run)
        return
    run_dir = find_run(run)
    checkpoints = run_dir / "checkpoints"
    folders = step_folders(checkpoints)
    if not folders:
        echo(f"{run_dir} has no checkpoints yet")
        return
    entries = {entry.path: entry for entry in list_checkpoints(checkpoints)}
    marks = {LATEST: read_pointer(checkpoints, LATEST), BEST: read_pointer(checkpoints, BEST) or _lowest_loss(entries)}
    copies = CopyStatus.read(run_dir)
    rows = [_row(folder, entries.get(folder), marks, folder.name in copies.copied) for folder in folders]
    echo(table(_COLUMNS, rows))
    if copies.address:
        elsewhere = sorted(copies.copied.keys() - {folder.name for folder in folders})
        echo(
            f"copies in {copies.address}: {len(copies.copied)}{', also of ' if elsewhere else ''}{', '.join(elsewhere)}"
        )
    damaged = [problem for entry in entries.values() if (problem := entry.damage())]
    if damaged:
        raise CheckpointError(f"{len(damaged)} checkpoints are damaged: {damaged[0]}")


def _list_copies(address: str) -> None:
    entries = _store(address).entries()
    echo(
        table(_COLUMNS, [_row(entry.path, entry, {}, True) for entry in entries])
        if entries
        else f"{address}: no copies"
    )


@app.command("show")
def show_command(place: Place) -> None:
    """Show a checkpoint: its manifest, and whether its files have their full size."""
    folder = checkpoint_at(place)
    manifest = read_manifest(folder)
    facts = [
        [name, _plain(_created(manifest) if name == "created" else value)]
        for name, value in manifest.content.items()
        if name not in ("files", "tensors")
    ]
    echo(table(["checkpoint", str(folder)], [*facts, ["tensors", f"{len(manifest.tensors)} parameters"]]))
    if segments := manifest.schedule.segments:
        rates = [["learning rate", str(ScheduleSegment.of(stored))] for stored in segments]
        echo("\n" + table(["schedule", ""], rates))
    rows = [
        [name, format_bytes(stored.bytes), _presence(folder / name, stored.bytes)]
        for name, stored in manifest.files.items()
    ]
    echo("\n" + table(["file", "size", "on disk"], rows))
    if problem := wrong_file(folder, manifest):
        raise CheckpointError(problem)


@app.command("verify")
def verify_command(
    path: Path = typer.Argument(help="A checkpoint folder, or a run folder for all its checkpoints."),
) -> None:
    """Hash every file and compare it with the manifest."""
    path = resolve_pointer(path)
    entries = (
        [Entry.read(path)] if (path / MANIFEST).exists() else list_checkpoints(find_run(str(path)) / "checkpoints")
    )
    problems = []
    for entry in entries:
        problem = entry.damage()
        if not problem and entry.manifest is not None:
            with ProgressBar(f"checking {entry.path.name}", hashed_blocks(entry.manifest)) as counter:
                problem = damaged_file(entry.path, entry.manifest, on_progress=counter.advance)
        echo(f"{entry.path}: {problem or 'every file is intact'}")
        problems += [problem] if problem else []
    if not entries:
        raise CheckpointError(f"{path} has no complete checkpoint")
    if problems:
        raise CheckpointError(f"{len(problems)} of {len(entries)} checkpoints are damaged: {problems[0]}")


@app.command("mark-bad")
def mark_bad_command(
    path: Path = typer.Argument(help="A checkpoint folder."),
    reason: str = typer.Option(None, help="The reason; later messages about the checkpoint show it."),
    good: bool = typer.Option(False, "--good", help="Remove the mark: --resume takes the checkpoint again."),
) -> None:
    """Mark a checkpoint bad, so that --resume never takes it."""
    path = resolve_pointer(path)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a checkpoint; `megalm checkpoint list RUN` lists them")
    if not (reason or good):
        raise CheckpointError(f"{path}: a mark needs a reason; add --reason TEXT")
    set_status(path, "good" if good else "bad", reason)
    echo(f"{path}: marked {'good' if good else 'bad'}{f' ({reason})' if reason else ''}")


@app.command("diff")
def diff_command(first: Place, second: Path = typer.Argument(help="Another run or checkpoint, of any layout.")) -> None:
    """Compare two checkpoints: their manifests, their configurations and their tensors."""
    from megalm.checkpoint.checkpoint_reader import CheckpointReader
    from megalm.checkpoint.diff import different_facts, different_shapes, largest_differences  # imports torch

    readers = CheckpointReader(checkpoint_at(first)), CheckpointReader(checkpoint_at(second))
    facts = different_facts(*(_with_config(reader.path, reader.manifest) for reader in readers))
    titles = [str(reader.path) for reader in readers]
    echo(table(["key", *titles], facts) if facts else "the manifests and configurations do not differ")
    if shapes := different_shapes(*readers):
        echo("\n" + table(["shape", *titles], shapes))
    with ProgressBar("comparing", len(readers[0].shapes())) as counter:
        differences = largest_differences(*readers, counter.advance)
    kinds = list(dict.fromkeys(kind for row in differences.values() for kind in row))
    rows = [
        [part, *(f"{row[kind]:.3g}" if kind in row else None for kind in kinds)] for part, row in differences.items()
    ]
    echo("\n" + table(["largest absolute difference", *kinds], rows))


@app.command("prune")
def prune_command(
    run: Run,
    keep_last: int = typer.Option(..., min=1, help="Keep this many good checkpoints, those written last."),
    keep_every: int = typer.Option(
        None, min=1, help="Also keep every good checkpoint whose step is a multiple of this."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only list the checkpoints to delete."),
) -> None:
    """Delete old checkpoints. Keeps the best one, and suspect and bad ones newer than the kept good ones."""
    checkpoints = find_run(run) / "checkpoints"
    gone = prune(checkpoints, Retention(keep_last, keep_every, keep_best=True), dry_run=dry_run)
    for path in gone:
        echo(f"{path}: {'would be deleted' if dry_run else 'deleted'}")
    if not gone:
        echo(f"{checkpoints}: nothing to delete")


@app.command("copy")
def copy_command(
    run: Run,
    address: str = typer.Argument(
        help="s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or a folder; the copies are in RUN/ there."
    ),
    keep_last: int = typer.Option(
        None, min=1, help="Keep this many good copies, and the best; default: all of the run's checkpoints."
    ),
) -> None:
    """Copy a run's good checkpoints to another place, as checkpoint.copy_to does; those that are there are left out."""
    run_dir = find_run(run).resolve()
    check_address(address, "ADDRESS", COPY_SCHEMES)
    if not is_remote(address) and not Path(address).is_dir():
        raise ConfigError(f"{address} does not exist; create or mount the folder")
    files = tuple(path.name for path in RunFolder(run_dir).small_files)
    request = CopyRequest(run_dir, address, Retention(keep_last, keep_best=True), files)
    with ProgressBar("copying", None, shown=sizes) as bar:

        def show(status: CopyStatus) -> None:
            if status.copying:
                bar.begin(f"copying {status.copying}", status.bytes_total)
                bar.update(status.bytes_done)

        status = copy_now(request, _PATIENCE_SECONDS, show)
    for notice in status.notices:
        warn(notice)
    names = sorted(status.copied)
    echo(f"{status.address}: {len(names)} copies{': ' if names else ''}{', '.join(names)}")
    if status.notices:
        raise CheckpointError(f"{len(status.notices)} checkpoints of {run_dir} are damaged and not copied")


@app.command("fetch")
def fetch_command(
    address: str = typer.Argument(help="A run's copies: s3://BUCKET/FOLDER/RUN."),
    step: str = typer.Argument("latest", help="A step, or latest: the good copy that was written last."),
    root: Path = typer.Option(Path("runs"), help="The folder to make the run folder in."),
) -> None:
    """Copy a checkpoint back, with the run's settings and metrics, into RUN/ under --root."""
    store, name = _store(address), address.rstrip("/").rpartition("/")[2]
    entries = [entry for entry in store.entries() if entry.manifest is not None]
    wanted = [entry for entry in entries if (entry.status == "good" if step == "latest" else str(entry.step) == step)]
    if not wanted:
        known = ", ".join(str(entry.step) for entry in entries) or "none"
        raise CheckpointError(f"{address} has no good copy of {step}; steps: {known}")
    if (root / name / "checkpoints" / wanted[-1].path.name).exists():
        raise CheckpointError(
            f"{root / name} has {wanted[-1].path.name} already; move it away, or choose another --root"
        )
    echo(str(fetch_copy(root / name, store, wanted[-1], lambda line: echo(line, err=True))))


def _store(address: str) -> CopyStore:
    """The copies of a run at its own address."""
    check_address(address, "ADDRESS", COPY_SCHEMES)
    parent, _, name = address.rstrip("/").rpartition("/")
    store = CopyStore(parent, name)
    tried_again(store.entries, address, _PATIENCE_SECONDS)
    return store


@app.command("convert")
def convert_command(
    place: Place,
    output: Path = typer.Argument(help="The safetensors file to write."),
    dtype: StoredPrecision = Precision.fp32,
) -> None:
    """Write the weights to one safetensors file by canonical name, with one parameter in memory at a time."""
    from megalm.checkpoint.checkpoint_reader import CheckpointReader

    if output.exists():
        raise CheckpointError(f"{output} exists; name another file, or remove this one")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent}: no such folder; create it first")
    reader = CheckpointReader(checkpoint_at(place))
    verify(reader)
    parameters = len(reader.shapes())
    with ProgressBar("writing", parameters) as counter:
        written = reader.write_weights(output, dtype.dtype, counter.advance)
    echo(f"{output}: {parameters} parameters of {reader.path} in {dtype.value}, {format_bytes(written)}")


@app.command("average")
def average_command(
    run: Run,
    steps: Annotated[
        list[str],
        typer.Argument(
            metavar="STEP...", help="Two or more: steps, best, latest, or paths of other runs' checkpoints."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="The folder to create; it may exist if empty.")],
) -> None:
    """Average the weights of checkpoints into a new one.

    The new folder has one checkpoint, with the mean of the fp32 weights and no
    optimizer state. `megalm evaluate`, `generate` and `export` take it, and a
    new run starts from it at step 0, with the command printed at the end.

    \b
    megalm checkpoint average runs/small 300 350 400 --output runs/small-average
    megalm evaluate runs/small-average
    """
    from megalm.checkpoint.average import WeightAverage  # imports torch
    from megalm.checkpoint.checkpoint_reader import CheckpointReader
    from megalm.huggingface.output_folder import complete_folder, require_free

    require_free(output)
    checkpoints = find_run(run) / "checkpoints"
    readers = []
    for step in steps:
        path, _ = first_whole(checkpoints, step)
        if path is None:
            raise CheckpointError(f"{checkpoints} has no checkpoint yet")
        readers.append(CheckpointReader(path))
        if readers[-1].manifest.mark:
            warn(f"{path} is {readers[-1].manifest.mark}")
    average = WeightAverage(readers)
    for reader in readers:
        verify(reader)
    with ProgressBar("averaging", average.parameters) as counter:

        def fill(folder: Path) -> str:
            try:
                return average.write(folder / "checkpoints", output.resolve().name, counter.advance).name
            except TrainingError as error:  # its message is about training
                raise (error.__cause__ or error) from None

        made = output / "checkpoints" / complete_folder(output, average.bytes, fill)
    echo(f"{made}: the mean of the weights of {len(readers)} checkpoints")
    echo(
        f"start a run from it with run.name=NEW --resume {shlex.quote(str(made))} --extend-steps N "
        "--extend-strategy weights"
    )


def _with_config(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest with the configuration files beside it."""
    files = {"config": read_mapping(path / CONFIG_FILE), "deepspeed": read_deepspeed_settings(path)}
    return {**manifest.content, **files}


def _row(folder: Path, entry: Entry | None, marks: Mapping[str, str | None], is_copied: bool) -> list[object]:
    note = " ".join(
        [*(word for word, name in marks.items() if name == folder.name), *(["copied"] if is_copied else [])]
    )
    if entry is None:
        return [folder.name, *[None] * 6, "incomplete", note]
    manifest = entry.manifest
    if manifest is None:
        return [folder.name, entry.step, *[None] * 5, "damaged", note]
    loss, over, whole = manifest.validation_loss, manifest.validation_tokens, manifest.whole_validation_loss
    complete = None if whole is None else f"{whole:.4f} over {manifest.whole_validation_tokens:,}"
    return [
        folder.name,
        entry.step,
        manifest.tokens,
        _created(manifest),
        format_bytes(manifest.bytes),
        None if loss is None else f"{loss:.4f}",
        None if over is None else f"{over:,}",
        "damaged" if entry.damage() else entry.status,
        " ".join(filter(None, [note, complete, manifest.status_reason])),
    ]


def _lowest_loss(entries: Mapping[Path, Entry]) -> str | None:
    """The good checkpoint with the lowest loss, among losses over the most common number of tokens."""
    known = [
        (loss, path.name, manifest.validation_tokens)
        for path, entry in entries.items()
        if (manifest := entry.manifest) is not None and manifest.status == "good"
        if (loss := manifest.validation_loss) is not None and math.isfinite(loss)
    ]
    if not known:
        return None
    (over, count), *_ = Counter(over for _, _, over in known).most_common(1)
    if count == 1 < len(known):  # no two losses have the same number of tokens
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
