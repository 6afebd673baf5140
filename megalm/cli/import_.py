"""`megalm import`: make a starting point from a Hugging Face model or a universal checkpoint of DeepSpeed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.options import NewFolder
from megalm.errors import ConfigError
from megalm.utils.progress import ProgressBar
from megalm.utils.terminal import echo

if TYPE_CHECKING:  # both need torch
    from megalm.huggingface.import_model import Imported
    from megalm.huggingface.pretrained_folder import ModelSource


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A local folder: config.json, *.safetensors and tokenizer.json, or a universal checkpoint.",
        ),
    ],
    output: NewFolder,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json, a .model file or their folder. Default: MODEL's own. "
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
    config: Annotated[
        Path | None,
        typer.Option(help="A universal checkpoint's config.json, or its folder. Default: MODEL's own, or above it."),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Leave out the moments and the step of a universal checkpoint."),
    ] = False,
) -> None:
    """Make a starting point from a Hugging Face model (Llama, Mistral, Qwen, OLMo, SmolLM, Gemma, Pythia, GPT-2).

    MODEL may also be a universal checkpoint of DeepSpeed of such a model.
    FOLDER gets a checkpoint in megalm's own format, which every layout loads,
    model.yaml for --config, and the tokenizer. A Hugging Face model has no
    optimizer state: a run starts from it at step 0. From a universal checkpoint
    a run continues at its step, with its moments. The command is printed.
    Refuses every setting in config.json that megalm's model does not support.

    \b
    megalm import downloads/gpt2 runs/gpt2
    megalm generate runs/gpt2 --prompt "Once"
    megalm import ckpt/global_step900_universal runs/ours --config downloads/gpt2
    """
    from megalm.huggingface.output_folder import require_free

    require_free(output)
    from megalm.data.tokenizers.tokenizer import describe_ends
    from megalm.huggingface.import_model import import_model, tensor_count
    from megalm.huggingface.vocabulary_change import NewRows

    found = _source(source, config, ignore_key or (), weights_only)
    with ProgressBar("writing", tensor_count(found)) as counter:
        rule = None if new_rows is None else NewRows(new_rows)
        made = import_model(found, output, tokenizer, counter.advance, add_tokens, rule)
    shape = made.shape
    kind = found.config["model_type"]
    echo(f"{output}: {shape.parameter_count():,} parameters of {source} ({kind}), as fp32 masters")
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
            f"--resume {_typed(made.checkpoint)} data.train=data/mine data.split=95,5 {_length(made)}",
        ),
    ):
        echo(f"  {name:<10}{line}")


def _source(source: Path, config: Path | None, ignored_keys: Sequence[str], weights_only: bool) -> ModelSource:
    """Raises: ConfigError: an option does not fit to the source; errors of the source's own."""
    from megalm.huggingface.pretrained_folder import HuggingFaceFolder
    from megalm.huggingface.universal_checkpoint import UniversalCheckpoint, is_universal, refuse_unconverted

    if is_universal(source):
        return UniversalCheckpoint(source, config, ignored_keys, weights_only)
    refuse_unconverted(source)
    if given := [name for name, value in (("--config", config), ("--weights-only", weights_only)) if value]:
        raise ConfigError(
            f"{', '.join(given)}: only for a universal checkpoint, and {source} has neither zero nor latest_universal; "
            "omit it, or name that folder"
        )
    return HuggingFaceFolder(source, ignored_keys)


def _length(made: Imported) -> str:
    """The options for 1,000 more steps, and their learning rate."""
    if made.optimizer is None:
        return "--extend-steps 1000 --extend-strategy weights schedule.peak_learning_rate=1e-4"
    rate = next((group["lr"] for group in made.optimizer.settings if group["lr"]), 1e-4)
    return f"train.steps={made.optimizer.step + 1000} schedule.peak_learning_rate={float(rate):g}"


def _typed(path: Path | str) -> str:
    """Quoted for a shell."""
    return shlex.quote(str(path))
