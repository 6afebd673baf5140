from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from config_cases import refused

from megalm.cli.options import expand_home
from megalm.config import loading
from megalm.config.loading import (
    COMMAND_LINE,
    SAVED_CONFIG,
    ConfigLayers,
    config_to_yaml,
    external_name,
    load_run_config,
)
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields
from tests.messages import assert_names


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_layers_from_the_weakest_to_the_strongest(tmp_path: Path) -> None:
    mine = write(tmp_path / "my.yaml", "preset: quickstart\ntrain:\n  steps: 7\n  seed: 8\n")
    loaded = load_run_config(mine, ["train.seed=9"])
    assert loaded.preset == "quickstart"
    assert (loaded.config.train.steps, loaded.config.train.seed) == (7, 9)
    assert loaded.sources["train.seed"] == "command line"
    assert loaded.sources["train.steps"] == mine
    assert loaded.sources["data.recipe"] == "preset quickstart"
    assert loaded.sources["model.rope_theta"] == "default"
    assert loaded.explicit_keys == {"preset", "train.steps", "train.seed"}


def test_every_key_has_a_source() -> None:
    assert set(load_run_config(None, []).sources) == set(leaf_fields(RunConfig))


def test_without_a_config_it_is_quickstart() -> None:
    assert load_run_config(None, []) == load_run_config("quickstart", [])
    assert load_run_config(None, []).config.preset == "quickstart"


def test_a_yaml_without_a_preset_starts_from_the_defaults(tmp_path: Path) -> None:
    loaded = load_run_config(write(tmp_path / "a.yaml", "train: {steps: 3}\nmodel:\n"), [])
    assert loaded.preset is None
    assert loaded.config == RunConfig.model_validate({"train": {"steps": 3}})


def test_resolved_yaml_loads_to_the_same_configuration(tmp_path: Path) -> None:
    config = load_run_config(None, ["train.steps=5", "run.name=001", "sample.prompts=['a: b', '# c']"]).config
    assert load_run_config(write(tmp_path / "config.yaml", config_to_yaml(config)), []).config == config


