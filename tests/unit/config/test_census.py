"""DeepSpeed JSONs of other people: what is taken as it is, what is answered, and what `config convert` makes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from census_shapes import SHAPES, Shape
from config_cases import GPU, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.deepspeed.json_reader import open_deepspeed_json
from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.config.deepspeed.scheduler import SchedulerTranslation
from megalm.config.deepspeed.translate import OLDER, RUN_SETTINGS, translate
from megalm.config.deepspeed.unsupported_keys import UNSUPPORTED, unknown_key
from megalm.config.loading import load_run_config
from megalm.config.validation import leaf_fields
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.runs.run_settings import read_settings
from tests.messages import assert_names

ACCEPTED = {name: shape for name, shape in SHAPES.items() if not shape.refused}


def resolved(shape: Shape, folder: Path, content: Mapping[str, Any] | None = None) -> ResolvedRun:
    path = folder / "theirs.json"
    path.write_text(json.dumps(shape.json if content is None else content))
    return resolve(load_run_config(None, []), open_deepspeed_json(path), shape.ranks, GPU)


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_is_taken_or_answered_in_full(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    if shape.refused:
        said = refused(resolved, shape, tmp_path)
        assert_names(said, tmp_path / "theirs.json", *shape.refused)
        return
    run = resolved(shape, tmp_path)
    notes = "\n".join(run.notices)
    assert_names(notes, *shape.noted)
    batch = run.batch
    assert batch.global_batch == shape.json.get("train_batch_size", "auto") or not isinstance(
        shape.json.get("train_batch_size"), int
    )


@pytest.mark.parametrize("name", ACCEPTED)
def test_deepspeed_reads_what_it_is_handed(tmp_path: Path, name: str) -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    handed = resolved(ACCEPTED[name], tmp_path).deepspeed
    handed = {key: value for key, value in handed.items() if key not in ("optimizer", "train_batch_size")}
    parsed = config.DeepSpeedConfig(copy.deepcopy(handed))
    assert int(parsed.zero_optimization_stage) == handed["zero_optimization"]["stage"]
    assert parsed.gradient_clipping == handed["gradient_clipping"]
    assert (parsed.float16_config.enabled, parsed.bfloat16_config.enabled) == (
        handed["fp16"]["enabled"],
        handed["bf16"]["enabled"],
    )


@pytest.mark.parametrize("name", SHAPES)
def test_every_key_has_an_outcome(name: str) -> None:
    """Of the file, as it spells it, or of a section that has one as a whole."""

    def keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in section.items():
            if isinstance(value, dict) and value:
                yield from keys(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    outcomes = {outcome.key for outcome in translate(SHAPES[name].json).outcomes}
    for key in keys(SHAPES[name].json):
        parts = key.split(".")
        assert {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & outcomes, key


def test_all_problems_of_both_files_are_reported_at_once(tmp_path: Path) -> None:
    worst = {key: value for shape in SHAPES.values() for key, value in shape.json.items() if shape.refused}
    (tmp_path / "theirs.json").write_text(json.dumps(worst))
    translation = translate(worst)
    assert len(translation.problems) > 15
    said = refused(resolved, Shape(worst), tmp_path)
    assert len(said.splitlines()) >= len(translation.problems) + 1
    # A rule of the run, of a key that nothing else is wrong with, is told with them.
    loaded = load_run_config(None, ["model.num_attention_heads=3"])
    said = refused(resolve, loaded, open_deepspeed_json(tmp_path / "theirs.json"), 1, GPU)
    assert_names(said, "model.num_attention_heads=3", "curriculum_learning", "gradient_clipping=-1")


def test_a_refused_section_is_one_line() -> None:
    for name in ("lamb", "zero-plus-plus", "model-file", "data-efficiency", "beside-params", "mics"):
        assert len(translate(SHAPES[name].json).problems) == 1, name


def test_no_hint_points_to_what_is_refused() -> None:
    for path in UNSUPPORTED:
        section, _, name = path.rpartition(".")
        misspelled = f"{section}.{name}x".lstrip(".")
        rule = unknown_key(misspelled)
        assert f"'{name}'" not in rule.why
    for rule in UNSUPPORTED.values():
        for key, other in UNSUPPORTED.items():
            assert f"use {key}" not in rule.instead or "YAML" in rule.instead or other.inert


# A key that nobody knows, in each kind of section, and whether DeepSpeed's own classes refuse the file for it.
_UNKNOWN = {
    "unknown_key": False,
    "optimizer.unknown_key": False,
    "data_types.unknown_key": False,
    "aio.unknown_key": False,
    "flops_profiler.unknown_key": False,
    "comms_logger.unknown_key": True,
    "timers.unknown_key": False,
    "timers.throughput.unknown_key": True,
    "fp16.unknown_key": True,
    "bf16.unknown_key": True,
    "zero_optimization.unknown_key": True,
    "zero_optimization.offload_optimizer.unknown_key": True,
    "zero_optimization.offload_param.unknown_key": True,
}


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("path", _UNKNOWN)
def test_what_is_said_of_deepspeed_is_so(path: str) -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    file = {"train_batch_size": 8, **_nested(path, 1)}
    try:
        config.DeepSpeedConfig(copy.deepcopy(file))
        refuses = False
    except Exception:
        refuses = True
    assert refuses == _UNKNOWN[path]
    (problem,) = translate(file).problems
    assert_names(problem, path)
    assert ("ignores" in problem, "refuses" in problem) == (not refuses, refuses)


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_what_the_table_says_of_deepspeed_is_so(path: str) -> None:
    """A key that DeepSpeed is said to have removed makes it refuse the file; an inert one does not, but where said."""
    config = pytest.importorskip("deepspeed.runtime.config")
    rule = UNSUPPORTED[path]
    value: Any = False if rule.no_effect is None else rule.no_effect
    if "has removed" in rule.why or "ignores it" in rule.why:
        file = {"train_batch_size": 8, **_nested(path, value)}
        if "has removed" in rule.why:
            with pytest.raises(config.DeepSpeedConfigError):
                config.DeepSpeedConfig(file)
        else:
            config.DeepSpeedConfig(file)


@pytest.mark.parametrize("value", ["3", "1.0", " 2 ", "true", "off", "Y", "5e8", "1.5", "x", "", 0, 1, 2, True, 1.0])
@pytest.mark.parametrize(
    "name", ["stage", "overlap_comm", "reduce_bucket_size", "prefetch_bucket_size", "sub_group_size", "loss_scale"]
)
def test_a_value_is_read_as_deepspeed_reads_it(name: str, value: object) -> None:
    """Or refused, where DeepSpeed refuses it: only true and false for a number are refused here alone."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    fp16 = pytest.importorskip("deepspeed.runtime.precision_config").DeepSpeedFP16Config
    section, model = ("fp16", fp16) if name == "loss_scale" else ("zero_optimization", zero)
    translation = translate({section: {name: value}})
    try:
        theirs = getattr(model(**{name: value}), name)
    except Exception:
        theirs = None
    if theirs is None or (isinstance(value, bool) and name != "overlap_comm"):
        assert translation.problems
    else:
        assert translation.problems == ()
        assert getattr(getattr(translation.settings, section), name) == theirs


