"""A run folder as TensorBoard's own readers show it: one value a step, whatever run and mirror have been through."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as DataProvider
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megalm.errors import ConfigError
from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.mlflow_mirror.sink import FINISHED, KILLED, Feed
from megalm.tracking.sinks.tensorboard_sink import TensorBoardSink
from tests.messages import assert_names


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 4}\nmodel: {style: llama}\n")
    return folder


def write(run_dir: Path, *rows: dict[str, object]) -> None:
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        for row in rows:
            writer.row(**row)


def attempt(number: int, first: int, last: int, **end: object) -> list[dict[str, object]]:
    """Rows of an attempt; losses tell the attempt, and the last step is validated."""
    begin = {"event": "start"} if number == 1 else {"event": "resume", "step": first - 1}
    rows: list[dict[str, object]] = [{"kind": "event", **begin, "attempt": number}]
    steps = range(first, last + 1)
    rows += [{"kind": "train", "step": step, "loss": number + step / 8, "attempt": number} for step in steps]
    rows.append({"kind": "eval", "step": last, "loss": number + 0.5, "dataset": "validation", "attempt": number})
    return [*rows, {"kind": "event", "event": "end", "step": last, **end}] if end else rows


def deliver(run_dir: Path) -> TensorBoardSink:
    """What a mirror does in its last pass, or `megalm track sync`."""
    sink = TensorBoardSink(run_dir)
    Feed(sink, run_dir).deliver()
    sink.close()
    return sink


def shown(run_dir: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    seen = [(it.step, it.value) for it in EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars(tag)]
    provider = DataProvider(str(run_dir / "tensorboard")).Reload()
    assert seen == [(it.step, float(it.tensor_proto.float_val[0])) for it in provider.Tensors(tag)], "both readers"
    return seen


def test_rows_are_scalars_and_settings_are_hyperparameters(run_dir: Path) -> None:
    write(run_dir, *attempt(1, 1, 4, status="finished", exit_code=0))
    write(run_dir, {"kind": "eval", "step": 4, "loss": 9.0, "dataset": "data/other", "perplexity": float("inf")})
    sink = deliver(run_dir)
    assert (sink.state.status, sink.sent) == (FINISHED, 4 + 1 + 2)
    assert_names(sink.outcome, 7, str(run_dir / "tensorboard"))
    assert shown(run_dir) == [(step, 1 + step / 8) for step in range(1, 5)]
    assert shown(run_dir, "eval/loss") == [(4, 1.5)]
    assert shown(run_dir, "eval/other/perplexity") == [(4, float("inf"))]
    reader = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (found["train.steps"].number_value, found["model.style"].string_value) == (4, "llama")


def test_a_resume_takes_values_back(run_dir: Path) -> None:
    write(run_dir, *attempt(1, 1, 6, status="stopped", exit_code=75))
    assert deliver(run_dir).state.status == KILLED
    write(run_dir, *attempt(2, 4, 5))
    deliver(run_dir)
    assert shown(run_dir) == [(1, 1.125), (2, 1.25), (3, 1.375), (4, 2.5), (5, 2.625)]
    assert shown(run_dir, "eval/loss") == [(5, 2.5)], "that of step 6 too, though none has its step again"
    # Resumed where it stopped: nothing is taken back.
    write(run_dir, *attempt(3, 6, 7))
    deliver(run_dir)
    assert [step for step, _ in shown(run_dir)] == list(range(1, 8))
    # All of it sent only now.
    for path in (run_dir / "tensorboard").iterdir():
        path.unlink()
    deliver(run_dir)
    assert [value for _, value in shown(run_dir)] == [1.125, 1.25, 1.375, 2.5, 2.625, 3.75, 3.875]


def test_a_rollback_in_a_running_mirror(run_dir: Path) -> None:
    sink = TensorBoardSink(run_dir)
    feed = Feed(sink, run_dir)
    write(run_dir, *attempt(1, 1, 6))
    feed.deliver()
    feed.deliver()
    write(run_dir, {"kind": "event", "event": "rollback", "step": 2, "attempt": 2})
    write(run_dir, *attempt(2, 3, 4)[1:])
    feed.deliver()
    feed.deliver()
    assert shown(run_dir) == [(1, 1.125), (2, 1.25), (3, 2.375), (4, 2.5)]
    files = [path.stat().st_size > 0 for path in sorted((run_dir / "tensorboard").glob("events*"))]
    assert files == [False, True]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_mirror_killed_between_a_write_and_its_note(run_dir: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one cannot know what has arrived, and shows each value once all the same."""
    write(run_dir, *attempt(1, 1, 4))
    deliver(run_dir) if at == 2 else None
    write(run_dir, *attempt(2, 3, 6))

    def killed(sink: TensorBoardSink, rows: object) -> None:
        original(sink, rows)
        raise KeyboardInterrupt

    original = TensorBoardSink.write
    with monkeypatch.context() as patched:
        patched.setattr(TensorBoardSink, "write", killed)
        for _ in range(at):
            with pytest.raises(KeyboardInterrupt):
                deliver(run_dir)
    deliver(run_dir)
    deliver(run_dir)
    expected = [(1, 1.125), (2, 1.25), (3, 2.375), (4, 2.5), (5, 2.625), (6, 2.75)]
    assert (shown(run_dir), shown(run_dir, "eval/loss")) == (expected, [(6, 2.5)])


def test_metrics_that_begin_anew(run_dir: Path) -> None:
    write(run_dir, *attempt(1, 1, 6))
    deliver(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    write(run_dir, *attempt(1, 1, 2))
    deliver(run_dir)
    assert shown(run_dir) == [(1, 1.125), (2, 1.25)]


def test_files_that_were_deleted_are_written_again(run_dir: Path) -> None:
    write(run_dir, *attempt(1, 1, 3))
    deliver(run_dir)
    for path in (run_dir / "tensorboard").glob("events*"):
        path.unlink()
    deliver(run_dir)
    assert len(shown(run_dir)) == 3


def test_damaged_notes_are_named(run_dir: Path) -> None:
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "megalm.json").write_text("{")
    with pytest.raises(ConfigError) as refusal:
        TensorBoardSink(run_dir)
    assert_names(str(refusal.value), str(run_dir / "tensorboard" / "megalm.json"))
