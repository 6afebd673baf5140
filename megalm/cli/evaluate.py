"""`megalm evaluate`: the loss of checkpoints on datasets and texts, and their answers to questions."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from megalm.cli.find_run import checkpoint_at, find_place, good_checkpoints_at, verify, warn
from megalm.cli.options import Ema, ModelPlace, Precision, Tokenizer
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.readers.questions import task_name
from megalm.errors import CheckpointError, ConfigError, is_out_of_memory
from megalm.runs.evaluations import EVALUATIONS_FILE, newest
from megalm.runs.metrics_log import MetricsWriter, plain
from megalm.runs.run_status import is_run
from megalm.utils.atomic_files import refuse_overwriting_inputs
from megalm.utils.formatting import table
from megalm.utils.plotting import new_plots, save_plot
from megalm.utils.process_setup import require_extra
from megalm.utils.progress import ProgressBar, watched
from megalm.utils.terminal import echo, echo_text

if TYPE_CHECKING:
    from megalm.inference.dataset_eval import DatasetTask, Row
    from megalm.inference.inference_model import CheckpointFacts
    from megalm.inference.lm_eval_tasks import HarnessTask
    from megalm.inference.text_eval import TextTask
    from megalm.train.multiple_choice import ChoiceTask

    Task = DatasetTask | TextTask | ChoiceTask | HarnessTask

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
    ("answer bits/byte", "answer_bits_per_byte", ".4f"),
    ("chance", "chance", ".1%"),
)
_TASK_COLUMNS: tuple[_Column, ...] = (
    ("task", "task", ""),
    ("version", "version", ""),
    ("examples", "fewshot", ""),
    ("questions", "questions", ","),
    ("metric", "metric", ""),
    ("value", "value", ".4f"),
    ("+-", "error", ".4f"),
)


@dataclass(frozen=True)
class _Request:
    """What to evaluate on, and how.

    Attributes:
        tasks: of lm-eval; `include` has folders of more of them, `fewshot` the number of examples in a prompt.
        tokenizer: its path, if it has moved since training.
        ema: the moving average of the weights is evaluated.
    """

    data: Sequence[str]
    text: Sequence[str]
    choices: Sequence[Path]
    tasks: Sequence[str]
    include: Sequence[Path]
    fewshot: int | None
    max_samples: int | None
    batch_size: int
    overlap: int | None
    text_key: str
    tokenizer: str | None
    precision: Precision
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
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Tasks of lm-evaluation-harness: names, patterns, task YAMLs or folders of them. May be repeated.",
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(
            "--include-path", metavar="FOLDER", help="For --tasks: a folder of YAMLs whose tasks can be named too."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, help="For --tasks: examples in each prompt. Default: as the task says."),
    ] = None,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="Evaluate all good checkpoints of the run.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Evaluate all good checkpoints, then each new one when it is complete, until the run ends."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="With several checkpoints: plot the main numbers over steps."),
    ] = None,
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
    """Evaluate checkpoints: loss, perplexity and bits per byte, and accuracy on questions and lm-eval's tasks.

    Without --data, --text, --choices and --tasks, uses the run's own complete validation sets, as at the end of
    training. Also appends the results to evaluations.jsonl in the run folder. docs/evaluation.md has the details.

    \b
    megalm evaluate runs/mine
    megalm evaluate runs/mine --data data/other --data data/third
    megalm evaluate runs/mine/checkpoints/step-00000400 --text books/
    megalm evaluate runs/mine --choices questions.jsonl --every-checkpoint --plot accuracy.png
    megalm evaluate runs/mine --tasks hellaswag,arc_easy,my_task.yaml
    megalm evaluate runs/mine --tasks my_tasks/ --watch
    megalm evaluate downloads/gpt2 --text books/
    """
    named = [word for words in tasks or () for word in words.split(",") if word]
    if named:
        require_extra("lm-eval", "--tasks", "eval")
        os.environ["TQDM_DISABLE"] = "1"  # the harness's own bars; read when torch imports tqdm
    elif tasks or include_path or num_fewshot is not None:
        raise ConfigError("--include-path and --num-fewshot need tasks; name them with --tasks")
    if watch and every_checkpoint:
        raise ConfigError("--watch evaluates every checkpoint already; leave out --every-checkpoint")
    if plot is not None and not (watch or every_checkpoint):
        raise ConfigError("--plot needs several checkpoints; add --every-checkpoint or --watch")
    from megalm.engine.deepspeed_patches import limit_openmp_spin
    from megalm.engine.device import speed_up_fp32_products, tune_malloc

    limit_openmp_spin()
    tune_malloc()
    speed_up_fp32_products()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    request = _Request(
        data or (),
        text or (),
        choices or (),
        named,
        include_path or (),
        num_fewshot,
        max_samples,
        batch_size,
        overlap,
        text_key,
        tokenizer or None,
        dtype,
        ema,
    )
    good: list[Path] = []
    if watch:
        found = find_place(place)
        if not is_run(found):
            raise ConfigError(f"--watch needs a run folder, and {found} is none; start the run first")
    elif every_checkpoint:
        found, good = good_checkpoints_at(place, "--every-checkpoint")
    else:
        found = checkpoint_at(place)
        good = [found]
    results = _Results(found, plot, json, at_once=watch)
    with _memory_errors_named():
        if watch:
            _evaluate_new(found, request, results)
        else:
            _evaluate_all(good, request, results, skips=every_checkpoint)
    if not results.rows:
        raise CheckpointError(f"{found}: no checkpoint could be evaluated")
    results.finish()


def _evaluate_all(paths: Sequence[Path], request: _Request, results: _Results, skips: bool) -> None:
    """Evaluate checkpoints, by the configuration of the last one.

    Args:
        skips: damaged ones are named and left out.
    """
    tasks = _open_tasks(paths[-1], request, results)
    with ProgressBar("evaluating", sum(task.batches for task in tasks) * len(paths)) as counter:
        for path in paths:
            try:
                # The function's end frees the model, so that one is in memory at a time.
                results.add(_evaluate(path, tasks, request, counter))
            except CheckpointError as error:
                if not skips:
                    raise
                warn(f"skipped {path.name}: {error}")


def _evaluate_new(run: Path, request: _Request, results: _Results) -> None:
    """Evaluate the checkpoints of a run as they come; one that is deleted meanwhile is named and left out."""
    from megalm.inference.run_checkpoints import follow

    tasks: list[Task] = []
    for path in follow(run, lambda line: warn(f"skipped {line}")):
        try:
            tasks = tasks or _open_tasks(path, request, results)
            with ProgressBar(f"evaluating {path.name}", sum(task.batches for task in tasks)) as counter:
                results.add(_evaluate(path, tasks, request, counter))
        except (CheckpointError, OSError) as error:
            if path.exists() and isinstance(error, OSError):
                raise
            warn(f"skipped {path.name}: {error if path.exists() else 'it was deleted meanwhile'}")


def _open_tasks(path: Path, request: _Request, results: _Results) -> list[Task]:
    """Open and check all requested data before a model is loaded, by the configuration of a checkpoint.

    Raises:
        CheckpointError: it is marked bad.
    """
    from megalm.inference.inference_model import read_facts

    facts = read_facts(path, request.tokenizer)
    marked = f"{facts.path} is {facts.manifest.mark}"
    if facts.manifest.status == "bad":
        raise CheckpointError(
            f"{marked}; choose another, or remove the mark with `megalm checkpoint mark-bad --good {facts.path}`"
        )
    if facts.manifest.mark:
        warn(marked)
    outputs = [results.plot] if results.plot is not None else []
    if facts.run_folder is not None:
        outputs.append(facts.run_folder / EVALUATIONS_FILE)
    refuse_overwriting_inputs(outputs, request.files())
    return _tasks(facts, request)


def _tasks(facts: CheckpointFacts, request: _Request) -> list[Task]:
    from megalm.inference.dataset_eval import DATA, OWN, DatasetTask, other_sets, own_sets
    from megalm.inference.text_eval import TextTask, read_text
    from megalm.train.multiple_choice import ChoiceTask, read_choices

    if not request.text and (request.overlap is not None or request.text_key != _TEXT_KEY):
        raise ConfigError("--overlap and --text-key need raw text; name it with --text")
    for option, named in (
        ("--data", request.data),
        ("--text", request.text),
        ("--choices", request.choices),
        ("--tasks", request.tasks),
    ):
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
    if request.tasks:
        from megalm.inference.lm_eval_tasks import HarnessTask, load_tasks  # an extra

        loaded = load_tasks(request.tasks, request.include, request.fewshot, watched("loading tasks"))
        tasks.append(HarnessTask(loaded, request.batch_size, request.max_samples, warn))
    if not tasks:
        tasks.append(DatasetTask(OWN, own_sets(facts, warn), facts.tokenizer, request.batch_size, request.max_samples))
    return tasks


def _evaluate(path: Path, tasks: Sequence[Task], request: _Request, counter: ProgressBar) -> list[Row]:
    """Evaluate one checkpoint on all tasks, and record the results in its run."""
    from megalm.inference.inference_model import InferenceModel

    with counter.paused():
        loading = watched(f"loading {path.name}")
        model = InferenceModel(path, request.tokenizer, request.precision.dtype, verify, loading, request.ema)
    manifest = model.facts.manifest
    about: dict[str, Any] = {
        "checkpoint": str(model.path),
        "step": manifest.step,
        "tokens": manifest.tokens,
        "dtype": request.precision.value,
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


class _Results:
    """Prints what was evaluated, and plots it.

    Args:
        place: the run or checkpoint.
        plot: the file for the plot.
        as_json: print JSON lines.
        at_once: print each checkpoint when it is evaluated, and draw the plot again.
    """

    def __init__(self, place: Path, plot: Path | None, as_json: bool, at_once: bool) -> None:
        self.plot = plot
        self.rows: list[Row] = []
        self._place, self._as_json, self._at_once = place, as_json, at_once

    def add(self, rows: Sequence[Row]) -> None:
        """Add the results of a checkpoint."""
        self.rows += rows
        if self._at_once:
            self._show(rows, Path(str(rows[0]["checkpoint"])))
            self._draw()

    def finish(self) -> None:
        if not self._at_once:
            self._show(self.rows, self._place)
            self._draw()
        if self.plot is not None:
            echo(f"\nmain numbers over steps: {self.plot}", err=self._as_json)

    def _show(self, rows: Sequence[Row], place: Path) -> None:
        if self._as_json:
            echo_text("\n".join(orjson.dumps(plain(row)).decode() for row in rows))
        else:
            echo(_tables(rows, place) + ("\n" if self._at_once else ""))
        sys.stdout.flush()

    def _draw(self) -> None:
        """Draw a line for each set and task, below each other by what is measured."""
        if self.plot is None:
            return
        found = newest(self.rows)
        measures = list(dict.fromkeys(one.measure for one in found))
        figure, places = new_plots("step", measures)
        for measure, axes in zip(measures, places, strict=True):
            of_measure = [one for one in found if one.measure == measure]
            for name in dict.fromkeys(one.name for one in of_measure):
                points = [(one.step, one.value) for one in of_measure if one.name == name]
                label = name.replace("$", "\\$")
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axes.legend(fontsize="small")
        save_plot(figure, self.plot)


def _tables(rows: Sequence[Row], place: Path) -> str:
    """Tables of losses, of answers and of tasks; each line has its step if there are several checkpoints."""
    steps = len({row["checkpoint"] for row in rows}) > 1
    first = rows[0]
    about = "" if steps else f": step {first['step']:,}, {first['tokens'] or 0:,} training tokens"
    answers = [row for row in rows if row["source"] == "choices"]
    metrics = [
        {**row, "metric": name, "value": value, "error": row["errors"].get(name)}
        for row in rows
        for name, value in row.get("metrics", {}).items()
    ]
    losses = [row for row in rows if "loss" in row]
    parts = [
        f"{place}{about} ({first['dtype']} on {first['device']})",
        *([_table(_LOSS_COLUMNS, losses, steps)] if losses else []),
        *([_table(_ANSWER_COLUMNS, answers, steps)] if answers else []),
        *([_table(_TASK_COLUMNS, metrics, steps)] if metrics else []),
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
