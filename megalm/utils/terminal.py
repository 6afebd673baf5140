"""Write to the terminal: text from files and people is shown, never obeyed."""

from __future__ import annotations

import sys

import typer

from megalm.utils.formatting import printable


def echo(message: str = "", err: bool = False) -> None:
    """Write a message; a file or a program gets it escaped, too."""
    typer.echo(printable(message), err=err)


def echo_text(text: str, end: str = "\n") -> None:
    """Write a text that is a result: a file or a program gets it unchanged, a terminal escaped."""
    shown = printable(text) if sys.stdout.isatty() else text
    sys.stdout.write(shown + end)  # typer.echo drops escape sequences where there is no terminal
    sys.stdout.flush()