def test_a_persons_batch_and_the_jsons(tmp_path: Path) -> None:
    def total(content: dict[str, Any], *words: str, ranks: int = 2) -> int:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(content))
        return resolve(load_run_config(None, words), open_deepspeed_json(path), ranks, GPU).batch.global_batch

    mine = "batch.global_sequences=24"
    assert total({}) == total({"train_batch_size": "auto"}) == 16
    assert total({}, mine) == 24
    assert total({"train_batch_size": 8}) == 8
    assert total({"train_batch_size": 24}, mine) == 24
    said = refused(total, {"train_batch_size": 8}, mine)
    assert_names(said, "train_batch_size=8", mine, "command line", tmp_path / "ds.json")
    assert total({"train_micro_batch_size_per_gpu": 3}) == 6
    assert total({"train_micro_batch_size_per_gpu": 3}, mine) == 24
    assert total({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4}) == 16
    assert total({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 32}) == 64
    assert (
        total({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}) == 8
    )


KEYS = sorted(
    {*leaf_fields(DeepSpeedSettings), *UNSUPPORTED, *OLDER, *RUN_SETTINGS, "zero_optimization", "fp16", "x.y"}
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.sampled_from(["auto", "", "1", "-1", "on"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["enabled", "type", "params", "é"]), inner, max_size=2)
    ),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_whatever_a_file_holds_is_answered_in_lines(content: dict[str, Any]) -> None:
    raw: dict[str, Any] = {}
    for path, value in content.items():
        place: Any = raw
        *sections, name = path.split(".")
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[name] = value
    translation = translate(raw)
    for line in (*translation.problems, *translation.notices):
        assert line
        assert len(line.splitlines()) == 1
    assert translate(translation.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)).problems == ()


