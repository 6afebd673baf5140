"""What the loop decides between steps, with an engine whose losses are written in the test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.writer import Saved
from megalm.config.deepspeed_json import read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.config.precision import DeviceFacts
from megalm.config.resolve import resolve
from megalm.engine.protocol import StepResult
from megalm.errors import EXIT_DONE, EXIT_START_AGAIN, TrainingError
from megalm.tracking.metrics import MetricsWriter, read_metrics
from megalm.train.evaluate import Evaluation
from megalm.train.leaving import StopRequest
from megalm.train.loop import Parts, Position, TrainingLoop
from megalm.train.rehearsal import memory_errors_named
from megalm.train.report import Reporter

ROOT = Path(__file__).resolve().parents[3]


class Engine:
    """Losses of 1, or as written per step; asks for a stop where told."""

    def __init__(self, losses: dict[int, float], stop: StopRequest, stop_at: int | None) -> None:
        self.losses, self.stop, self.stop_at, self.rates = losses, stop, stop_at, {}

    def train_step(self, batch: int, step: int, learning_rate: float) -> StepResult:
        assert batch == 16 * (step - 1), "the first sample of this step's batch"
        self.rates[step] = learning_rate
        if step == self.stop_at:
            self.stop.signal = 15
        return StepResult(self.losses.get(step, 1.0), 0.5, 1.0, skipped=False)

    def peak_memory_bytes(self) -> int:
        return 1


class Batches:
    def batch(self, first_sample: int) -> int:
        return first_sample


class Evaluator:
    def __init__(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)

    def evaluate(self, engine: Engine, whole: bool) -> Evaluation | None:
        return Evaluation("v", 9.0 if whole else self.losses.pop(0), 10, None) if whole or self.losses else None


class Checkpoints:
    def __init__(self) -> None:
        self.saved: list[int] = []
        self.complete: list[Saved] = []
        self.best: list[str] = []
        self.noted: list[tuple[str, float]] = []

    def save(self, engine: Engine, position: Position, status: str = "good", reason: str | None = None) -> Path:
        self.saved.append(position.step)
        self.complete.append(Saved(Path(f"step-{position.step}"), position.step, 0.1, 0.2, 100))
        return Path(f"step-{position.step}")

    def completed(self, wait: bool = False) -> list[Saved]:
        complete, self.complete = self.complete, []
        return complete

    def mark_best(self, path: Path) -> None:
        self.best.append(path.name)

    def note_evaluation(self, path: Path, evaluation: Evaluation) -> None:
        self.noted.append((path.name, evaluation.loss))


class Sampler:
    def __init__(self) -> None:
        self.steps: list[tuple[int, bool]] = []

    def write(self, engine: Engine, step: int, show: bool) -> None:
        self.steps.append((step, show))


class Alone:
    rank, size, is_main = 0, 1, True

    def max(self, values: list[float]) -> list[float]:
        return values


class Story:
    """A loop over these parts, and what it left in metrics.jsonl."""

    def __init__(self, folder: Path, *overrides: str, **options: Any) -> None:
        loaded = load_run_config(None, ["train.steps=10", "schedule.warmup_steps=2", *overrides])
        source = read_deepspeed_json(str(ROOT / "ds_configs" / "fp32.json"))
        run = resolve(loaded, source, 1, DeviceFacts("cpu", False, 1 << 33), 100)
        stop = StopRequest(3600)
        self.engine = Engine(options.get("losses", {}), stop, options.get("stop_at"))
        self.checkpoints, self.sampler = Checkpoints(), Sampler()
        self.metrics = folder / "metrics.jsonl"
        self.loop = TrainingLoop(
            Parts(
                run=run,
                comm=Alone(),  # type: ignore[arg-type]
                engine=self.engine,  # type: ignore[arg-type]
                batches=Batches(),  # type: ignore[arg-type]
                evaluator=Evaluator(options.get("validation", [])),  # type: ignore[arg-type]
                checkpoints=self.checkpoints,  # type: ignore[arg-type]
                sampler=self.sampler,  # type: ignore[arg-type]
                metrics=MetricsWriter(self.metrics),
                reporter=Reporter(active=False),
                stop=stop,
                flops_per_token=1.0,
                peak_flops=1.0,
            ),
            options.get("position", Position()),
        )

    def events(self) -> list[str]:
        return [row["event"] for row in read_metrics(self.metrics) if row["kind"] == "event"]


def test_intervals_and_the_end(tmp_path: Path) -> None:
    settings = ("evaluate.interval_steps=4", "checkpoint.interval_steps=3", "sample.interval_steps=5")
    story = Story(tmp_path, *settings, validation=[3.0, 2.0])
    assert story.loop.run() == EXIT_DONE
    assert story.checkpoints.saved == [3, 6, 9, 10]
    assert story.sampler.steps == [(5, False), (10, True)]
    assert story.checkpoints.noted == [("step-10", 9.0)]
    rows = list(read_metrics(story.metrics))
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    assert [row["tokens"] for row in rows if row["kind"] == "train"] == [4096 * step for step in range(1, 11)]
    assert [(row["step"], row["loss"], row["whole"]) for row in rows if row["kind"] == "eval"] == [
        (4, 3.0, False),
        (8, 2.0, False),
        (10, 9.0, True),
    ]
    assert story.events()[-1] == "end"
    assert (rows[-1]["status"], rows[-1]["exit_code"]) == ("finished", 0)
    assert story.engine.rates[2] == pytest.approx(3e-3)
    assert story.engine.rates[10] == pytest.approx(3e-4)


def test_patience_counts_validations_without_a_new_lowest(tmp_path: Path) -> None:
    settings = ("evaluate.interval_steps=1", "evaluate.patience=2", "checkpoint.best=true")
    story = Story(tmp_path, *settings, validation=[3.0, 2.0, 2.5, 1.9, 1.9, 2.1, 1.0])
    assert story.loop.run() == EXIT_DONE
    assert story.loop.position.step == 6
    assert story.checkpoints.best == ["step-1", "step-2", "step-4"]
    assert story.checkpoints.saved == [1, 2, 4, 6]
    assert story.events()[-3:] == ["early_stop", "checkpoint", "end"]


def test_patience_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    position = Position(step=3, samples=48, tokens=3 * 4096, attempt=2, best_loss=2.0, stale_evaluations=1)
    settings = ("evaluate.interval_steps=1", "evaluate.patience=2")
    story = Story(tmp_path, *settings, validation=[2.4, 2.3], position=position)
    assert story.loop.run() == EXIT_DONE
    assert story.loop.position.step == 4


def test_a_signal_saves_this_step_and_leaves(tmp_path: Path) -> None:
    story = Story(tmp_path, "checkpoint.interval_steps=3", stop_at=4)
    assert story.loop.run() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [3, 4]
    assert story.events() == ["checkpoint", "signal", "checkpoint", "end"]


def test_a_signal_at_a_saved_step_saves_once(tmp_path: Path) -> None:
    story = Story(tmp_path, "checkpoint.interval_steps=3", stop_at=3)
    assert story.loop.run() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [3]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    story = Story(tmp_path, stop_at=10)
    assert story.loop.run() == EXIT_DONE
    assert story.checkpoints.saved == [10]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_no_checkpoint_follows_a_loss_that_is_no_number(tmp_path: Path, loss: float) -> None:
    story = Story(tmp_path, "checkpoint.interval_steps=2", losses={5: loss})
    with pytest.raises(
        TrainingError, match=r"step 5: loss (nan|inf).*samples 64 to 79.*nothing was saved after step 4"
    ):
        story.loop.run()
    assert story.checkpoints.saved == [2, 4]


def test_running_out_of_memory_names_the_phase_and_what_to_change() -> None:
    what = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    said = r"out of memory in validation .*micro_batch.*checkpoint_activations_every"
    with pytest.raises(TrainingError, match=said), memory_errors_named("validation"):
        raise RuntimeError(what)
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_named("validation"):
        raise RuntimeError("shapes cannot be multiplied")
