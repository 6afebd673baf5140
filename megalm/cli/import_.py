"""`megalm import`: a model in Hugging Face form as a starting point."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.options import NewFolder
from megalm.utils.progress import ProgressBar


def command(
    source: Annotated[
        Path, typer.Argument(metavar="HF_FOLDER", help="Local: config.json, *.safetensors, tokenizer.json.")
    ],
    output: NewFolder,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or .model, where HF_FOLDER has none; default: its own."),
    ] = None,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(help="Of config.json: a key that you know to change nothing. May be repeated."),
    ] = None,
) -> None:
    """Make a starting point of a model in Hugging Face form (Llama, Qwen3, GPT-2).

    FOLDER gets a checkpoint of the weights in megalm's own format, which every
    layout loads, model.yaml for --config, and the tokenizer. There are no
    moments: a run starts from it at step 0, by the command that is told at the
    end. What config.json says and megalm's model cannot do is refused by name.

    \b
    megalm import downloads/gpt2 runs/gpt2
    megalm generate runs/gpt2 --prompt "Once"
    """
    from megalm.huggingface.output_folder import require_free

    require_free(output)
    from megalm.huggingface.import_model import import_model
    from megalm.huggingface.pretrained_folder import HuggingFaceFolder

    found = HuggingFaceFolder(source, ignore_key or ())
    with ProgressBar("writing", len(found.shape.parameters())) as counter:
        made = import_model(found, output, tokenizer, counter.advance)
    shape = found.shape
    typer.echo(f"{output}: {shape.parameter_count():,} parameters of {source}, style {shape.style}, as fp32 masters")
    entries, vocabulary = made.tokenizer.vocab_size, shape.vocab_size
    rows = f", of {vocabulary:,} rows that the model has" if entries != vocabulary else ""
    typer.echo(f"{made.tokenizer.name}: {entries:,} ids{rows}; a document ends with id {made.tokenizer.eod_id}")
    for note in made.notes:
        typer.echo(f"note: {note}")
    for name, line in (
        ("try it", f'megalm generate {_typed(output)} --prompt "Once"'),
        (
            "its data",
            f"python data_tools/build_dataset.py --input TEXT --tokenizer {_typed(made.tokenizer.spec)} "
            "--output-prefix data/mine",
        ),
        (
            "train on",
            f"deepspeed launch/pretrain.py --config {_typed(made.config)} run.name=NAME "
            f"--resume {_typed(made.checkpoint)} "
            "--extend-steps 1000 --extend-strategy weights data.train=data/mine data.split=95,5 "
            "schedule.peak_learning_rate=1e-4",
        ),
    ):
        typer.echo(f"  {name:<10}{line}")


def _typed(path: Path | str) -> str:
    """As a shell takes it."""
    return shlex.quote(str(path))
