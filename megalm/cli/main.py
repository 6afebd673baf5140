"""`megalm`: one subcommand a file, and only the file of the command that is run is imported.

So `megalm --help` answers at once, and a login node without a working torch can still list checkpoints.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence

import typer

import megalm
from megalm.errors import EXIT_FAILED, EXIT_REFUSED, MegalmError
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.process_setup import keep_standard_streams

# Command -> (module with a Typer `app` or a function `command`, what the overview says of it).
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "What this machine has, and what of megalm works on it."),
    "presets": ("presets", "List the shipped runs and models, or show one."),
    "plan": ("plan", "What a run amounts to before it is started: size, tokens, memory, schedule."),
    "checkpoint": ("checkpoint", "Checkpoints: list, show, verify, mark-bad, diff, prune, convert."),
    "evaluate": ("evaluate", "Loss and perplexity of checkpoints on datasets and texts; multiple choice."),
    "generate": ("generate", "Continue prompts with checkpoints, in a dialogue too."),
    "export": ("export", "Write a checkpoint in Hugging Face form."),
    "import": ("import_", "Make a starting point of a model in Hugging Face form."),
    "compare": ("compare", "Two or more runs: what differs in configuration and in results."),
    "report": ("report", "A run on one page: curves, what was unusual, samples, settings."),
    "track": ("track", "Bring a run to MLflow."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; always leaves by SystemExit. Errors for people are one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_standard_streams()
    logging.basicConfig(level=logging.WARNING, format="megalm: %(levelname)s: %(message)s")
    try:
        chosen = next((word for word in words if not word.startswith("-")), None)
        known = available_commands()
        if chosen is not None and chosen not in known:
            message = f"no such command {chosen!r}{did_you_mean(chosen, known)} (`megalm --help` lists them all)"
            _leave(message, EXIT_REFUSED)
        try:
            build_app(chosen)(args=words, prog_name="megalm")
        finally:
            sys.stdout.flush()  # here, where an error has one line
    except MegalmError as error:
        _leave(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "megalm":
            raise
        _leave(f"this needs {error.name}, which is not installed here; `make install` installs it", EXIT_FAILED)
    except OSError as error:
        if error.strerror is None:  # none of the machine's own
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        _leave(f"{place}{error.strerror}; mend the path, its rights or its disk, and do it again", EXIT_REFUSED)


def available_commands() -> list[str]:
    """The commands whose modules are installed, in the overview's order; imports none of them."""
    return [name for name, (module, _) in COMMANDS.items() if importlib.util.find_spec(f"megalm.cli.{module}")]


def build_app(chosen: str | None) -> typer.Typer:
    """The application with the real `chosen` command; of the others only what the overview says."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Large-model pretraining with DeepSpeed. Runs are started with `deepspeed launch/pretrain.py`.",
    )
    app.callback()(_options)
    for name in available_commands():
        module_name, summary = COMMANDS[name]
        if name != chosen:
            app.command(name, help=summary)(_not_chosen)
            continue
        module = importlib.import_module(f"megalm.cli.{module_name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=summary)
        else:
            command: Callable[..., object] = module.command
            app.command(name, help=command.__doc__ or summary)(command)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"megalm {megalm.__version__}")
        raise typer.Exit


def _options(
    _version: bool = typer.Option(
        False, "--version", help="Show the version and leave.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Options before the command; `--version` acts in its callback."""


def _not_chosen() -> None:
    raise AssertionError("only the chosen command is ever run")


def _leave(message: str, exit_code: int) -> None:
    typer.echo(f"megalm: error: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