@pytest.mark.parametrize("name", loading.preset_paths())
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    loaded = load_run_config(name, [])
    assert loaded.preset == loaded.config.preset == name
    assert loading.describe_preset(name)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("schedule.peak_learning_rate=1e-3", "schedule", "peak_learning_rate", 1e-3),
        ("train.steps=1e3", "train", "steps", 1000),
        ("train.steps=1_000", "train", "steps", 1000),
        ("run.name=001", "run", "name", "001"),
        ("run.name=1e3", "run", "name", "1e3"),
        ("run.name=yes", "run", "name", "yes"),
        ("run.name=a=b", "run", "name", "a=b"),
        ("run.name=[x", "run", "name", "[x"),
        ("run.name=null", "run", "name", None),
        ("data.split=95,5", "data", "split", "95,5"),
        ("evaluate.interval_steps=null", "evaluate", "interval_steps", None),
        ("sample.prompts=['def ', 'a']", "sample", "prompts", ("def ", "a")),
        ("train={steps: 12}", "train", "steps", 12),
    ],
)
def test_overrides_are_yaml(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_run_config(None, [override]).config, section), key) == value


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.warmup_steps=5", ["train.warmup_steps", "schedule.warmup_steps", "guard.warmup_steps"]),
        ("train_batch_size=5", ["train_batch_size", "--deepspeed_config"]),
        ("zero_optimization.stage=2", ["zero_optimization.stage", "--deepspeed_config"]),
        ("train.train_batchsize=2", ["train.train_batchsize", "train_batch_size", "--deepspeed_config"]),
        ("shedule.kind=wsd", ["shedule.kind", "schedule.kind"]),
        ("model.hiden_size=5", ["model.hiden_size", "model.hidden_size"]),
        ("model.n_embd=5", ["model.n_embd", "model.hidden_size"]),
        ("learning_rate=1", ["learning_rate", "schedule.peak_learning_rate"]),
        ("lr=1", ["lr", "schedule.peak_learning_rate"]),
        ("train.epochs=3", ["train.epochs", "train.steps"]),
        ("tp=2", ["tp", "parallel.tensor"]),
        ("train.batch_size=4", ["train.batch_size", "--deepspeed_config"]),
        ("precision=bf16", ["precision", "--deepspeed_config"]),
        ("train.steps=!!int x", ["train.steps"]),
        ("train.steps=" + "[" * 1000, ["train.steps"]),
        ("train.steps.x=1", ["train.steps.x", "train.steps"]),
        ("train={stepz: 1}", ["train.stepz", "train.steps"]),
        ("xyzzy=1", ["xyzzy", "run", "model", "data"]),
        ("train=3", ["train", "steps"]),
        ("train.steps=many", ['train.steps="many"', 0]),
        ("train.steps='7'", ['train.steps="7"', 0]),
        ("train.steps=true", ["train.steps=true", 0]),
        ("train.steps=7.5", ["train.steps=7.5", 0]),
        ("train.steps=", ["train.steps=null", 0]),
        ("train.seed=-1", ["train.seed=-1", 0]),
        ("model.dropout=1.0", ["model.dropout=1.0", 0, 1]),
        ("schedule.peak_learning_rate=.nan", ["schedule.peak_learning_rate=NaN", 0]),
        ("schedule.peak_learning_rate=.inf", ["schedule.peak_learning_rate=Infinity", 0]),
        ("schedule.kind=cosin", ['schedule.kind="cosin"', '"cosine"', '"linear"']),
        ("evaluate.interval_steps=0", ["evaluate.interval_steps=0", "null"]),
        ("evaluate.tasks_interval_steps=0", ["evaluate.tasks_interval_steps=0", "null"]),
        ("tracking.mlflow=1", ["tracking.mlflow=1", "true", "false"]),
        ("sample.prompts=[a, 1]", ['sample.prompts=["a", 1]']),
        ("steps", ["'steps'", "key=value", "train.steps=1000"]),
        ("--train.steps=5", ["'--train.steps=5'", "key=value"]),
        ("train.steps=[1", ["train.steps", "line 1"]),
        ("preset=quickstart", ["--config quickstart"]),
        (
            "model.rope_scaling={rope_type: yarn, factor: 0.5, atention_factor: 2}",
            ["model.rope_scaling", "factor", "number of at least 1", "unknown key atention_factor"],
        ),
        ("train.parameter_groups=[{match: a}, {match: b, frozn: true}]", ["item 2", "frozn", "frozen"]),
        ("data.stages=[{from_step: 0, sequence_length: 8}]", ["item 1", "from_step", 0]),
        ("schedule.batch=[{from_step: 1}]", ["item 1", "sequences is missing"]),
        ("data.train=[{prefix: a, weight: -1}]", ["item 1", "weight", 0]),
    ],
)
def test_a_bad_override_is_named_in_full(override: str, names: list[object]) -> None:
    message = refused(load_run_config, None, [override])
    assert message.startswith(COMMAND_LINE)
    assert_names(message, *names)


def test_a_key_twice_on_the_command_line() -> None:
    twice = ["train.steps=5", "train.steps=6"]
    assert_names(refused(load_run_config, None, twice), COMMAND_LINE, "train.steps", 5, 6)
    assert load_run_config(None, ["train.steps=5", "train.steps=5"]).config.train.steps == 5


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", ["line 3", "'steps'", "line 2"]),
        ("train:\n  steps: [1\n", ["line 3"]),
        ("train:\n\tsteps: 1\n", ["line 2"]),
        ("train:\n  stepz: 1\n", ["train.stepz", "train.steps"]),
        ("run:\n  name: 2024\n", ["run.name=2024", "null"]),
        ("- 1\n", list(RunConfig.model_fields)[:3]),
        ("preset: quikstart\n", ["'quikstart'", "'quickstart'"]),
        ("preset: 3\n", ["preset=3", "null"]),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path: Path, text: str, names: list[str]) -> None:
    path = write(tmp_path / "my.yaml", text)
    message = refused(load_run_config, path, [])
    assert message.startswith(path)
    assert_names(message, *names)


