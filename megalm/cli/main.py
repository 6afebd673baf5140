"""`megalm`: each subcommand is a file of its own, and only the chosen command's file is imported.

So `megalm --help` is fast, and a login node without a working torch can still list checkpoints.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence

import typer

import megalm
from megalm.cli.options import expand_home
from megalm.errors import EXIT_REFUSED
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.formatting import PrintableFormatter
from megalm.utils.process_setup import keep_standard_streams
from megalm.utils.terminal import echo, leave, one_line_errors

# Command -> (module with a Typer `app` or a function `command`, or module:function; line of the overview).
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "Check this machine: its hardware and software, and the features of megalm that work."),
    "presets": ("config:presets", "List the presets for runs and models, or print one."),
    "config": ("config", "Convert a DeepSpeed JSON of another toolkit to two files that a run takes."),
    "plan": ("plan", "Show a run before it starts: size, tokens, memory, schedule."),
    "rehearse": ("rehearse", "Rehearse a run on GPUs that this machine does not have."),
    "parity": ("checks.parity", "Train a configuration in miniature on this CPU, and compare it with one rank."),
    "sweep": ("jobs.sweep", "Run a configuration with several values of some keys, and rank the runs."),
    "submit": ("jobs.submit", "Check a run on the login node, then queue it with Slurm."),
    "status": ("jobs.status", "Show runs and their jobs: state, step, loss, speed, time left."),
    "checkpoint": ("checkpoint", "Checkpoints: list, show, verify, mark-bad, diff, prune, convert, average."),
    "evaluate": ("evaluate", "Evaluate checkpoints on datasets, texts and multiple-choice questions."),
    "generate": ("generate", "Continue prompts with checkpoints, also interactively."),
    "export": ("export", "Write a checkpoint in Hugging Face format."),
    "import": ("import_", "Make a starting point from a Hugging Face model."),
    "compare": ("compare", "Compare runs: the differences in configuration and in results."),
    "report": ("track:report", "Write a page about a run: curves, notable events, samples, settings."),
    "track": ("track", "Send runs to MLflow."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; always raises SystemExit. A MegalmError becomes one line on stderr."""
    words = expand_home(sys.argv[1:] if arguments is None else arguments)
    keep_standard_streams()
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("megalm: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with one_line_errors():
        chosen = next((word for word in words if not word.startswith("-")), None)
        known = available_commands()
        if chosen is not None and chosen not in known:
            message = f"no such command {chosen!r}{did_you_mean(chosen, known)}; `megalm --help` lists all commands"
            leave(message, EXIT_REFUSED)
        try:
            build_app(chosen)(args=words, prog_name="megalm")
        finally:
            sys.stdout.flush()  # here, where an error has one line


def available_commands() -> list[str]:
    """The commands whose modules are installed, in the overview's order; imports no module."""
    return [name for name, (where, _) in COMMANDS.items() if importlib.util.find_spec(_module_of(where))]


def _module_of(where: str) -> str:
    return f"megalm.cli.{where.partition(':')[0]}"


def build_app(chosen: str | None) -> typer.Typer:
    """The application with the real `chosen` command; the others are only lines of the overview."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Pretraining of language models with DeepSpeed. `deepspeed launch/pretrain.py` starts a run.",
    )
    app.callback()(_options)
    for name in available_commands():
        where, summary = COMMANDS[name]
        if name != chosen:
            app.command(name, help=summary)(_not_chosen)
            continue
        module, function = importlib.import_module(_module_of(where)), where.partition(":")[2]
        if not function and hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=summary)
        else:
            command: Callable[..., object] = getattr(module, function or "command")
            app.command(name, help=command.__doc__ or summary, cls=getattr(module, "Command", None))(command)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"megalm {megalm.__version__}")
        raise typer.Exit


def _options(
    _version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Options before the command; `--version` acts in its callback."""


def _not_chosen() -> None:
    raise AssertionError("only the chosen command runs")


if __name__ == "__main__":
    main()
