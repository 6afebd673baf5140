"""User-facing errors: one line with the fault, its place and the remedy, and no traceback.

Commands print a `MegalmError` as that line on stderr and exit with its `exit_code`; a `ConfigError` may have several.
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
    """A configuration that cannot be run; raised before any process group exists.

    Args:
        problems: one line for each problem, so that one start shows them all.
    """

    exit_code = EXIT_REFUSED

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(dict.fromkeys(" ".join(problem.split()) for problem in problems))
        first, *others = self.problems
        lines = (f"{len(self.problems)} problems", *self.problems)
        super().__init__("\n  ".join(lines) if others else first)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        return type(self), self.problems


def message_of(error: MegalmError) -> str:
    """Return the message for a terminal: one line, or for several problems a first line and one for each."""
    several = isinstance(error, ConfigError) and len(error.problems) > 1
    return str(error) if several else " ".join(str(error).split())


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch or a GPU ran out of memory."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


# What gloo, NCCL and torch's store say on a rank whose peer's process has ended: the kernel has closed its connections.
_CLOSED_CONNECTION = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
)
_LOST_CONNECTION = (
    *_CLOSED_CONNECTION,
    "connection refused",
    "failed to recv",
    "failed to send",
    "communicator was aborted",
    "timed out waiting",
)


def is_lost_connection(error: BaseException, closed: bool = False) -> bool:
    """Return whether this is what another rank's end looks like from here; with `closed`, that of its process."""
    text = str(error).lower()
    words = _CLOSED_CONNECTION if closed else _LOST_CONNECTION
    return isinstance(error, (RuntimeError, ConnectionError)) and any(each in text for each in words)


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
