"""`megalm evaluate`: loss of checkpoints on datasets and texts, and their answers to questions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from megalm.cli.find_run import checkpoint_at, find_place, verify
from megalm.cli.options import Place, Precision, Tokenizer
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.errors import CheckpointError, ConfigError
from megalm.runs.metrics_log import MetricsWriter, plain
from megalm.utils.atomic_files import refuse_overwriting_inputs
from megalm.utils.formatting import table
from megalm.utils.progress import ProgressBar, watched

if TYPE_CHECKING:
    from megalm.inference.dataset_eval import Row, Task
    from megalm.inference.inference_model import CheckpointFacts, OfflinePrecision

RECORD = "evaluations.jsonl"
_TEXT_KEY = "text"
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class _Wanted:
    """What to evaluate on."""

    data: Sequence[str]
    text: Sequence[str]
    choices: Sequence[Path]
    max_samples: int | None
    batch_size: int
    overlap: int | None
    text_key: str

    def files(self) -> list[str | Path]:
        """Return the files that are named; their readers report missing ones."""
        texts = [file.path for file in find_inputs(self.text, ReadReport())]
        return [*texts, *self.choices, *(f"{prefix}{suffix}" for prefix in self.data for suffix in (".bin", ".idx"))]


def command(
    place: Place,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PREFIX", help="A dataset, PREFIX.bin and PREFIX.idx. May be repeated."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="PATH", help="Raw text: a file, folder or glob. May be repeated."),
    ] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(
            "--choices", metavar="FILE", help="JSON lines of context, choices and answer (0, 1, ...). May be repeated."
        ),
    ] = None,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="All good checkpoints of the run, one after the other.")
    ] = False,
    max_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Of each: so many windows, documents or questions, evenly spaced. Default: all."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once: memory and speed, not the result.")] = 16,
    overlap: Annotated[
        int | None,
        typer.Option(min=0, help="--text: tokens of context from the window before. Default: half a window."),
    ] = None,
    text_key: Annotated[str, typer.Option(help="--text: the key or column that holds the text.")] = _TEXT_KEY,
    dtype: Annotated[Precision, typer.Option(help="What the model computes in.")] = Precision.fp32,
    tokenizer: Tokenizer = "",
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of tables.")] = False,
) -> None:
    """Loss, perplexity and bits per byte of a checkpoint; its answers to multiple-choice questions.

    Without --data, --text and --choices: on the run's own validation sets, whole, as at the end of training.
    Results are added to evaluations.jsonl in the run folder, too. docs/evaluation.md has the details.

    \b
    megalm evaluate runs/mine
    megalm evaluate runs/mine --data data/other --data data/third
    megalm evaluate runs/mine/checkpoints/step-00000400 --text books/
    megalm evaluate runs/mine --choices questions.jsonl --every-checkpoint
    """
    from megalm.engine.deepspeed_patches import limit_openmp_spin
    from megalm.engine.device import tune_malloc

    limit_openmp_spin()
    tune_malloc()
    import torch

    from megalm.inference.inference_model import read_facts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = find_place(place) if every_checkpoint else checkpoint_at(place)
    paths, left_out = _every(found) if every_checkpoint else ((found,), ())
    facts = read_facts(paths[-1], tokenizer or None)
    if not every_checkpoint:
        _refuse_bad(facts)
        paths = (facts.path,)
    for reason in left_out:
        _tell(f"left out {reason}")
    wanted = _Wanted(data or (), text or (), choices or (), max_samples, batch_size, overlap, text_key)
    if facts.run_folder is not None:
        refuse_overwriting_inputs([facts.run_folder / RECORD], wanted.files())
    tasks = _tasks(facts, wanted)
    rows: list[Row] = []
    with ProgressBar("evaluating", sum(task.batches for task in tasks) * len(paths)) as counter, _memory_errors_named():
        for path in paths:
            try:
                # One model at a time: it goes with the function.
                rows += _evaluate(path, tokenizer or None, dtype.value, tasks, wanted, counter)
            except CheckpointError as error:
                if not every_checkpoint:
                    raise
                _tell(f"left out {path.name}: {error}")
    if not rows:
        raise CheckpointError(f"{found}: no checkpoint could be evaluated")
    typer.echo(_lines(rows) if json else _tables(rows, found if every_checkpoint else facts.path))


def _every(run: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """All good checkpoints, and what is left out."""
    from megalm.inference.run_checkpoints import checkpoints_of

    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"--every-checkpoint takes a run folder; {run} has no folder checkpoints")
    course = checkpoints_of(run)
    return course.good, course.left_out


def _refuse_bad(facts: CheckpointFacts) -> None:
    if facts.manifest.status == "bad":
        raise CheckpointError(
            f"{facts.path} is {facts.mark}; choose another, or undo it with "
            f"megalm checkpoint mark-bad --good {facts.path}"
        )
    if facts.mark:
        _tell(f"{facts.path} is {facts.mark}")


def _tasks(facts: CheckpointFacts, wanted: _Wanted) -> list[Task]:
    """Everything that is asked for, opened and checked before a model is loaded."""
    from megalm.inference.dataset_eval import DATA, OWN, DatasetTask, other_sets, own_sets
    from megalm.inference.multiple_choice import ChoiceTask, read_choices
    from megalm.inference.text_eval import TextTask, read_text

    if not wanted.text and (wanted.overlap is not None or wanted.text_key != _TEXT_KEY):
        raise ConfigError("--overlap and --text-key are about raw text; name it with --text")
    for option, named in (("--data", wanted.data), ("--text", wanted.text), ("--choices", wanted.choices)):
        if len(set(named)) < len(named):
            raise ConfigError(f"{option}: one of {', '.join(map(str, named))} is named twice; name it once")
    tasks: list[Task] = []
    if wanted.data:
        sets = other_sets(facts, wanted.data)
        tasks.append(DatasetTask(DATA, sets, facts.tokenizer, wanted.batch_size, wanted.max_samples))
    if wanted.text:
        texts = []
        for path in wanted.text:
            counted = watched(f"tokenizing {path}")
            one = read_text(path, facts, wanted.overlap, wanted.text_key, wanted.max_samples, counted)
            if one.skipped:
                first = f", the first: {one.problem}" if one.problem else ""
                _tell(f"{path}: documents left out because they are empty or cannot be read: {one.skipped:,}{first}")
            texts.append(one)
        tasks.append(TextTask(texts, facts.tokenizer.token_bytes(), wanted.batch_size))
    if wanted.choices:
        questions = [read_choices(path, facts, wanted.max_samples) for path in wanted.choices]
        for asked in questions:
            if asked.cut:
                _tell(
                    f"{asked.name}: {asked.cut:,} contexts are longer than the model's window, their beginning is cut"
                )
        tasks.append(ChoiceTask(questions, wanted.batch_size))
    if not tasks:
        tasks.append(DatasetTask(OWN, own_sets(facts, _tell), facts.tokenizer, wanted.batch_size, wanted.max_samples))
    return tasks


def _evaluate(
    path: Path,
    tokenizer: str | None,
    dtype: OfflinePrecision,
    tasks: Sequence[Task],
    wanted: _Wanted,
    counter: ProgressBar,
) -> list[Row]:
    """All results of one checkpoint, recorded in its run."""
    from megalm.inference.inference_model import InferenceModel

    with counter.paused():
        model = InferenceModel(path, tokenizer, dtype, verify, watched(f"loading {path.name}"))
    manifest = model.facts.manifest
    about: dict[str, Any] = {
        "checkpoint": str(model.path),
        "step": manifest.step,
        "tokens": manifest.tokens,
        "dtype": dtype,
        "device": model.device.type,
        "sequence_length": model.facts.sequence_length,
        "max_samples": wanted.max_samples,
    }
    rows = [
        {"kind": "evaluation", "time": time.time(), **about, **row}
        for task in tasks
        for row in task.rows(model, counter.advance)
    ]
    _record(model.facts.run_folder, rows)
    return rows


def _record(run: Path | None, rows: Sequence[Row]) -> None:
    """Append to the run's account of evaluations; a folder that cannot be written to is no reason to fail."""
    if run is None:
        return
    try:
        with MetricsWriter(run / RECORD) as writer:
            for row in rows:
                writer.row(**row)
    except OSError as error:
        _tell(f"not recorded in {run / RECORD}: {error.strerror}")


