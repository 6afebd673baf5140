"""`megalm generate`: continue prompts with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.runs import find_place
from megalm.config.schema import SampleSection

_DEFAULTS = SampleSection()


def command(
    place: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run, or one of its checkpoints.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="May be repeated.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = _DEFAULTS.max_new_tokens,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest.")] = _DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest; 0: from all.")] = _DEFAULTS.top_k or 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tokenizer: Annotated[str, typer.Option(help="Where the checkpoint's tokenizer is now, if it moved.")] = "",
) -> None:
    """Continue prompts with a checkpoint, in fp32, on the GPU if there is one."""
    from megalm.train.offline import Alone, OfflineModel
    from megalm.train.sampling import generate

    settings = SampleSection(
        prompts=tuple(prompt), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k or None
    )
    model = OfflineModel(find_place(place), tokenizer or None)
    length = model.shape.max_position_embeddings
    for text in generate(model, Alone(), model.tokenizer, settings, length, seed):
        typer.echo(text)
