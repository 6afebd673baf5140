"""User-facing errors: one line with the fault, its place and the remedy, and no traceback.

Commands print a `MegalmError` as that line on stderr and exit with its `exit_code`.
"""

from __future__ import annotations

# Exit codes of every command (docs/running.md).
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_START_AGAIN = 75  # a checkpoint is saved; start the job again to continue


class MegalmError(Exception):
    """Base of the errors that the user can fix."""

    exit_code = EXIT_FAILED


class ConfigError(MegalmError):
    """A configuration that cannot be run; raised before any process group exists."""

    exit_code = EXIT_REFUSED


class DataError(MegalmError):
    """Unusable input text, tokenizer or dataset file."""

    exit_code = EXIT_REFUSED


class CheckpointError(MegalmError):
    """A checkpoint that is missing, incomplete or altered, or belongs to another model."""

    exit_code = EXIT_REFUSED


class TrainingError(MegalmError):
    """Training cannot continue; the message gives the step, the cause and the remedy."""


class OtherRankFailed(MegalmError):
    """Another rank failed and reports why; this rank exits silently with the same exit code."""

    def __init__(self, exit_code: int = EXIT_FAILED) -> None:
        super().__init__("another rank failed")
        self.exit_code = exit_code
