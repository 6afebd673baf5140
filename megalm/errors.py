"""Errors for people: one line that says what, where and what to do next; never a traceback.

Commands turn any MegalmError into that line on stderr and `exit_code`.
"""

from __future__ import annotations

# Exit codes of every command (docs/running.md).
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_START_AGAIN = 75  # saved, and wants to be started again


class MegalmError(Exception):
    """Base of the errors that a person caused or can mend."""

    exit_code = EXIT_FAILED


class ConfigError(MegalmError):
    """A configuration that cannot be run; raised before any process group exists."""

    exit_code = EXIT_REFUSED


class DataError(MegalmError):
    """Input text, a tokenizer or a dataset file that cannot be used."""

    exit_code = EXIT_REFUSED


class CheckpointError(MegalmError):
    """A checkpoint that is absent, incomplete, altered, or of another model."""

    exit_code = EXIT_REFUSED


class TrainingError(MegalmError):
    """Training that cannot go on; the line says at which step, why, and what to do."""


class OtherRankFailed(MegalmError):
    """Another rank failed and tells the person why; this one leaves without a word, with the same exit code."""

    def __init__(self, exit_code: int = EXIT_FAILED) -> None:
        super().__init__("another rank failed")
        self.exit_code = exit_code
