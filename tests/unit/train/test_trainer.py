"""What the loop decides between steps, with an engine whose losses are written in the test."""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.checkpoint.checkpointer import Saved
from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.data.sampling.batch_loader import GlobalBatch
from megalm.engine.interface import JudgeUpdate, RoutingStatistics, StepResult
from megalm.errors import EXIT_DONE, EXIT_START_AGAIN, TrainingError
from megalm.planning.batch_size import TrainingStage
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.recipe_claims import Expectation, Span
from megalm.planning.resolve import resolve
from megalm.runs.metrics_history import read_history
from megalm.runs.metrics_log import (
    TOTAL,
    MetricsWriter,
    describe_unbalanced_experts,
    live_rows,
    read_batches,
    read_metrics,
)
from megalm.runs.run_folder import RunFolder
from megalm.runs.run_lock import RunLock
from megalm.tracking.report.curves import charts
from megalm.train.console import RunConsole
from megalm.train.evaluator import Evaluation
from megalm.train.lifecycle.shutdown import StopRequest
from megalm.train.lifecycle.time_limits import TimeLimits, wall_seconds
from megalm.train.resume.training_progress import RunSchedule, TrainingProgress
from megalm.train.spikes.spike_guard import SpikeGuard
from megalm.train.spikes.spike_report import SpikeReport
from megalm.train.trainer import Trainer, TrainerComponents, memory_errors_named
from tests.messages import assert_names

ROOT = Path(__file__).resolve().parents[3]


