"""Multiple-choice questions: JSON lines {"context": ..., "choices": [...], "answer": index}, packed or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson

from megalm.data.readers.input_files import BROKEN, packing_of, unpacked
from megalm.errors import DataError

_ENDINGS = (".jsonl", ".json", ".txt", ".parquet")


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice."""

    context: str
    choices: tuple[str, ...]
    answer: int
    source: str  # "file:line"


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines {"context": ..., "choices": [...], "answer": index}; other fields are ignored.

    Raises:
        DataError: the file cannot be read, or a line is not a question.
    """
    found = []
    try:
        with unpacked(path.open("rb"), packing_of(path)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found.append(_question(line, f"{path}:{number}"))
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); give a file of JSON lines") from None
    if not found:
        raise DataError(f"{path} has no question; give JSON lines of context, choices and answer")
    return found


def task_name(dataset: str) -> str:
    """The name of a set, a prefix, or a file of text or questions, packed or not."""
    name = Path(dataset).name.removesuffix(".zst").removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def _question(line: bytes, source: str) -> Question:
    try:
        content = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{source} is not JSON ({error}); correct or remove the line") from None
    if not isinstance(content, dict) or not {"context", "choices", "answer"} <= content.keys():
        raise DataError(f'{source}: give {{"context": TEXT, "choices": [TEXT, ...], "answer": INDEX}}')
    context, choices, answer = (content[name] for name in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise DataError(f"{source}: context must be a string")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"{source}: choices must be two or more strings, none of them empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{source}: answer must be the index of the right choice, 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer, source)
