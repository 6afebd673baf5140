"""A sweep as it is written, and the runs that it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.sweeps.expansion import Sweep, read_sweep, split_values
from tests.messages import assert_names

RATE = "schedule.peak_learning_rate"


def values(sweep: Sweep) -> list[tuple[str, ...]]:
    return [tuple(run.values.values()) for run in sweep.runs]


def test_words_make_a_grid_in_which_seeds_change_last() -> None:
    sweep = read_sweep([f"{RATE}=3e-4,1e-3", "train.seed=1,2"], ["data.split=95,5", "train.steps=20"])
    assert values(sweep) == [("0.0003", "1"), ("0.001", "1"), ("0.0003", "2"), ("0.001", "2")]
    assert sweep.name == "peak_learning_rate-seed"
    assert [run.name for run in sweep.runs][:1] == [f"{sweep.name}-peak_learning_rate_0.0003-seed_1"]
    words = sweep.arguments_of(sweep.runs[0])
    assert words[:2] == ["data.split=95,5", "train.steps=20"]
    assert {f"{RATE}=0.0003", "train.seed=1", f"tracking.sweep={sweep.name}", "--resume", "auto"} <= set(words)


def test_a_file_has_lists_that_go_together_and_values_of_all_runs(tmp_path: Path) -> None:
    path = tmp_path / "width.yaml"
    path.write_text(
        "train: {seed: [1, 2], steps: 20}\n"
        "zip:\n  model.hidden_size: [64, 128]\n  model.num_attention_heads: [1, 2]\n"
        "data.split: ['95,5', '90,10']\n"
    )
    sweep = read_sweep([str(path), "data.split=95,5"])  # a word replaces the key of the file
    assert sweep.name == "width"
    assert sweep.axes == {
        "train.seed": ("1", "2"),
        "model.hidden_size": ("64", "128"),
        "model.num_attention_heads": ("1", "2"),
    }
    assert values(sweep) == [("1", "64", "1"), ("1", "128", "2"), ("2", "64", "1"), ("2", "128", "2")]
    assert {"train.steps=20", "data.split=95,5"} == set(sweep.arguments)
    assert len(read_sweep([str(path)]).runs) == 8


def test_the_same_values_are_the_same_run_however_the_sweep_grows() -> None:
    few, more = read_sweep([f"{RATE}=1e-3,3e-3"], name="lr"), read_sweep([f"{RATE}=0.003,0.01,0.001"], name="lr")
    assert {run.name for run in few.runs} < {run.name for run in more.runs}


def test_names_are_folder_names_and_differ(tmp_path: Path) -> None:
    texts = ["a b", "a/b", "b", "é", "ê", "x" * 200, "x" * 201]
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps({"data.tokenizer": texts, "train.seed": [1, 2]}))
    names = [run.name for run in read_sweep([str(path)]).runs]
    assert len(set(names)) == 14
    assert all(len(name) <= 140 and name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in names)
    assert all(name.isascii() for name in names)


def test_keys_of_the_deepspeed_json_get_a_json_of_each_run(tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    base.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.5, "eps": 1e-8}}}))
    words = ["deepspeed.optimizer.params.weight_decay=0,0.1", "deepspeed.optimizer.params.betas=[0.9, 0.95],[0.9,0.99]"]
    sweep = read_sweep(words, ["--deepspeed_config", str(base), f"run.root={tmp_path}"], name="decay")
    first = sweep.runs[0]
    content = sweep.json_content(first)
    assert content is not None
    assert content["optimizer"]["params"] == {"weight_decay": 0, "eps": 1e-8, "betas": [0.9, 0.95]}
    arguments = sweep.arguments_of(first)
    assert arguments[arguments.index("--deepspeed_config") + 1] == str(sweep.json_of(first))
    assert str(base) not in arguments
    assert sweep.json_of(first).parent == tmp_path / "sweeps" / "decay"
    assert not [word for word in arguments if word.startswith("deepspeed.")]
    assert read_sweep(["train.seed=1,2"]).json_content(read_sweep(["train.seed=1,2"]).runs[0]) is None


@pytest.mark.parametrize(
    ("words", "arguments", "names"),
    [
        (["model.lr=1e-3,3e-3", "train.sede=1,2"], [], ["model.lr", "train.sede", RATE]),
        (["train.seed=1,-2", f"{RATE}=a,1e-3"], [], ["train.seed", RATE]),
        (["train.seed=1,1"], [], ["train.seed", "1"]),
        ([f"{RATE}=3e-4,0.0003"], [], [RATE, "0.0003"]),
        (["train.seed=1,,2"], [], ["train.seed"]),
        (["run.name=a,b"], [], ["run.name"]),
        (["train={seed: 1},{seed: 2}"], [], ["train", "train.seed"]),
        (["train.seed=1"], [], ["train.seed"]),
        (["train.seed=1,2"], ["train.seed=3", "--resume", "run.name=x"], ["train.seed", "--resume", "run.name"]),
        (["deepspeed_config=a.json,b.json"], ["--deepspeed_config=c.json"], ["deepspeed_config", "--deepspeed_config"]),
        (["deepspeed.gradient_clipping=1,2"], [], ["deepspeed.gradient_clipping", "--deepspeed_config"]),
        (["train.seed=" + ",".join(map(str, range(1001)))], [], ["1,001", "1,000"]),
        (["no-such-file.yaml"], [], ["no-such-file.yaml"]),
    ],
)
def test_all_that_is_wrong_is_named(words: list[str], arguments: list[str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        read_sweep(words, arguments)
    assert_names(refused.value, *names)


def test_lists_that_go_together_have_one_length(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("zip: {train.seed: [1, 2], train.steps: [10, 20, 30]}")
    with pytest.raises(ConfigError) as refused:
        read_sweep([str(path)])
    assert_names(refused.value, "train.seed", 2, "train.steps", 3)


def test_a_comma_inside_a_value_separates_nothing() -> None:
    assert split_values("[1,2],[3,4]") == ["[1,2]", "[3,4]"]
    assert split_values("{a: b, c: d},x") == ["{a: b, c: d}", "x"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    assert split_values("it's,b") == ["it's", "b"]