class Engine:
    """Losses of 1, or as written per sample that a batch begins with; asks for a stop where told."""

    def __init__(self, losses: dict[int, float], stop: StopRequest, stop_at: int | None, judge: JudgeUpdate) -> None:
        self.losses, self.stop, self.stop_at, self.judge, self.rates = losses, stop, stop_at, judge, {}
        self.meanwhile: dict[int, Callable[[], object]] = {}  # what somebody does during a step
        self.applied: list[int] = []  # batches
        self.routing: RoutingStatistics | None = None

    def train_step(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        number = batch.sample_range[0] // 16 + 1
        self.rates[step] = learning_rate
        self.meanwhile.get(step, lambda: None)()
        if step == self.stop_at:
            self.stop.signal = 15
        loss = self.losses.get(number, 1.0)
        verdict = self.judge(loss, 0.5)
        if not math.isfinite(loss):
            verdict = replace(verdict, refuses=True)
        if not verdict.refuses:
            self.applied.append(number)
        return StepResult(loss, 0.5, 1.0, verdict, (None, loss), self.routing)

    def peak_memory_bytes(self) -> int:
        return 1


class Batches:
    def __init__(self, padding: int = 0) -> None:
        self.padding = padding
        self.read: list[tuple[int, int]] = []  # first sample and size

    def batch(self, first_sample: int, sizes: Sequence[tuple[int, int]]) -> GlobalBatch:
        self.read.append((first_sample, sizes[0][0]))
        return GlobalBatch((), 16, (first_sample, first_sample + sizes[0][0]), self.padding)


class Evaluator:
    def __init__(self, losses: Sequence[float], whole: float) -> None:
        self.losses, self.whole = list(losses), whole

    def evaluate(self, engine: Engine, whole: bool) -> Evaluation | None:
        return (
            Evaluation(TOTAL, self.whole if whole else self.losses.pop(0), 10, None) if whole or self.losses else None
        )


class Questions:
    """Right in as many of a thousand as the run has trained steps; remembers what was saved before."""

    def __init__(self, checkpoints: Checkpoints, position: TrainingProgress, questions: int) -> None:
        self.checkpoints, self.position, self.questions = checkpoints, position, questions
        self.saved_before: list[int] = []

    def rows(self, engine: Engine, heartbeat: Callable[[], None]) -> list[dict[str, Any]]:
        self.saved_before.append(len(self.checkpoints.saved))
        share = self.position.step / 1000
        of_all = {"accuracy": share, "accuracy_error": None, "byte_accuracy": share, "chance": 0.5}
        return [{"dataset": "sets/quiz.jsonl.gz", "questions": self.questions, **of_all}]


class Checkpoints:
    copies = None

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.positions: dict[int, TrainingProgress] = {}
        self.suspect: dict[int, str] = {}
        self.complete: list[Saved] = []
        self.best: list[str] = []
        self.noted: list[tuple[str, float]] = []

    def save(self, engine: Engine, position: TrainingProgress, status: str = "good", reason: str | None = None) -> Path:
        self.saved.append(position.step)
        self.positions[position.step] = replace(position)
        position.data_json("order")  # refuses a segment that is none
        if status == "suspect":
            assert reason
            self.suspect[position.step] = reason
        self.complete.append(Saved(Path(f"step-{position.step}"), position.step, 0.1, 0.2, 100))
        return Path(f"step-{position.step}")

    def completed(self, wait: bool = False) -> list[Saved]:
        complete, self.complete = self.complete, []
        return complete

    def mark_best(self, path: Path) -> None:
        self.best.append(path.name)

    def order_at(self, sample: int) -> str:
        return "order"

    def move_to(self, folder: RunFolder) -> None:
        self.moved_to = folder.path

    def note_evaluation(self, path: Path, evaluation: Evaluation) -> None:
        self.noted.append((path.name, evaluation.loss))

    def roll_back(
        self, engine: Engine, guard: SpikeGuard, next_sample: int, attempt: int
    ) -> tuple[Path, TrainingProgress]:
        guard.forget_refusals()
        step = max(step for step in self.positions if step not in self.suspect)
        position = replace(self.positions[step])
        position.skip(next_sample - position.samples, "order")
        return Path(f"step-{step}"), position


class Incidents:
    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []

    def write(self, engine: Engine, incident: SpikeReport) -> Path:
        self.steps.append((incident.step, incident.verdict.action))
        return Path("incidents") / f"step-{incident.step}.md"


class Sampler:
    def __init__(self) -> None:
        self.steps: list[tuple[int, bool]] = []

    def write(self, engine: Engine, step: int, show: bool) -> None:
        self.steps.append((step, show))


class Alone:
    rank, size, is_main = 0, 1, True

    def broadcast(self, value: Any) -> Any:
        return value

    def max(self, values: list[float]) -> list[float]:
        return values


class Story:
    """A loop over these parts, and what it left in metrics.jsonl."""

    def __init__(self, folder: Path, *overrides: str, **options: Any) -> None:
        loaded = load_run_config(
            None, [f"train.steps={options.get('steps', 10)}", "schedule.warmup_steps=2", *overrides]
        )
        source = read_deepspeed_json(str(ROOT / "ds_configs" / "fp32.json"))
        run = resolve(loaded, source, 1, DeviceFacts("cpu", False, 1 << 33), 100)
        stop = StopRequest(3600)
        guard = SpikeGuard(run.config.guard)
        self.engine = Engine(options.get("losses", {}), stop, options.get("stop_at"), guard.judge)
        self.checkpoints, self.sampler, self.batches = Checkpoints(), Sampler(), Batches(options.get("padding", 0))
        self.incidents, self.metrics = Incidents(), folder / "metrics.jsonl"
        position = options.get("position", TrainingProgress(run.stages.at(1)))
        position.schedule = RunSchedule((ScheduleSegment(1, 0, run.schedule),))
        self.questions = [Questions(self.checkpoints, position, number) for number in (10, 1000)]
        self.loop = Trainer(
            TrainerComponents(
                run=run,
                comm=Alone(),  # type: ignore[arg-type]
                engine=self.engine,  # type: ignore[arg-type]
                batches=self.batches,  # type: ignore[arg-type]
                evaluator=Evaluator(options.get("validation", []), options.get("whole", 9.0)),  # type: ignore[arg-type]
                checkpoints=self.checkpoints,  # type: ignore[arg-type]
                sampler=self.sampler,  # type: ignore[arg-type]
                metrics=MetricsWriter(self.metrics),
                lock=options.get("lock"),
                reporter=RunConsole(active=False),
                stop=stop,
                guard=guard,
                incidents=self.incidents,  # type: ignore[arg-type]
                limits=options.get("limits", TimeLimits()),
                flops_per_token=lambda length: 1.0,
                peak_flops=options.get("peak_flops", 1e12),
                datasets=options.get("datasets", ()),
                choices=tuple(self.questions),  # type: ignore[arg-type]
            ),
            position,
        )

    def events(self) -> list[str]:
        return [row["event"] for row in read_metrics(self.metrics) if row["kind"] == "event"]


def test_padding_is_no_token_and_a_mixture_has_a_loss_of_each_dataset(tmp_path: Path) -> None:
    story = Story(tmp_path, padding=96, datasets=("web", "code"), steps=3)
    assert story.loop.fit() == EXIT_DONE
    rows = [row for row in read_metrics(story.metrics) if row["kind"] == "train"]
    assert [row["tokens"] for row in rows] == [4000, 8000, 12000]
    assert [row["tokens_per_second"] * row["step_seconds"] for row in rows] == pytest.approx([4000] * 3)
    assert [(row["loss_of_web"], row["loss_of_code"]) for row in rows] == [(None, 1.0)] * 3


def test_the_load_of_experts_is_in_the_metrics_and_a_dead_one_is_an_event(tmp_path: Path) -> None:
    story = Story(tmp_path, "guard.experts_interval_steps=2", steps=6)
    counts = ((10, 10, 10, 10, 10, 10, 10, 10), (16, 10, 20, 4, 10, 10, 10, 0))
    story.engine.routing = RoutingStatistics((0, 2), counts, entropy=1.5, balance_loss=2.25, z_loss=0.5, dropped=0.125)
    assert story.loop.fit() == EXIT_DONE
    history = read_history(read_batches(story.metrics))
    assert history.column("expert_load_max").tolist() == [2.0] * 6
    assert history.column("router_entropy").tolist() == [1.5] * 6
    assert history.column("dropped_tokens").tolist() == [0.125] * 6
    assert [chart.name for chart in charts(history)][-3:] == ["Fullest expert", "Dropped tokens", "Router entropy"]
    rows = [row for row in read_metrics(story.metrics) if "experts" in str(row.get("event"))]
    assert [(row["event"], row["first_step"], row["last_step"]) for row in rows] == [
        ("experts", 1, 2),
        ("unbalanced_experts", 1, 2),  # the others are no news
        ("experts", 3, 4),
        ("experts", 5, 6),
    ]
    assert [row["dropped_tokens"] for row in rows if row["event"] == "experts"] == [0.125] * 3
    assert rows[0]["load"] == {"0": [1.0] * 8, "2": [1.6, 1.0, 2.0, 0.4, 1.0, 1.0, 1.0, 0.0]}
    assert (rows[1]["dead"], rows[1]["overloaded"]) == ([[2, 7]], [])
    assert_names(describe_unbalanced_experts(rows[1]), "7 of layer 2")


def test_intervals_and_the_end(tmp_path: Path) -> None:
    settings = ("evaluate.interval_steps=4", "checkpoint.interval_steps=3", "sample.interval_steps=5")
    story = Story(tmp_path, *settings, validation=[3.0, 2.0])
    assert story.loop.fit() == EXIT_DONE
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


def answers(metrics: Path) -> list[tuple[int, str, int, float]]:
    rows = [row for row in live_rows(read_metrics(metrics)) if row["kind"] == "task"]
    return [(row["step"], row["task"], row["questions"], row["accuracy"]) for row in rows]


def test_questions_are_answered_at_their_own_interval_and_a_resume_leaves_none_out(tmp_path: Path) -> None:
    """A part of them while training, all at the end; a run that is stopped at such a step has answered them there."""
    settings = ("evaluate.tasks_interval_steps=4", "evaluate.interval_steps=4", "checkpoint.best=true")
    story = Story(tmp_path, *settings, validation=[3.0, 2.0], stop_at=8)
    assert story.loop.fit() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [4, 8], "the best of a validation, at the same steps"
    assert story.questions[False].saved_before == [0, 1], "a resume from either does not come back to its step"
    resumed = Story(tmp_path, *settings, validation=[1.0], position=story.loop.position)
    resumed.loop.event("resume")
    assert resumed.loop.fit() == EXIT_DONE
    assert answers(story.metrics) == [(4, "quiz", 10, 0.004), (8, "quiz", 10, 0.008), (10, "quiz", 1000, 0.01)]


def test_without_an_interval_questions_are_answered_at_the_end(tmp_path: Path) -> None:
    story = Story(tmp_path, steps=5)
    assert story.loop.fit() == EXIT_DONE
    assert answers(story.metrics) == [(5, "quiz", 1000, 0.005)]


def test_a_peak_that_is_exceeded_is_doubted_once(tmp_path: Path) -> None:
    story = Story(tmp_path, steps=3, peak_flops=1.0)
    assert story.loop.fit() == EXIT_DONE
    (warning,) = [row for row in read_metrics(story.metrics) if row.get("event") == "warning"]
    assert warning["step"] == 1
    assert_names(warning["text"], "MFU", "100%")


def test_losses_are_reported_beside_those_of_a_document(tmp_path: Path) -> None:
    """The training loss by its median of the steps so far: step 7 alone is no trend."""
    claims = ", ".join(
        f"{{claim: {name}_loss, step: {step}, value: {value}}}"
        for name, step, value in (
            ("training", 3, "[0.8, 0.95]"),
            ("training", 5, 1.09),
            ("training", 6, 1.11),
            ("training", 7, "[0.9, 1.2]"),
            ("validation", 4, 2.5),
            ("validation", 10, "[8, 9]"),
            ("training", 0, 9.23),
        )
    )
    settings = (f"documented.claims=[{claims}]", "evaluate.interval_steps=4")
    story = Story(tmp_path, *settings, validation=[3.0, 2.0], losses={7: 1.4})
    history, medians = story.loop.parts.guard.history, []
    take_median = history.median_loss
    history.median_loss = lambda loss: medians.append(loss) or take_median(loss)  # type: ignore[method-assign]
    assert story.loop.fit() == EXIT_DONE
    assert medians == [1.0, 1.0, 1.0, 1.4], "of the four steps that the document has a training loss of"
    told = [row for row in read_metrics(story.metrics) if row.get("event") == "expected"]
    assert [(row["step"], row["quantity"], row["loss"], row["met"]) for row in told] == [
        (3, "training_loss", 1.0, False),
        (4, "validation_loss", 3.0, False),
        (5, "training_loss", 1.0, True),
        (6, "training_loss", 1.0, False),
        (7, "training_loss", 1.0, True),
        (10, "validation_loss", 9.0, True),
    ]
    above = Expectation(1000, "training_loss", 6.41, Span(5.5, 6.0))
    assert_names(above, 1000, "training loss", "6.4100", "5.5-6", "0.41")
    below = Expectation(500, "validation_loss", 3.3, Span(3.5, 3.5))
    assert_names(below, 500, "validation loss", "3.3000", "3.5", "0.20")
    met = replace(below, loss=3.45)
    assert_names(met, 500, "3.4500", "3.5")
    assert "0.05" not in str(met), "as documented"


def test_patience_counts_validations_without_a_new_lowest(tmp_path: Path) -> None:
    settings = ("evaluate.interval_steps=1", "evaluate.patience=2", "checkpoint.best=true")
    story = Story(tmp_path, *settings, validation=[3.0, 2.0, 2.5, 1.9, 1.9, 2.1, 1.0])
    assert story.loop.fit() == EXIT_DONE
    assert story.loop.position.step == 6
    assert story.checkpoints.best == ["step-1", "step-2", "step-4"]
    assert story.checkpoints.saved == [1, 2, 4, 6]
    assert story.events()[-3:] == ["early_stop", "checkpoint", "end"]


@pytest.mark.parametrize(
    ("samples", "losses"),
    [("128", [3.0, 2.0]), ("null", [3.0])],
    ids=["on a part, which the last step is validated on, too", "on everything"],
)
def test_the_last_step_may_be_the_best(tmp_path: Path, samples: str, losses: list[float]) -> None:
    settings = ("evaluate.interval_steps=5", f"evaluate.max_samples={samples}", "checkpoint.best=true")
    story = Story(tmp_path, *settings, validation=losses, whole=2.0)
    assert story.loop.fit() == EXIT_DONE
    assert story.checkpoints.best == ["step-5", "step-10"]
    assert story.checkpoints.noted == [("step-10", 2.0)]


def test_the_last_step_may_be_worse(tmp_path: Path) -> None:
    settings = ("evaluate.interval_steps=5", "evaluate.max_samples=128", "checkpoint.best=true")
    story = Story(tmp_path, *settings, validation=[3.0, 3.5], whole=2.0)
    assert story.loop.fit() == EXIT_DONE
    assert story.checkpoints.best == ["step-5"], "a loss over other samples says nothing"


def test_a_validation_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    settings = ("evaluate.interval_steps=1", "evaluate.patience=2", "checkpoint.best=true")
    story = Story(tmp_path, *settings, validation=[math.nan, 3.0, math.nan, 4.0, 2.0])
    assert story.loop.fit() == EXIT_DONE
    assert story.checkpoints.best == ["step-2"]
    assert (story.loop.position.step, story.loop.position.best_loss) == (4, 3.0)


GROWS = "schedule.batch=[{from_step: 4, sequences: 32}, {from_step: 6, sequences: 48}]"


def test_a_batch_that_grows_counts_its_samples_and_tokens(tmp_path: Path) -> None:
    story = Story(tmp_path, GROWS, "checkpoint.interval_steps=1", steps=7)
    assert story.loop.fit() == EXIT_DONE
    assert story.batches.read == [(0, 16), (16, 16), (32, 16), (48, 32), (80, 32), (112, 48), (160, 48)]
    rows = [row for row in read_metrics(story.metrics) if row["kind"] == "train"]
    assert [row["samples"] for row in rows] == [16, 32, 48, 80, 112, 160, 208]
    assert [row["tokens"] for row in rows] == [256 * row["samples"] for row in rows]
    for row, batch in zip(rows, (16, 16, 16, 32, 32, 48, 48), strict=True):
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(256 * batch)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] / 1e12)
    segments = story.checkpoints.positions[7].data_json("order")["segments"]
    assert [(it["first_sample"], it["samples_consumed"], it["global_batch"], it["begins"]) for it in segments] == [
        (0, 48, 16, "anew"),
        (48, 64, 32, "on"),
        (112, 96, 48, "on"),
    ]
    at_boundary = story.checkpoints.positions[3].data_json("order")["segments"]
    assert [(it["samples_consumed"], it["global_batch"]) for it in at_boundary] == [(48, 16)]


