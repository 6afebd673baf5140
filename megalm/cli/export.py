"""`megalm export`: write a checkpoint in Hugging Face format."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megalm.checkpoint.manifest import read_manifest
from megalm.cli.find_run import checkpoint_at, verify
from megalm.cli.options import Ema, NewFolder, Place, Precision, StoredPrecision, Tokenizer
from megalm.errors import CheckpointError
from megalm.utils.formatting import format_bytes, parse_bytes, table
from megalm.utils.progress import ProgressBar
from megalm.utils.terminal import echo


class Format(str, Enum):
    """What an export is for."""

    hf = "hf"
    gguf = "gguf"


def command(
    place: Place,
    output: NewFolder,
    dtype: StoredPrecision = Precision.fp32,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Split larger weights into several files with an index.")
    ] = "5GB",
    to: Annotated[
        Format, typer.Option("--to", help="hf: for transformers and what reads its files; gguf: for llama.cpp.")
    ] = Format.hf,
    name: Annotated[str, typer.Option(help="The model's name in its card. Default: the run's.")] = "",
    tokenizer: Tokenizer = "",
    ema: Ema = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A Jinja template for conversations, or PREFIX.json of a dataset built with one."
        ),
    ] = None,
    accept_bad: Annotated[
        bool, typer.Option("--accept-bad", help="Export a checkpoint even if it is marked bad.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the files with their sizes, and write nothing.")
    ] = False,
) -> None:
    """Write a checkpoint in Hugging Face format, which transformers loads without megalm, or as GGUF for llama.cpp.

    FOLDER gets config.json, generation_config.json, the weights as
    safetensors, the tokenizer and a model card (README.md) with facts about
    the run; with --to gguf one file, model.gguf. Hashes every file first,
    then reads the checkpoint, of any layout, one tensor at a time.

    \b
    megalm export runs/mine published/mine
    megalm export runs/mine/checkpoints/best published/mine --dtype bf16
    megalm export runs/mine published/mine-gguf --to gguf --dtype bf16
    """
    largest = parse_bytes(max_shard_size, "--max-shard-size")
    path = checkpoint_at(place)
    manifest = read_manifest(path)
    if manifest.status == "bad" and not accept_bad:
        raise CheckpointError(f"{path} is {manifest.mark}; choose another, or add --accept-bad")
    from megalm.checkpoint.checkpoint_reader import CheckpointReader
    from megalm.huggingface.config_json import family_of
    from megalm.huggingface.export_model import export_checkpoint, plan_export, planned_files
    from megalm.huggingface.weight_mapping import hf_tensors

    reader = CheckpointReader(path, ema)
    plan = plan_export(reader, output, dtype.dtype, tokenizer or None, chat_template)
    title = name or manifest.run or output.name
    if to is Format.gguf:
        from megalm.gguf.export_gguf import GGUF_FILE, check_gguf, export_gguf, gguf_bytes, gguf_tensors

        described = check_gguf(plan)
        files, tensors, note = {GGUF_FILE: gguf_bytes(plan)}, len(gguf_tensors(plan.shape)), described.note
    else:
        files, tensors, note = planned_files(plan, largest, title), len(hf_tensors(plan.shape)), ""
    if dry_run:
        _list(files, note)
        return
    verify(reader)
    with ProgressBar("writing", tensors) as counter:
        if to is Format.gguf:
            size = export_gguf(plan, described, title, counter.advance)
        else:
            exported = export_checkpoint(plan, largest, title, counter.advance)
            size, note = exported.bytes, exported.tokenizer.note
    echo(
        f"{output}: {plan.shape.parameter_count():,} parameters of {path} as {family_of(plan.shape).name} in "
        f"{dtype.value}, {format_bytes(size)}"
    )
    if ema:
        echo("the weights are their moving average")
    if note:
        echo(note)
    if manifest.mark:
        echo(f"the checkpoint is {manifest.mark}")
    if to is Format.hf:
        echo("README.md names no licence; choose one before you publish the model")


def _list(files: Mapping[str, int], note: str = "") -> None:
    """The files that an export would write."""
    rows: list[list[object]] = [[name, format_bytes(size)] for name, size in files.items()]
    echo(table(["file", "size"], [*rows, ["total", format_bytes(sum(files.values()))]]))
    if note:
        echo(note)