def test_one_start_tells_what_is_wrong_with_all_files(tmp_path: Path) -> None:
    """Keys, values and rules of the YAML, the command line and the JSON; each file is read to its end."""
    mine, theirs = tmp_path / "mine.yaml", tmp_path / "theirs.json"
    mine.write_text("preset: quickstart\ntrain: {steps: many, stepz: 3}\nmodel: {num_attention_heads: 3}\n")
    theirs.write_text('{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_cliping": 1, "seed": 1}')
    said = refused(read_settings, str(mine), ("schedule.kindd=wsd", "train"), str(theirs), resume=False, ranks=1)
    assert len(said.splitlines()) == 1 + 8
    assert_names(said, mine, 'train.steps="many"', "train.stepz", "schedule.kindd", "'train'", theirs)
    assert_names(said, "gradient_cliping=1", "seed=1", "train_batch_size=7", "model.num_attention_heads=3")
    # What follows from a refused value is not told: the default of train.steps is nobody's.
    said = refused(
        read_settings, None, ("train.steps=x", "schedule.warmup_steps=900"), str(theirs), resume=False, ranks=1
    )
    assert "schedule.warmup_steps" not in said or "900" in said
    # A file that cannot be parsed does not hide the other.
    theirs.write_text('{"train_batch_size" 7}')
    said = refused(read_settings, str(mine), (), str(theirs), resume=False, ranks=1)
    assert_names(said, "line 1", "column 21", "train.stepz")
    mine.write_text("train: {steps: 3")
    theirs.write_text('{"seed": 1}')
    assert_names(refused(read_settings, str(mine), (), str(theirs), resume=False, ranks=1), "line 1", "seed=1")


def test_a_runs_own_json_gives_way_to_a_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scheduler implies is refused beside a person's other value, but not where it is a saved one."""
    implied = SchedulerTranslation({"schedule.kind": "linear", "schedule.warmup_steps": 7})
    monkeypatch.setitem(RUN_SETTINGS, "scheduler", lambda _: implied)
    theirs = tmp_path / "theirs.json"
    theirs.write_text('{"train_batch_size": 16, "scheduler": {"type": "Linear", "params": {"n": 7}}}')
    started = resolve(load_run_config(None, []), open_deepspeed_json(theirs), 1, GPU)
    assert (started.config.schedule.kind, started.schedule.warmup_steps) == ("linear", 7)
    assert started.sources["schedule.kind"] == str(theirs)
    mine = load_run_config(None, ["schedule.kind=wsd", "schedule.warmup_steps=7"])
    said = refused(resolve, mine, open_deepspeed_json(theirs), 1, GPU)
    assert_names(said, "schedule.kind", '"wsd"', '"linear"', "command line", theirs)
    assert "warmup_steps" not in said
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(started.config_yaml)
    (folder / "deepspeed.json").write_bytes(theirs.read_bytes())

    def resumed(*words: str, json_file: str | None = None) -> ResolvedRun:
        words = (f"run.root={tmp_path}", "run.name=mine", *words)
        files = read_settings(None, words, json_file, resume=True, ranks=1)
        return resolve(files.loaded, files.deepspeed, 1, GPU)

    assert resumed().schedule == resumed(json_file=str(theirs)).schedule == started.schedule
    assert resumed("schedule.kind=wsd").schedule.kind == "wsd"
    assert_names(refused(resumed, "schedule.kind=wsd", json_file=str(theirs)), "schedule.kind", theirs)


def test_a_shipped_json_goes_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("zero3.json", "ds_configs/zero3.json", "h100.json"):
        settings = read_settings("quickstart", (), name, resume=False, ranks=1)
        assert Path(settings.deepspeed.path).is_file()
        assert Path(settings.deepspeed.path).name == Path(name).name
    (tmp_path / "zero3.json").write_text('{"train_batch_size": 3}')
    for name in ("zero3.json", "~/zero3.json"):
        assert read_settings("quickstart", (), name, resume=False, ranks=1).deepspeed.settings.train_batch_size == 3
    assert_names(refused(read_settings, None, (), "zero_3.json", resume=False, ranks=1), "zero_3.json", "'zero3.json'")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{ // a comment\n "train_batch_size": 8, # another\n /* and */ "bf16": {"enabled": true,},\n}', None),
        ('{"train_batch_size": 8, "bf16": tue}', ["line 1", "column 33"]),
        ('{"train_batch_size": 8 "bf16": {}}', ["line 1"]),
        ('{ // c\n"train_batch_size": 8, "train_batch_size": 9}', ["'train_batch_size'"]),
        ('{"a": ' * 100_000, []),
        ('{"gradient_clipping": 1e999, // c\n}', []),
        ("", ["{}"]),
    ],
)
def test_files_are_parsed_as_deepspeed_parses_them(tmp_path: Path, text: str, names: list[object] | None) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    if names is None:
        settings = open_deepspeed_json(path).settings
        assert (settings.train_batch_size, settings.bf16.enabled) == (8, True)
    else:
        assert_names(refused(open_deepspeed_json, path), path, *names)
