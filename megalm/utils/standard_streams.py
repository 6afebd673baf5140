"""Standard output that was closed, or whose reader has gone: what a command does besides printing goes on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Output(io.FileIO):
    """Standard output; what nobody reads any more is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # a full disk is reported once, not at the exit again
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, "standard output") from None
            return len(memoryview(data).cast("B"))


def keep_standard_streams() -> None:
    """Call first in a command.

    A standard stream that is closed (`>&-`) is opened on /dev/null: else the next file gets its number, and what a
    library prints lands there. A pipe whose reader has gone (`| head`) does not end the command.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - for the process
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper) or stdout is not sys.__stdout__:
        return  # a test's, or a caller's own
    with contextlib.suppress(OSError, ValueError):
        stdout.flush()
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(stdout.fileno(), "w", closefd=False)),
            encoding=stdout.encoding,
            errors="backslashreplace",  # an encoding without a character is no reason to fail
            line_buffering=stdout.line_buffering,
        )
