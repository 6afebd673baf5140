"""Configurations that are made, or damaged, to break their reader: one line for each problem, in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_cases import refused

from megalm.config.loading import config_to_yaml, load_run_config
from tests.messages import assert_names

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("data: &d\n  train: *d\n", ["line 1"]),
        ("sample:\n  prompts: &p [*p]\n", ["line 2"]),
        (BOMB, ["line 5", "100,000"]),
        (f"train:\n  steps: {'9' * 400}\n", ["train.steps", 64]),
        (f"train:\n  steps: {'9' * 5000}\n", ["5000"]),
        (f"schedule:\n  peak_learning_rate: 1{'0' * 400}\n", ["schedule.peak_learning_rate", 64]),
        (f"a: {'[' * 5000}{']' * 5000}\n", ["YAML"]),
        (b"train:\n  steps: \xff\xfe\n", ["utf-8"]),
        ('run:\n  name: "a\\0b"\n', ["run.name", "UTF-8"]),
        ("run:\n  name: !!binary aGk=\n", ["run.name"]),
        ("run:\n  name: !!python/object/apply:os.system ['true']\n", ["line 2"]),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, content: str | bytes, names: list[object]) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_names(refused(load_run_config, str(path), []), path, *names)


def test_an_alias_that_is_no_trick_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sample:\n  prompts: &p [one, two]\nevaluate: {}\n")
    assert load_run_config(str(path), []).config.sample.prompts == ("one", "two")


@pytest.mark.parametrize("word", ["run.name=\udcff", "\udcff=1", "data.train=\udcffx"])
def test_a_word_that_is_not_utf_8_is_refused(word: str) -> None:
    assert_names(refused(load_run_config, None, [word]), "UTF-8")


def test_what_is_accepted_can_be_saved() -> None:
    loaded = load_run_config(None, ["run.name=größe", f"train.seed={2**63 - 1}"])
    assert "größe" in config_to_yaml(loaded.config)