def test_a_rollback_over_a_boundary_of_the_batch_skips_the_spike(tmp_path: Path) -> None:
    words = ("guard.policy=rollback", "guard.warmup_steps=2", "guard.window=4", "checkpoint.interval_steps=3")
    story = Story(tmp_path, GROWS, *words, losses={80 // 16 + 1: math.nan}, steps=7)
    assert story.loop.fit() == EXIT_DONE
    # Step 5, samples 80 to 111, is refused; from step 3 on, step 4 has 32 samples again.
    assert story.batches.read[:5] == [(0, 16), (16, 16), (32, 16), (48, 32), (80, 32)]
    assert story.batches.read[5:] == [(112, 32), (144, 32), (176, 48), (224, 48)]
    assert story.loop.position.tokens == 256 * (3 * 16 + 2 * 32 + 2 * 48)


def test_patience_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    of_step = {"step": 3, "samples": 48, "tokens": 3 * 4096, "attempt": 2}
    position = TrainingProgress(TrainingStage(1, 16, 256), **of_step, best_loss=2.0, stale_evaluations=1)
    settings = ("evaluate.interval_steps=1", "evaluate.patience=2")
    story = Story(tmp_path, *settings, validation=[2.4, 2.3], position=position)
    assert story.loop.fit() == EXIT_DONE
    assert story.loop.position.step == 4


def test_a_signal_saves_this_step_and_leaves(tmp_path: Path) -> None:
    story = Story(tmp_path, "checkpoint.interval_steps=3", stop_at=4)
    assert story.loop.fit() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [3, 4]
    assert story.events() == ["checkpoint", "signal", "checkpoint", "end"]


def test_a_signal_at_a_saved_step_saves_once(tmp_path: Path) -> None:
    story = Story(tmp_path, "checkpoint.interval_steps=3", stop_at=3)
    assert story.loop.fit() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [3]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    story = Story(tmp_path, stop_at=10)
    assert story.loop.fit() == EXIT_DONE
    assert story.checkpoints.saved == [10]


@pytest.mark.parametrize("policy", ["off", "stop"])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, loss: float, policy: str) -> None:
    story = Story(tmp_path, "checkpoint.interval_steps=2", f"guard.policy={policy}", losses={4: loss})
    with pytest.raises(TrainingError) as stopped:
        story.loop.fit()
    assert_names(stopped.value, 4, "loss", loss, f"guard.policy={policy}", 48, 63, "incidents/step-4.md")
    assert story.checkpoints.saved == [2, 3]
    (reason,) = story.checkpoints.suspect.values()
    assert_names(reason, 4, "loss", loss)
    assert story.checkpoints.suspect == {3: reason}
    assert story.events() == ["checkpoint", "spike", "checkpoint"]


EAGER = ("guard.warmup_steps=3", "guard.window=6")


def test_skip_leaves_out_what_is_out_of_bounds(tmp_path: Path) -> None:
    story = Story(
        tmp_path, *EAGER, "guard.policy=skip", "checkpoint.interval_steps=3", losses={5: 9.0, 6: math.nan}, steps=12
    )
    assert story.loop.fit() == EXIT_DONE
    assert story.engine.applied == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert story.incidents.steps == [(5, "skip"), (6, "skip")]
    assert story.checkpoints.saved == [3, 6, 9, 12]
    assert list(story.checkpoints.suspect) == [6], "written while updates are being refused"
    skips = [row for row in read_metrics(story.metrics) if row.get("event") == "skip"]
    assert [row["at_step"] for row in skips] == [5, 6]
    for row, loss in zip(skips, (9, math.nan), strict=True):
        assert_names(row["reason"], "loss", loss)


def test_too_many_skips_in_a_row_end_the_run(tmp_path: Path) -> None:
    losses = dict.fromkeys(range(5, 13), 9.0)
    story = Story(tmp_path, *EAGER, "guard.policy=skip", "guard.max_skips_in_a_row=2", losses=losses, steps=12)
    with pytest.raises(TrainingError) as stopped:
        story.loop.fit()
    assert_names(stopped.value, 7, "loss", 9, 3, "guard.max_skips_in_a_row=2")
    assert story.engine.applied == [1, 2, 3, 4]


def test_off_lets_it_pass_and_trusts_no_checkpoint_of_the_window_after(tmp_path: Path) -> None:
    story = Story(tmp_path, *EAGER, "guard.policy=off", "checkpoint.interval_steps=2", losses={5: 9.0}, steps=12)
    assert story.loop.fit() == EXIT_DONE
    assert story.engine.applied == list(range(1, 13))
    assert story.checkpoints.saved == [2, 4, 6, 8, 10, 12]
    assert list(story.checkpoints.suspect) == [6, 8, 10]
    assert_names(story.checkpoints.suspect[6], 5, "guard.policy=off")


def test_rollback_goes_back_and_past_the_data(tmp_path: Path) -> None:
    settings = ("guard.policy=rollback", "checkpoint.interval_steps=3", "evaluate.interval_steps=3")
    story = Story(tmp_path, *EAGER, *settings, losses={5: 9.0}, validation=[3.0, 2.0, 1.0], steps=12)
    assert story.loop.fit() == EXIT_DONE
    assert story.engine.applied == [1, 2, 3, 4, *range(6, 15)], "batches 4 and 5 are skipped, 4 was taken back"
    position = story.loop.position
    assert (position.step, position.samples, position.attempt, position.rollbacks) == (12, 14 * 16, 2, 1)
    assert [(part.samples_consumed, part.samples_skipped) for part in position.data_history] == [(48, 32)]
    rows = list(read_metrics(story.metrics))
    event = next(row for row in rows if row.get("event") == "rollback")
    assert (event["step"], event["at_step"], event["samples_skipped"], event["attempt"]) == (3, 5, 32, 2)
    assert [row["step"] for row in live_rows(rows) if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, 6, 9, 12], "step 3 is not validated twice"


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    settings = ("guard.policy=rollback", "checkpoint.interval_steps=3", "guard.max_rollbacks=2")
    story = Story(tmp_path, *EAGER, *settings, losses=dict.fromkeys(range(5, 40), 9.0), steps=12)
    with pytest.raises(TrainingError) as stopped:
        story.loop.fit()
    assert_names(stopped.value, 2, "guard.max_rollbacks=2")
    assert [action for _, action in story.incidents.steps] == ["rollback", "rollback", "stop"]


def test_a_run_that_does_not_learn_is_stopped(tmp_path: Path) -> None:
    settings = ("guard.stop_above=0.9", "guard.after_step=6")
    story = Story(tmp_path, *settings)
    with pytest.raises(TrainingError) as stopped:
        story.loop.fit()
    assert_names(stopped.value, 7, "loss", 1, "guard.stop_above=0.9", "guard.after_step=6")
    assert story.checkpoints.suspect.keys() == {7}


def test_the_time_that_a_run_is_given(tmp_path: Path) -> None:
    limits = TimeLimits(wall_seconds=100.0, started=time.monotonic() - 95.0)
    story = Story(tmp_path, "train.max_wall_time=100s", limits=limits)
    assert story.loop.fit() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [1]
    assert story.events() == ["wall_time", "checkpoint", "end"]


def test_the_longest_step_and_save_must_fit_into_what_is_left() -> None:
    limits = TimeLimits(wall_seconds=1000.0, started=time.monotonic() - 900.0)
    assert not limits.boundary()
    limits.saved(50.0)
    assert not limits.boundary(), "75 of 100 s, and ten to leave"
    limits.saved(61.0)
    assert limits.boundary()


def test_a_longer_step_to_come_must_fit_into_the_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("megalm.train.lifecycle.time_limits.time", SimpleNamespace(monotonic=lambda: now))
    limits = TimeLimits(wall_seconds=1000.0, started=0.0)
    limits.boundary()
    now = 100.0
    assert not limits.boundary(2)
    assert not limits.boundary(2, growth=7.0)
    assert limits.boundary(2, growth=9.0)


@pytest.mark.parametrize("interval", ["4", "null"])
def test_garbage_is_collected_at_its_steps_only(tmp_path: Path, interval: str) -> None:
    """All ranks collect at the same steps; an interval of null leaves it to Python."""
    story = Story(tmp_path, f"train.gc_interval_steps={interval}")
    position = story.loop.position
    collected: list[int] = []
    enabled: set[bool] = set()

    def notice(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2 and position.step:
            collected.append(position.step)

    for step in range(1, 11):
        story.engine.meanwhile[step] = lambda: enabled.add(gc.isenabled())
    gc.callbacks.append(notice)
    try:
        story.loop.fit()
    finally:
        gc.callbacks.remove(notice)
    assert gc.isenabled()
    assert enabled == {interval == "null"}
    if interval == "4":
        assert collected == [4, 8]


def test_running_out_of_memory_names_the_phase_and_what_to_change() -> None:
    what = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    with pytest.raises(TrainingError) as named, memory_errors_named("validation"):
        raise RuntimeError(what)
    advice = ("train_micro_batch_size_per_gpu", "train.checkpoint_activations_every=1", "ds_configs/zero3.json")
    assert_names(named.value, "validation", what, *advice)
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_named("validation"):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.fixture
def run_with_a_lock() -> Iterator[Callable[..., Story]]:
    with ExitStack() as ends:

        def start(folder: Path, *settings: str, **options: Any) -> Story:
            folder.mkdir()
            lock = RunLock(folder)
            lock.take()
            ends.callback(lock.release)
            return Story(folder, *settings, lock=lock, **options)

        yield start


@pytest.mark.parametrize("at", [4, 6, 10], ids=["between", "before an evaluation", "last step"])
def test_a_moved_run_folder_is_saved_in_and_left(
    tmp_path: Path, run_with_a_lock: Callable[..., Story], at: int
) -> None:
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    story = run_with_a_lock(folder, "evaluate.interval_steps=6", validation=[3.0])
    story.engine.meanwhile[at] = lambda: folder.rename(elsewhere)
    assert story.loop.fit() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [at]
    assert story.checkpoints.moved_to == elsewhere
    assert not folder.exists(), "nothing is written under its old name"
    rows = list(read_metrics(elsewhere / "metrics.jsonl"))
    assert rows[-1]["exit_code"] == EXIT_START_AGAIN
    (warning,) = [row["text"] for row in rows if row.get("event") == "warning"]
    assert_names(warning, folder, elsewhere)


def test_without_its_lock_a_run_saves_and_leaves(tmp_path: Path, run_with_a_lock: Callable[..., Story]) -> None:
    story = run_with_a_lock(tmp_path / "mine")
    story.engine.meanwhile[4] = (tmp_path / "mine" / "lock").unlink
    assert story.loop.fit() == EXIT_START_AGAIN
    assert story.checkpoints.saved == [4]
    assert_names([row for row in read_metrics(story.metrics) if row.get("event") == "warning"], tmp_path / "mine/lock")


def test_a_run_never_writes_into_the_folder_that_replaced_its_own(
    tmp_path: Path, run_with_a_lock: Callable[..., Story]
) -> None:
    folder = tmp_path / "mine"
    story = run_with_a_lock(folder)

    def replace_it() -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    story.engine.meanwhile[4] = replace_it
    with pytest.raises(TrainingError) as failed:
        story.loop.fit()
    assert_names(failed.value, folder, 4)
    assert story.checkpoints.saved == []
    assert not list(folder.iterdir())


def test_metrics_that_are_deleted_go_on_in_a_new_file(tmp_path: Path, run_with_a_lock: Callable[..., Story]) -> None:
    story = run_with_a_lock(tmp_path / "mine")
    story.loop.event("start")
    story.engine.meanwhile[4] = story.metrics.unlink
    assert story.loop.fit() == EXIT_DONE
    first, warning, *rows = read_metrics(story.metrics)
    assert (first["event"], warning["event"]) == ("start", "warning")
    assert_names(warning["text"], story.metrics)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(5, 11))


def test_without_a_limit_of_its_own_a_run_ends_with_its_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic() - 5.0
    assert wall_seconds(None, started) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert wall_seconds(None, started) == pytest.approx(105.0, abs=2.0)
    assert wall_seconds(30.0, started) == 30.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    assert wall_seconds(None, started) is None