def test_numbers_of_a_yaml_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "schedule: {peak_learning_rate: 3e-4}\ntrain: {steps: 010}\n")
    config = load_run_config(path, []).config
    assert config.schedule.peak_learning_rate == 3e-4
    assert config.train.steps == 10


@pytest.mark.parametrize(
    "name", ["1e3", "010", "1_0", ".5", "0x10", "0o17", "no", "12:30", "2024-01-01", "null", "=", "a: b"]
)
def test_text_that_looks_like_something_else_stays_text_in_what_a_run_saves(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "config.yaml", config_to_yaml(load_run_config(None, [f"data.tokenizer='{name}'"]).config))
    assert load_run_config(path, []).config.data.tokenizer == name


def test_a_missing_file_lists_the_presets() -> None:
    assert_names(refused(load_run_config, "quickstrat", []), "quickstrat", *loading.preset_paths())
    assert_names(refused(load_run_config, "no/such.yaml", []), "no/such.yaml")


def test_a_preset_may_start_from_another_but_not_from_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PRESETS_FOLDER", tmp_path)
    write(tmp_path / "base.yaml", "# base\ntrain: {steps: 3, seed: 4}\n")
    write(tmp_path / "child.yaml", "preset: base\ntrain: {steps: 5}\n")
    write(tmp_path / "loop.yaml", "preset: pool\n")
    write(tmp_path / "pool.yaml", "preset: loop\n")
    loaded = load_run_config("child", [])
    assert (loaded.config.preset, loaded.config.train.steps, loaded.config.train.seed) == ("child", 5, 4)
    assert loaded.sources["train.seed"] == "preset base"
    assert loaded.explicit_keys == frozenset()
    assert_names(refused(load_run_config, "loop", []), "preset", "loop", "pool")


def test_what_replaces_a_presets_choice_is_not_in_its_way(tmp_path: Path) -> None:
    loaded = load_run_config(None, ["data.train=x", "data.validation=y"])
    assert (loaded.config.data.recipe, loaded.config.data.split) == (None, None)
    assert loaded.sources["data.recipe"] == "default"
    both = load_run_config(None, ["data.validation=y", "data.split=9,1"]).config.data
    assert (both.validation, both.split) == ("y", "9,1")  # a person's contradiction stays for the checks


def test_the_emitted_yaml_is_plain(tmp_path: Path) -> None:
    text = config_to_yaml(load_run_config(None, []).config)
    assert yaml.safe_load(text)["train"]["steps"] == 400


def test_a_key_that_is_a_word_of_python(tmp_path: Path) -> None:
    """`checkpoint.async` is read in every form, and written back under its own name."""
    (tmp_path / "mine.yaml").write_text("preset: quickstart\ncheckpoint:\n  async: true\n")
    for loaded in (
        load_run_config(None, ["checkpoint.async=true"]),
        load_run_config(None, ["checkpoint={async: true}"]),
        load_run_config(str(tmp_path / "mine.yaml"), []),
    ):
        assert loaded.config.checkpoint.asynchronous
        assert "async: true" in config_to_yaml(loaded.config)
    assert external_name("checkpoint.asynchronous") == "checkpoint.async"
    assert external_name("checkpoint.best") == "checkpoint.best"


def test_a_saved_configuration_with_a_former_key(tmp_path: Path) -> None:
    for value, steps in (("null", None), ("7", 7)):
        own = tmp_path / f"{value}.yaml"
        write(own, f"train:\n  profile_step: {value}\n  steps: 9\n")
        config = ConfigLayers(None, []).resumed_run(own).checked().config
        assert (config.profile.steps, config.train.steps) == (steps, 9)


