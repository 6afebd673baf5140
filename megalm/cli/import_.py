"""`megalm import`: make a starting point from a Hugging Face model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.options import NewFolder
from megalm.utils.progress import ProgressBar
from megalm.utils.terminal import echo


def command(
    source: Annotated[
        Path,
        typer.Argument(metavar="HF_FOLDER", help="A local folder with config.json, *.safetensors, tokenizer.json."),
    ],
    output: NewFolder,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json, a .model file or their folder. Default: HF_FOLDER's own. "
            "With another one, rows are copied by what their tokens stand for."
        ),
    ] = None,
    add_tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tokens to add to the tokenizer: one per line, or a JSON list."),
    ] = None,
    new_rows: Annotated[
        str | None,
        typer.Option(metavar="mean|zero|copy:TOKEN", help="How the rows of new tokens begin. Default: mean."),
    ] = None,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(help="Ignore a key of config.json that you know to change nothing. May be repeated."),
    ] = None,
) -> None:
    """Make a starting point from a Hugging Face model (Llama, Qwen3, GPT-2).

    FOLDER gets a checkpoint in megalm's own format, which every layout loads,
    model.yaml for --config, and the tokenizer. The checkpoint has no optimizer
    state: a run starts from it at step 0, with the command printed at the end.
    Refuses every setting in config.json that megalm's model does not support.

    \b
    megalm import downloads/gpt2 runs/gpt2
    megalm generate runs/gpt2 --prompt "Once"
    """
    from megalm.huggingface.output_folder import require_free

    require_free(output)
    from megalm.data.tokenizers.tokenizer import describe_ends
    from megalm.huggingface.import_model import import_model
    from megalm.huggingface.pretrained_folder import HuggingFaceFolder
    from megalm.huggingface.vocabulary_change import NewRows

    found = HuggingFaceFolder(source, ignore_key or ())
    with ProgressBar("writing", len(found.shape.parameters())) as counter:
        rule = None if new_rows is None else NewRows(new_rows)
        made = import_model(found, output, tokenizer, counter.advance, add_tokens, rule)
    shape = made.shape
    echo(f"{output}: {shape.parameter_count():,} parameters of {source}, style {shape.style}, as fp32 masters")
    entries, vocabulary = made.tokenizer.vocab_size, shape.vocab_size
    rows = f" for the model's vocabulary of {vocabulary:,}" if entries != vocabulary else ""
    echo(f"{made.tokenizer.name}: {entries:,} ids{rows}; {describe_ends(made.tokenizer)}")
    for note in made.notes:
        echo(f"note: {note}")
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
        echo(f"  {name:<10}{line}")


def _typed(path: Path | str) -> str:
    """Quoted for a shell."""
    return shlex.quote(str(path))
