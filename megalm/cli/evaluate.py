"""`megalm evaluate`: the loss of checkpoints on datasets and texts, and their answers to questions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from megalm.cli.find_run import checkpoint_at, good_checkpoints_at, verify, warn
from megalm.cli.options import Ema, ModelPlace, Precision, Tokenizer
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.readers.questions import task_name
from megalm.errors import CheckpointError, ConfigError, is_out_of_memory
from megalm.runs.evaluations import EVALUATIONS_FILE
from megalm.runs.metrics_log import MetricsWriter, plain
from megalm.utils.atomic_files import refuse_overwriting_inputs
from megalm.utils.formatting import table
from megalm.utils.progress import ProgressBar, watched
from megalm.utils.terminal import echo, echo_text

if TYPE_CHECKING:
    from megalm.inference.dataset_eval import DatasetTask, Row
    from megalm.inference.inference_model import CheckpointFacts
    from megalm.inference.text_eval import TextTask
    from megalm.train.multiple_choice import ChoiceTask

    Task = DatasetTask | TextTask | ChoiceTask

_TEXT_KEY = "text"
_Column = tuple[str, str, str]  # heading, key of the row, format
_STEP_COLUMNS: tuple[_Column, ...] = (("step", "step", ""), ("training tokens", "tokens", ","))
_LOSS_COLUMNS: tuple[_Column, ...] = (
    ("set", "dataset", ""),
    ("tokens", "targets", ","),
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("bits/byte", "bits_per_byte", ".4f"),
    ("word perplexity", "word_perplexity", ".4g"),
)
_ANSWER_COLUMNS: tuple[_Column, ...] = (
    ("task", "task", ""),
    ("questions", "questions", ","),
    ("accuracy", "accuracy", ".1%"),
    ("+-", "accuracy_error", ".1%"),
    ("byte accuracy", "byte_accuracy", ".1%"),
    ("+-", "byte_accuracy_error", ".1%"),
    ("chance", "chance", ".1%"),
)


@dataclass(frozen=True)
class _Request:
    """The data to evaluate on, and whether the moving average of the weights is evaluated."""

    data: Sequence[str]
    text: Sequence[str]
    choices: Sequence[Path]
    max_samples: int | None
    batch_size: int
    overlap: int | None
    text_key: str
    ema: bool

    def files(self) -> list[str | Path]:
        """Return the files that are named; their readers report missing ones."""
        texts = [file.path for file in find_inputs(self.text, ReadReport())]
        return [*texts, *self.choices, *(f"{prefix}{suffix}" for prefix in self.data for suffix in (".bin", ".idx"))]


def command(
    place: ModelPlace,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PREFIX", help="A dataset: PREFIX.bin and PREFIX.idx. May be repeated."),
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
        bool, typer.Option("--every-checkpoint", help="Evaluate all good checkpoints of the run.")
    ] = False,
    max_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Use at most this many windows, documents or questions of each, evenly spaced."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per batch; changes memory and speed only.")] = 16,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=0, help="For --text: tokens that a window shares with the one before. Default: half a window."
        ),
    ] = None,
    text_key: Annotated[str, typer.Option(help="For --text: the key or column that holds the text.")] = _TEXT_KEY,
    dtype: Annotated[Precision, typer.Option(help="The dtype of weights and activations.")] = Precision.fp32,
    tokenizer: Tokenizer = "",
    ema: Ema = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of tables.")] = False,
) -> None:
    """Evaluate checkpoints: loss, perplexity and bits per byte, and accuracy on multiple-choice questions.

    Without --data, --text and --choices, uses the run's own complete validation sets, as at the end of training.
    Also appends the results to evaluations.jsonl in the run folder. docs/evaluation.md has the details.

    \b
    megalm evaluate runs/mine
    megalm evaluate runs/mine --data data/other --data data/third
    megalm evaluate runs/mine/checkpoints/step-00000400 --text books/
    megalm evaluate runs/mine --choices questions.jsonl --every-checkpoint
    megalm evaluate downloads/gpt2 --text books/
    """
    from megalm.engine.deepspeed_patches import limit_openmp_spin
    from megalm.engine.device import tune_malloc

    limit_openmp_spin()
    tune_malloc()
    import torch

    from megalm.inference.inference_model import read_facts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if every_checkpoint:
        found, paths = good_checkpoints_at(place, "--every-checkpoint")
    else:
        found = checkpoint_at(place)
        paths = [found]
    facts = read_facts(paths[-1], tokenizer or None)
    _refuse_bad(facts)
    request = _Request(data or (), text or (), choices or (), max_samples, batch_size, overlap, text_key, ema)
    if facts.run_folder is not None:
        refuse_overwriting_inputs([facts.run_folder / EVALUATIONS_FILE], request.files())
    tasks = _tasks(facts, request)
    rows: list[Row] = []
    with ProgressBar("evaluating", sum(task.batches for task in tasks) * len(paths)) as counter, _memory_errors_named():
        for path in paths:
            try:
                # The function's end frees the model, so that one is in memory at a time.
                rows += _evaluate(path, tokenizer or None, dtype, tasks, request, counter)
            except CheckpointError as error:
                if not every_checkpoint:
                    raise
                warn(f"skipped {path.name}: {error}")
    if not rows:
        raise CheckpointError(f"{found}: no checkpoint could be evaluated")
    if json:
        echo_text("\n".join(orjson.dumps(plain(row)).decode() for row in rows))
    else:
        echo(_tables(rows, found))


def _refuse_bad(facts: CheckpointFacts) -> None:
    """Refuse a bad checkpoint, and warn of a suspect one."""
    marked = f"{facts.path} is {facts.manifest.mark}"
    if facts.manifest.status == "bad":
        raise CheckpointError(
            f"{marked}; choose another, or remove the mark with `megalm checkpoint mark-bad --good {facts.path}`"
        )
    if facts.manifest.mark:
        warn(marked)


def _tasks(facts: CheckpointFacts, request: _Request) -> list[Task]:
    """Open and check all requested data before a model is loaded."""
    from megalm.inference.dataset_eval import DATA, OWN, DatasetTask, other_sets, own_sets
    from megalm.inference.text_eval import TextTask, read_text
    from megalm.train.multiple_choice import ChoiceTask, read_choices

    if not request.text and (request.overlap is not None or request.text_key != _TEXT_KEY):
        raise ConfigError("--overlap and --text-key need raw text; name it with --text")
    for option, named in (("--data", request.data), ("--text", request.text), ("--choices", request.choices)):
        if len(set(named)) < len(named):
            raise ConfigError(f"{option} names one of {', '.join(map(str, named))} twice; name it once")
    tasks: list[Task] = []
    if request.data:
        sets = other_sets(facts, request.data)
        tasks.append(DatasetTask(DATA, sets, facts.tokenizer, request.batch_size, request.max_samples))
    if request.text:
        texts = []
        for path in request.text:
            counted = watched(f"tokenizing {path}")
            one = read_text(path, facts, request.overlap, request.text_key, request.max_samples, counted)
            if one.skipped:
                first = f", the first: {one.problem}" if one.problem else ""
                warn(f"{path}: skipped {one.skipped:,} empty or unreadable documents{first}")
            texts.append(one)
        tasks.append(TextTask(texts, facts.tokenizer.token_bytes(), request.batch_size))
    if request.choices:
        questions = [read_choices(path, facts.encoding, request.max_samples) for path in request.choices]
        for asked in questions:
            if asked.cut:
                warn(f"{asked.name}: {asked.cut:,} contexts exceed the model's window and lose their beginning")
        tasks.append(ChoiceTask(questions, request.batch_size))
    if not tasks:
        tasks.append(DatasetTask(OWN, own_sets(facts, warn), facts.tokenizer, request.batch_size, request.max_samples))
    return tasks


def _evaluate(
    path: Path,
    tokenizer: str | None,
    precision: Precision,
    tasks: Sequence[Task],
    request: _Request,
    counter: ProgressBar,
) -> list[Row]:
    """Evaluate one checkpoint on all tasks, and record the results in its run."""
    from megalm.inference.inference_model import InferenceModel

    with counter.paused():
        loading = watched(f"loading {path.name}")
        model = InferenceModel(path, tokenizer, precision.dtype, verify, loading, request.ema)
    manifest = model.facts.manifest
    about: dict[str, Any] = {
        "checkpoint": str(model.path),
        "step": manifest.step,
        "tokens": manifest.tokens,
        "dtype": precision.value,
        "ema": request.ema,
        "device": model.device.type,
        "sequence_length": model.facts.sequence_length,
        "max_samples": request.max_samples,
    }
    rows = [
        {"kind": "evaluation", "time": time.time(), **about, "task": task_name(str(row["dataset"])), **row}
        for task in tasks
        for row in task.rows(model, counter.advance)
    ]
    _record(model.facts.run_folder, rows)
    return rows


def _record(run: Path | None, rows: Sequence[Row]) -> None:
    """Append to evaluations.jsonl of the run; a folder that is not writable is only a warning."""
    if run is None:
        return
    try:
        with MetricsWriter(run / EVALUATIONS_FILE) as writer:
            for row in rows:
                writer.row(**row)
    except OSError as error:
        warn(f"cannot record the results in {run / EVALUATIONS_FILE}: {error.strerror}")


def _tables(rows: Sequence[Row], place: Path) -> str:
    """Tables of losses and of answers; each line has its step if there are several checkpoints."""
    steps = len({row["checkpoint"] for row in rows}) > 1
    first = rows[0]
    about = "" if steps else f": step {first['step']:,}, {first['tokens'] or 0:,} training tokens"
    losses = [row for row in rows if row["source"] != "choices"]
    answers = [row for row in rows if row["source"] == "choices"]
    parts = [
        f"{place}{about} ({first['dtype']} on {first['device']})",
        *([_table(_LOSS_COLUMNS, losses, steps)] if losses else []),
        *([_table(_ANSWER_COLUMNS, answers, steps)] if answers else []),
    ]
    return "\n\n".join(parts)


def _table(columns: Sequence[_Column], rows: Sequence[Row], steps: bool) -> str:
    """A table without the columns that no row has."""
    columns = [
        column for column in (*(_STEP_COLUMNS if steps else ()), *columns) if any(column[1] in row for row in rows)
    ]
    cells = [[_cell(row.get(key), form) for _, key, form in columns] for row in rows]
    return table([heading for heading, _, _ in columns], cells)


def _cell(value: object, form: str) -> object:
    return format(value, form) if form and value is not None else value


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError("out of memory; try a smaller --batch-size, or --dtype bf16") from error