def test_a_resumed_run_keeps_values_that_are_not_given(tmp_path: Path) -> None:
    """Schema < preset < the run's own < YAML < key=value."""
    first = load_run_config(None, ["train.seed=9", "train.steps=30", "run.name=mine", "resume.allow=[order]"])
    own = tmp_path / "config.yaml"
    own.write_text(config_to_yaml(first.config))
    mine = write(tmp_path / "mine.yaml", "train: {log_interval_steps: 7, steps: 40}\n")
    loaded = ConfigLayers(mine, ["train.steps=50"]).resumed_run(own)
    assert (loaded.config.train.seed, loaded.sources["train.seed"]) == (9, SAVED_CONFIG)
    assert (loaded.config.train.log_interval_steps, loaded.config.train.steps) == (7, 50)
    assert loaded.explicit_keys == {"train.log_interval_steps", "train.steps"}
    assert loaded.preset == loaded.config.preset == "quickstart"
    # What one start alone is about is not kept: what may differ, and where the run lies.
    assert (loaded.config.resume.allow, loaded.config.run.name) == ((), None)


def test_each_file_is_read_once(tmp_path: Path) -> None:
    own, mine = tmp_path / "config.yaml", Path(write(tmp_path / "mine.yaml", "train: {steps: 40}\n"))
    own.write_text(config_to_yaml(load_run_config(None, ["train.seed=9", "parallel.tensor=2"]).config))
    given = ConfigLayers(str(mine), [])
    mine.unlink()
    assert given.new_run().config.train.steps == 40
    loaded = given.resumed_run(own, "mine")
    own.write_text("train: {seed: 8}\n")
    assert given.resumed_run(own, "mine") == loaded
    assert (loaded.config.train.seed, loaded.config.train.steps, loaded.config.run.name) == (9, 40, "mine")
    assert (given.saved_config(own).train.seed, given.saved_config(own).parallel.tensor) == (9, 2)


def test_a_run_is_resumed_under_one_name(tmp_path: Path) -> None:
    own = write(tmp_path / "config.yaml", "")
    assert ConfigLayers(None, ["run.name=mine"]).resumed_run(Path(own), "mine").config.run.name == "mine"
    twice = refused(ConfigLayers(None, ["run.name=mine"]).resumed_run, Path(own), "other")
    assert_names(twice, "run.name", '"mine"', '"other"')


def test_a_preset_named_now_counts_if_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PRESETS_FOLDER", tmp_path)
    write(tmp_path / "small.yaml", "model: {hidden_size: 64}\n")
    write(tmp_path / "large.yaml", "model: {hidden_size: 512}\n")
    own = tmp_path / "runs" / "config.yaml"
    own.parent.mkdir()
    own.write_text(config_to_yaml(load_run_config("small", ["model.hidden_size=96", "train.seed=9"]).config))
    assert ConfigLayers("small", []).resumed_run(own).config.model.hidden_size == 96
    other = ConfigLayers("large", []).resumed_run(own)
    assert (other.config.model.hidden_size, other.config.train.seed) == (512, 9)
    assert other.preset == other.config.preset == "large"


def test_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text(
        "run: {root: ~/runs}\n"
        "data:\n"
        "  train: [{prefix: ~/a, weight: 1}]\n"
        "  stages: [{from_step: 5, blend: [{prefix: ~/b, weight: 1}]}]\n"
        "  validation: {web: ~/c}\n"
        "  input: ['~/d', '~/e*']\n"
        "  cache: ~/f\n"
        "  tokenizer: ~/g\n"
    )
    text = str(load_run_config(str(file), ["deepspeed_config=~/h.json"]).config.model_dump())
    for name in ("runs", "a", "b", "c", "d", "e*", "f", "g", "h.json"):
        assert f"'{tmp_path}/{name}'" in text
    assert "~" not in text
    assert load_run_config(None, ["data.train=~/a", "sample.prompts=[~/a]"]).config.sample.prompts == ("~/a",)
    words = ["--text=~/x", "--data", "~/y", "--prompt", "~/z", "--reason=~/z", "key=~/z", "~"]
    expanded = [f"--text={tmp_path}/x", "--data", f"{tmp_path}/y", *words[3:7], str(tmp_path)]
    assert expand_home(words) == expanded
