"""The command of a run, which `megalm sweep` and `megalm submit` take after `--`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

import megalm
from megalm.cli.options import (
    Config,
    DeepSpeedJson,
    ExtendSteps,
    ExtendStrategy,
    Overrides,
    Resume,
    SkipSteps,
    Strategy,
    Verbose,
)
from megalm.errors import ConfigError
from megalm.runs.run_settings import Arguments

RUN_WORDS = "megalm.run_words"  # their place in a context's `meta`
_PRETRAIN = "pretrain.py"


class SplitCommand(TyperCommand):
    """Takes a command's own words before `--` and those of a run after it, which Typer alone would mix."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta[RUN_WORDS] = tuple(args[cut + 1 :])
        return super().parse_args(ctx, args[:cut])


def split_launcher(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words up to launch/pretrain.py, `deepspeed launch/pretrain.py` without any, and its arguments."""
    ends = [index for index, word in enumerate(words) if Path(word).name == _PRETRAIN]
    if ends:
        return list(words[: ends[0] + 1]), list(words[ends[0] + 1 :])
    if words and "=" not in words[0] and not words[0].startswith("-"):
        raise ConfigError(f"{words[0]} after -- starts no launch/pretrain.py; give the command of a run, or key=value")
    beside = Path(sys.executable).with_name("deepspeed")
    script = Path(megalm.__file__).resolve().parents[1] / "launch" / _PRETRAIN
    return [str(beside) if beside.exists() else "deepspeed", str(script)], list(words)


def run_arguments(words: Sequence[str]) -> Arguments:
    """Read the arguments of launch/pretrain.py.

    Raises:
        ConfigError: an argument that it does not have.
    """
    try:
        found: Arguments = _reader()(list(words), prog_name="launch/pretrain.py", standalone_mode=False)
    except Exception as error:
        if (text := getattr(error, "format_message", None)) is None:  # not about the words
            raise
        raise ConfigError(f"{text()} (arguments of launch/pretrain.py follow --)") from None
    return found


@functools.cache
def _reader() -> Callable[..., Any]:
    def read(
        overrides: Overrides = None,
        deepspeed_config: DeepSpeedJson = None,
        config: Config = None,
        resume: Resume = None,
        extend_steps: ExtendSteps = None,
        extend_strategy: ExtendStrategy = Strategy.schedule,
        skip_steps: SkipSteps = 0,
        verbose: Verbose = False,
    ) -> Arguments:
        return Arguments(
            deepspeed_config, config, tuple(overrides or ()), resume, extend_steps, extend_strategy.value, skip_steps
        )

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(add_help_option=False)(read)
    return typer.main.get_command(app).main
