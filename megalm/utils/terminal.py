"""Write to the terminal: text from files and people is shown, never obeyed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from megalm.errors import EXIT_FAILED, EXIT_REFUSED, MegalmError, message_of
from megalm.utils.formatting import printable


def echo(message: str = "", err: bool = False) -> None:
    """Write a message; a file or a program gets it escaped, too."""
    typer.echo(printable(message), err=err)


def echo_text(text: str, end: str = "\n") -> None:
    """Write a text that is a result: a file or a program gets it unchanged, a terminal escaped."""
    shown = printable(text) if sys.stdout.isatty() else text
    sys.stdout.write(shown + end)  # typer.echo drops escape sequences where there is no terminal
    sys.stdout.flush()


def leave(message: str, exit_code: int) -> NoReturn:
    """Exit with a line on stderr."""
    echo(f"megalm: error: {message}", err=True)
    sys.exit(exit_code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Make what a user can mend one line on stderr: a MegalmError, a missing package, what the system refuses."""
    try:
        yield
    except MegalmError as error:
        leave(message_of(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "megalm":
            raise
        leave(f"this command needs {error.name}, which is not installed; `make install` installs it", EXIT_FAILED)
    except OSError as error:
        if error.strerror is None:  # not from the operating system
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        leave(f"{place}{error.strerror}; check the path, its permissions and its disk, then try again", EXIT_REFUSED)