def _lines(rows: Sequence[Row]) -> str:
    return "\n".join(orjson.dumps(plain(row)).decode() for row in rows)


def _tables(rows: Sequence[Row], place: Path) -> str:
    """For people: losses, then answers; with a step in each line where there are several checkpoints."""
    steps = len({row["checkpoint"] for row in rows}) > 1
    first = rows[0]
    about = "" if steps else f": step {first['step']:,}, {first['tokens'] or 0:,} tokens trained on"
    parts = [f"{place}{about} ({first['dtype']} on {first['device']})"]
    losses = [row for row in rows if row["source"] != "choices"]
    answers = [row for row in rows if row["source"] == "choices"]
    if losses:
        words = any("word_perplexity" in row for row in losses)
        headings = ["set", "tokens", "loss", "perplexity", "bits/byte", *(["word perplexity"] if words else [])]
        parts.append(_table(headings, losses, lambda row: _loss_cells(row, words), steps))
    if answers:
        headings = ["questions", "of", "accuracy", "+-", "by bytes", "+-", "chance"]
        parts.append(_table(headings, answers, _answer_cells, steps))
    return "\n\n".join(parts)


def _table(headings: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[object]], steps: bool) -> str:
    before = ["step", "trained on"] if steps else []
    lines = [[*([row["step"], f"{row['tokens'] or 0:,}"] if steps else []), *cells(row)] for row in rows]
    return table([*before, *headings], lines)


def _loss_cells(row: Row, words: bool) -> list[object]:
    found: list[object] = [row["dataset"], f"{row['targets']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:.2f}"]
    found.append(_number(row["bits_per_byte"], ".4f"))
    return [*found, *([_number(row.get("word_perplexity"), ".4g")] if words else [])]


def _answer_cells(row: Row) -> list[object]:
    shares = ("accuracy", "accuracy_error", "byte_accuracy", "byte_accuracy_error", "chance")
    return [row["dataset"], f"{row['questions']:,}", *(_number(row[share], ".1%") for share in shares)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _tell(line: str) -> None:
    """Beside the results: these may be read by a program."""
    typer.echo(f"megalm: {line}", err=True)


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        raise ConfigError("out of memory; try a smaller --batch-size, or --dtype bf16") from error
