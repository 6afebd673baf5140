"""What follows from a checkpoint's manifest and from the settings of the run that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.manifest import DataSegment, Manifest
from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.config.schema import BlendPart, DataStage
from megalm.errors import CheckpointError, ConfigError
from megalm.planning.lr_schedule import ScheduleSegment, rate_at
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.runs.run_folder import RunFolder
from megalm.runs.run_settings import config_changes
from megalm.train.resume.compatibility import (
    change_notes,
    continuation_kind,
    first_sample_of,
    incompatibilities,
    lengths_of_order,
    progress_from,
    refuse_incompatible,
    refuse_other_moments,
    with_last_step,
    with_schedule,
)
from megalm.train.resume.training_progress import RunSchedule
from tests.messages import assert_names

ROOT = Path(__file__).resolve().parents[3]


def run(*overrides: str) -> ResolvedRun:
    source = read_deepspeed_json(str(ROOT / "ds_configs" / "fp32.json"))
    loaded = load_run_config(None, ["schedule.warmup_steps=2", *overrides])
    return resolve(loaded, source, 1, DeviceFacts("cpu", False, 1 << 33), 100)


def manifest(step: int, *segments: DataSegment, **more: Any) -> Manifest:
    """Of a run of 10 steps with the defaults."""
    of = run("train.steps=10")
    stated = {
        "step": step,
        "tokens": 0,
        "best_validation_loss": 2.5,
        "stale_evaluations": 1,
        "data_position": {"segments": [segment.model_dump() for segment in segments]},
        "schedule": with_schedule(of, None).as_json(),
        "files": {},
        "tensors": {},
    }
    return Manifest.from_json({**stated, **more})


def segment(length: int, batch: int, first: int, consumed: int, skipped: int = 0, begins: str = "anew") -> DataSegment:
    return DataSegment(
        order="order",
        sequence_length=length,
        global_batch=batch,
        first_sample=first,
        samples_consumed=consumed,
        samples_skipped=skipped,
        begins=begins,  # type: ignore[arg-type]
    )


def scheduled(then: Manifest, now: ResolvedRun, more: int | None = None) -> RunSchedule:
    return with_schedule(now, then, more)


def test_the_same_schedule_stays_in_force() -> None:
    then = manifest(4, segment(256, 16, 0, 64))
    schedule = scheduled(then, run("train.steps=10"))
    assert [part.first_step for part in schedule.segments] == [1]
    assert with_last_step(run("train.steps=10"), schedule).config.train.steps == 10


def test_another_schedule_holds_from_the_next_step_on() -> None:
    then = manifest(4, segment(256, 16, 0, 64))
    now = run("train.steps=20", "schedule.kind=constant", "schedule.peak_learning_rate=1e-5")
    schedule = scheduled(then, now)
    assert [(part.first_step, part.offset_steps) for part in schedule.segments] == [(1, 0), (5, 0)]
    old = scheduled(then, run("train.steps=10"))
    assert [rate_at(schedule.segments, step) for step in range(1, 5)] == [
        rate_at(old.segments, step) for step in range(1, 5)
    ], "the rate of every past step can still be told"
    assert {rate_at(schedule.segments, step) for step in range(5, 21)} == {1e-5}


def test_an_extension_starts_where_the_rate_was() -> None:
    then = manifest(10, segment(256, 16, 0, 160))
    schedule = scheduled(then, run("train.steps=10"), more=100)
    before, after = rate_at(schedule.segments, 10), rate_at(schedule.segments, 11)
    assert after == pytest.approx(before, rel=1e-3)
    assert after < before
    assert rate_at(schedule.segments, 110) == pytest.approx(before / 10)
    assert with_last_step(run("train.steps=10"), schedule).config.train.steps == 110
    # The words of the first start, said again, are no wish for another schedule.
    assert scheduled(then.amended(schedule=schedule.as_json()), run("train.steps=10")).segments == schedule.segments
    said = scheduled(then, run("train.steps=10", "schedule.kind=linear", "schedule.final_learning_rate=0"), more=100)
    assert (said.segments[-1].schedule.kind, rate_at(said.segments, 110)) == ("linear", 0.0)


def test_an_imported_checkpoint_takes_the_runs_own_schedule() -> None:
    then = manifest(4, segment(256, 16, 0, 64)).amended(schedule={}, data_position={})
    now = run("train.steps=20")
    schedule = scheduled(then, now)
    assert schedule.segments == scheduled(then.amended(step=9), now).segments == with_schedule(now, None).segments
    longer = scheduled(then, now, more=6)
    assert [(part.first_step, part.last_step) for part in longer.segments][-1] == (5, 10)
    assert rate_at(longer.segments, 5) < rate_at(schedule.segments, 4)
    assert first_sample_of(then, now)(5) == 0
    assert first_sample_of(then, now)(7) == 2 * now.stages.at(5).samples


def test_segments_survive_a_manifest() -> None:
    schedule = scheduled(manifest(10, segment(256, 16, 0, 160)), run("train.steps=10"), more=7)
    stored = manifest(10, schedule=schedule.as_json()).schedule.segments
    assert tuple(ScheduleSegment.of(part) for part in stored) == schedule.segments


def test_newer_settings_of_a_schedule_are_stored_only_where_they_are_used() -> None:
    """Manifests of schedules without them are those of earlier versions, key for key, and resume both ways."""
    plain = with_schedule(run("train.steps=10"), None).as_json()
    old = {"kind", "peak_learning_rate", "final_learning_rate", "warmup_steps", "decay_steps", "steps"}
    assert set(plain["stated"][0]) == old
    assert set(plain["segments"][0]) == old | {"first_step", "offset_steps"}
    words = ("train.steps=10", "schedule.warmup_kind=log", "schedule.initial_ratio=0.25", "schedule.decay_end_step=9")
    now = run(*words, "schedule.step_convention=deepspeed")
    then = manifest(4, segment(256, 16, 0, 64), schedule=with_schedule(now, None).as_json())
    kept = scheduled(then, now)
    assert len(kept.segments) == 1, "the same schedule"
    assert kept.segments[0].schedule == now.schedule
    assert len(scheduled(then, run(*words)).segments) == 2, "another one"
    assert len(scheduled(then, run("train.steps=10")).segments) == 2


def test_an_extension_takes_newer_settings_from_the_command_line() -> None:
    then = manifest(10, segment(256, 16, 0, 160))
    words = ("schedule.final_ratio=0.5", "schedule.warmup_kind=log", "schedule.decay_end_step=40")
    facts = scheduled(then, run("train.steps=10", *words), more=50).segments[-1].schedule
    assert (facts.warmup_kind, facts.decay_end_step, facts.kind) == ("log", 40, "cosine")
    assert facts.final_learning_rate == run(*words).schedule.final_learning_rate
    plain = scheduled(then, run("train.steps=10"), more=50).segments[-1].schedule
    assert (plain.warmup_kind, plain.initial_learning_rate, plain.warmup_steps) == ("linear", 0.0, 0)


def test_the_position_of_an_unchanged_run() -> None:
    then = manifest(4, segment(256, 16, 0, 64), rollbacks=2)
    position = progress_from(then, run(), "on")
    assert (position.step, position.samples, position.first_sample, position.data_history) == (4, 64, 0, ())
    assert (position.best_loss, position.stale_evaluations, position.rollbacks) == (2.5, 1, 2)


def test_skipped_samples_are_passed_over_and_stay_noted() -> None:
    skipped = segment(256, 16, 0, 64, skipped=32)
    position = progress_from(manifest(4, skipped), run(), "on")
    assert (position.samples, position.first_sample, position.data_history) == (96, 96, (skipped,))
    position.samples += 16
    assert position.segment("order") == segment(256, 16, 96, 16, begins="on")


def test_another_batch_is_another_stretch_of_the_same_order() -> None:
    position = progress_from(manifest(4, segment(256, 8, 0, 32)), run(), "on")
    assert (position.samples, position.first_sample, position.continuation) == (32, 32, "on")


def test_another_length_cuts_what_is_left() -> None:
    then = manifest(4, segment(512, 16, 0, 64))
    now = run()
    assert continuation_kind(now, then, {}) == "recut"
    position = progress_from(then, now, "recut")
    assert (position.samples, position.continuation, len(position.data_history)) == (0, "recut", 1)
    stage = DataStage(from_step=9, blend=(BlendPart(prefix="one", weight=1),))
    staged = now.config.data.model_copy(update={"stages": (stage,)})
    with pytest.raises(ConfigError) as refused:
        continuation_kind(replace(now, config=now.config.model_copy(update={"data": staged})), then, {})
    assert_names(refused.value, "data.sequence_length", 512, "data.stages", "resume.allow=[order]")


def test_how_an_order_came_about() -> None:
    then = manifest(
        30,
        segment(512, 16, 0, 64),
        segment(256, 16, 0, 32, begins="anew"),
        segment(256, 32, 32, 64, skipped=8, begins="on"),
        segment(128, 32, 0, 32, begins="recut"),
        segment(128, 16, 32, 16, begins="on"),
    )
    assert lengths_of_order(then) == [(256, 104), (128, 48)]


def test_stages_of_a_mixture_follow_the_batches_that_were_and_will_be() -> None:
    fresh = first_sample_of(None, run())
    assert [fresh(step) for step in (1, 2, 11)] == [0, 16, 160]
    # Four steps of 8, two of 32 after a skip, and 16 from step 7 on.
    then = manifest(6, segment(256, 8, 0, 32, skipped=40), segment(256, 32, 72, 64, begins="on"))
    first = first_sample_of(then, run())
    assert [first(step) for step in (1, 4, 5, 6, 7, 9)] == [0, 24, 32, 64, 96, 128]


def test_a_batch_that_grows_goes_on_at_each_side_of_a_boundary() -> None:
    grows = run("schedule.batch=[{from_step: 4, sequences: 32}]")
    before = progress_from(manifest(2, segment(256, 16, 0, 32)), grows, "on")
    assert (before.samples, before.first_sample, before.stage.sequences) == (32, 0, 16)
    at = progress_from(manifest(3, segment(256, 16, 0, 48)), grows, "on")
    assert (at.samples, at.first_sample, at.stage.sequences, len(at.data_history)) == (48, 48, 32, 1)
    both = (segment(256, 16, 0, 48), segment(256, 32, 48, 32, begins="on"))
    after = progress_from(manifest(4, *both), grows, "on")
    assert (after.samples, after.first_sample, after.data_history, after.continuation) == (80, 48, both[:1], "on")
    for then in (manifest(2, segment(256, 16, 0, 32)), manifest(3, segment(256, 16, 0, 48)), manifest(4, *both)):
        first = first_sample_of(then, grows)
        assert [first(step) for step in (1, 3, 4, 5, 6)] == [0, 32, 48, 80, 112]
        assert not [*change_notes(progress_from(then, grows, "on"), then, grows)]
    other = run("schedule.batch=[{from_step: 3, sequences: 8}]")
    (note,) = change_notes(progress_from(manifest(4, *both), other, "on"), manifest(4, *both), other)
    assert_names(note, 32, 8)


def test_a_sequence_length_that_grows_keeps_the_order() -> None:
    """Samples are of the longest length, whatever a step cuts them into."""
    words = ("data.sequence_length=64", "data.stages=[{from_step: 4, sequence_length: 256}]")
    grows = run(*words, "schedule.batch=[{from_step: 6, sequences: 8}]")
    then = manifest(3, segment(256, 4, 0, 12))
    assert continuation_kind(grows, then, {}) == "on"
    position = progress_from(then, grows, "on")
    assert (position.samples, position.first_sample, position.stage.sequence_length) == (12, 12, 256)
    assert position.segment("order") == segment(256, 16, 12, 0, begins="on")
    first = first_sample_of(then, grows)
    assert [first(step) for step in (1, 3, 4, 5, 6, 7)] == [0, 8, 12, 28, 44, 52]
    assert not [*change_notes(position, then, grows)]
    assert continuation_kind(run("data.sequence_length=64"), then, {}) == "recut"


def test_stages_of_an_order_that_began_late() -> None:
    first = first_sample_of(manifest(6, segment(256, 16, 0, 64), segment(256, 16, 0, 32)), run())
    assert [first(step) for step in (1, 4, 5, 6, 7, 9)] == [0, 0, 0, 16, 32, 64]


THEN = {
    "model": {"style": "llama", "hidden_size": 64, "max_position_embeddings": 256},
    "data": {"data.sequence_length": 256, "train.seed": 1, "data.split": "95,5"},
    "fingerprints": {"order": "then", "dataset": "b", "tokenizer": "c"},
}
STORED = Manifest.from_json({**THEN, "step": 4, "files": {}, "tensors": {}})


def changed(section: str, **values: Any) -> dict[str, Any]:
    return {**THEN, section: {**THEN[section], **values}}


def test_differences_are_named_by_what_they_are() -> None:
    assert incompatibilities(STORED, THEN) == {}
    assert incompatibilities(STORED, changed("model", max_position_embeddings=512)) == {}, (
        "rotary positions have no table"
    )
    assert incompatibilities(STORED, changed("data", **{"data.sequence_length": 128})) == {}
    for now, thing, names in (
        (changed("model", hidden_size=32), "model", ("hidden_size", 64, 32)),
        (changed("data", **{"data.split": "90,10"}), "dataset", ("data.split", "95,5", "90,10")),
        (changed("data", **{"train.seed": 2}), "order", ("train.seed", 1, 2)),
        (changed("fingerprints", order="0123456789abcdef"), "order", ("order", "then", "0123456789ab")),
        # The order's fingerprint changes with the dataset: said once.
        (changed("fingerprints", order="x", dataset="y"), "dataset", ("dataset", "b", "y")),
    ):
        ((found, (words,)),) = incompatibilities(STORED, now).items()
        assert found == thing
        assert_names(words, *names)


def test_a_refusal_names_all_and_how_to_allow_it(tmp_path: Path) -> None:
    shapes = incompatibilities(STORED, changed("model", hidden_size=32))
    with pytest.raises(CheckpointError) as refused:
        refuse_incompatible(tmp_path, shapes, ())
    assert_names(refused.value, tmp_path, "hidden_size", 64, 32)
    assert "resume.allow=" not in str(refused.value), "the shapes of a model never change"
    found = {**incompatibilities(STORED, changed("data", **{"train.seed": 2})), "model": ["style llama gpt2"]}
    refuse_incompatible(tmp_path, found, ["model", "order"])
    with pytest.raises(CheckpointError) as refused:
        refuse_incompatible(tmp_path, found, ["model"])
    assert_names(refused.value, tmp_path, "order", "train.seed", 1, 2, "resume.allow=[model,order]")
    assert "style" not in str(refused.value), "what is allowed"


@pytest.mark.parametrize(("name", "value"), [("mup_base_width", 16), ("norm_zero_centered", True)])
def test_another_meaning_of_the_weights_is_always_refused(tmp_path: Path, name: str, value: object) -> None:
    """No shape would show that logits, scores and rates, or gains, are others."""
    found = incompatibilities(STORED, changed("model", **{name: value}))
    for allowed in ((), ("model",)):
        with pytest.raises(CheckpointError) as refused:
            refuse_incompatible(tmp_path, found, allowed)
        assert_names(refused.value, tmp_path, name, value)
        assert "resume.allow=" not in str(refused.value)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Its moments would be zeros."""

    def then(*kinds: str) -> Manifest:
        name, stored = "layers.0.mlp.up.weight", {"file": "rank-0.safetensors", "start": 0, "stop": 6}
        tensors = {name: {"shape": [2, 3], "fragments": [{**stored, "kind": kind} for kind in kinds]}}
        files = {"rank-0.safetensors": {"bytes": 1000, "sha256": "0" * 64}}
        return manifest(4, segment(256, 16, 0, 64), tensors=tensors, files=files)

    refuse_other_moments(tmp_path, then("master", "exp_avg", "exp_avg_sq"), run())
    refuse_other_moments(tmp_path, then("master", "exp_avg", "exp_avg_sq", "ema"), run())
    with pytest.raises(CheckpointError) as refused:
        refuse_other_moments(tmp_path, then("master", "momentum_buffer"), run())
    assert_names(refused.value, tmp_path, "layers.0.mlp.up.weight", "momentum_buffer", "exp_avg", "exp_avg_sq")
    assert_names(refused.value, "--extend-strategy")


def test_each_changed_setting_is_noted_with_both_values(tmp_path: Path) -> None:
    """Named validation sets are one setting, whatever their names."""
    web, first, second = (str(tmp_path / name) for name in ("web", "a", "b"))
    for prefix in (web, first, second):
        Path(f"{prefix}.bin").touch()
        Path(f"{prefix}.idx").touch()
    data = ["data.tokenizer=bytes", f"data.train={web}"]
    recorded = [*data, f'data.validation={{"held-out": "{first}"}}', "train.steps=5"]
    now = [*data, f'data.validation={{"books": "{second}"}}', "train.steps=9"]
    changes = config_changes(RunFolder(tmp_path), run(*now), run(*recorded).config)
    assert len(changes) == 2
    assert_names(changes[0], RunFolder(tmp_path).config_yaml)
    assert_names(changes[1], "data.validation", "held-out", "books")
