"""Rules of the data section, by what their messages name, and how blends, stages and sets may be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from config_cases import refused

from megalm.config.loading import config_to_yaml, load_run_config
from megalm.config.schema import BlendPart
from megalm.planning.resolve import ResolvedRun
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
OWN = "data.tokenizer=bytes"


@pytest.fixture
def a(tmp_path: Path) -> str:
    return touched(tmp_path / "a")


@pytest.fixture
def b(tmp_path: Path) -> str:
    return touched(tmp_path / "b")


def touched(prefix: Path) -> str:
    prefix.parent.mkdir(exist_ok=True)
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").touch()
    return str(prefix)


def blend(*prefixes: str) -> str:
    return (
        "[" + ", ".join(f"{{prefix: {prefix}, weight: {number + 1}}}" for number, prefix in enumerate(prefixes)) + "]"
    )


def test_what_each_rule_refuses_and_the_nearest_that_it_lets_pass(start: Start, tmp_path: Path, a: str, b: str) -> None:
    same_name = touched(tmp_path / "other" / "a")
    one, both = f"data.train={a}", f"data.train={blend(a, b)}"
    stage = f"{{from_step: 5, blend: {blend(b)}}}"
    megatron = ["data.order=megatron", "data.order=prefix_stable"]
    for overrides, names in (
        (["data.rebuild=auto"], ["data.rebuild", "data.train"]),
        (["data.append_eod=false"], ["data.append_eod", "data.train"]),
        (["data.input=raw"], ["data.input", "data.train"]),
        ([f"data.stages=[{stage}]"], ["data.stages", "data.train"]),
        ([OWN, "data.train=[]"], ["data.train", "{prefix, weight}"]),
        ([OWN, both, "data.stages=[{from_step: 3, blend: []}]"], ["data.stages", "from_step", 3, "{prefix, weight}"]),
        ([OWN, f"data.train={blend(a, a)}"], ["data.train", a]),
        ([OWN, both], None),
        ([OWN, one, f"data.stages=[{stage}, {stage}]"], ["data.stages", "from_step=5", 5]),
        (
            [OWN, one, f"data.stages=[{{from_step: 1, blend: {blend(b)}}}]"],
            ["data.stages", "from_step=1", "data.train"],
        ),
        ([OWN, one, f"data.stages=[{stage}]"], None),
        ([OWN, one, "data.stride=257"], ["data.stride=257", "data.sequence_length=256"]),
        ([OWN, one, "data.stride=256", "data.order=megatron"], None),
        ([OWN, one, "data.stride=255", "data.order=megatron"], [*megatron, "data.stride=255"]),
        ([OWN, one, "data.packing=best_fit", "data.order=megatron"], [*megatron, "data.packing=best_fit"]),
        ([OWN, one, "data.packing=best_fit", "data.stride=255"], ["data.packing=best_fit", "data.stride=255"]),
        ([OWN, one, "data.packing=best_fit", "data.stride=256"], None),
        ([OWN, one, "data.packing=best_fill"], ["data.packing", "best_fit"]),
        ([OWN, both, "data.order=megatron"], megatron),
        ([OWN, one, f"data.stages=[{stage}]", "data.order=megatron"], megatron),
        ([OWN, both, "data.input=raw"], ["data.input", "data.train", ".json"]),
        ([OWN, one, "data.input=raw"], None),
        ([OWN, one, "data.validation={}"], ["data.validation", "NAME: PREFIX"]),
        ([OWN, one, f"data.validation={{a/b: {b}}}"], ["data.validation", "'a/b'"]),
        ([OWN, one, f"data.validation={{validation: {b}}}"], ["data.validation", "'validation'"]),
        ([OWN, one, f"data.validation={{b: {b}}}"], None),
        ([OWN, one, f"data.validation={{b: {b}}}", "data.split=9,1"], ["data.validation={...}", "data.split=9,1"]),
        ([OWN, one, f"data.validation={{b: {tmp_path}/no}}"], [f"data.validation={tmp_path}/no", f"{tmp_path}/no.bin"]),
        ([OWN, f"data.train={blend(a, same_name)}", "data.split=9,1"], ["data.split=9,1", "a", "data.validation"]),
        ([OWN, f"data.train={blend(a, same_name)}", "data.split=null"], None),
        ([OWN, f"data.train={blend(a, f'{tmp_path}/no')}"], [f"data.train={tmp_path}/no", f"{tmp_path}/no.bin"]),
        ([OWN, one, f"data.stages=[{{from_step: 2, blend: {blend('no')}}}]"], ["data.stages=no", "no.bin"]),
    ):
        if names is None:
            start(*overrides)
        else:
            assert_names(refused(start, *overrides), *names)


def test_what_can_be_built_need_not_be_there(start: Start, tmp_path: Path, a: str) -> None:
    gone = f"data.train={tmp_path}/gone"
    assert_names(refused(start, OWN, gone, "data.rebuild=auto"), gone, "gone.bin")
    start(OWN, gone, "data.rebuild=auto", "data.input=raw")
    assert_names(refused(start, OWN, gone, "data.input=raw"), gone, "gone.bin")
    (tmp_path / "gone.json").touch()  # where a dataset's sources are written down
    start(OWN, gone, "data.rebuild=always")
    held_out = f"data.validation={tmp_path}/none"
    overrides = [OWN, f"data.train={a}", held_out, "data.rebuild=auto", "data.input=raw"]
    assert_names(refused(start, *overrides), held_out, "none.bin")


def test_yaml_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        """
        data:
          tokenizer: bytes
          train:
            - {prefix: web, weight: 0.7}
            - {prefix: code, weight: 0.3}
          stages:
            - from_step: 100
              blend: [{prefix: code, weight: 1}]
          validation: {prose: web-held, programs: code-held}
          input: null
        """
    )
    file = load_run_config(str(path), [])
    words = load_run_config(
        None,
        [
            "data.tokenizer=bytes",
            "data.train=[{prefix: web, weight: 0.7}, {prefix: code, weight: 0.3}]",
            "data.stages=[{from_step: 100, blend: [{prefix: code, weight: 1}]}]",
            "data.validation={prose: web-held, programs: code-held}",
        ],
    )
    assert (
        file.config.data.train
        == words.config.data.train
        == (
            BlendPart(prefix="web", weight=0.7),
            BlendPart(prefix="code", weight=0.3),
        )
    )
    assert file.config.data.stages == words.config.data.stages
    assert file.config.data.validation == words.config.data.validation == {"prose": "web-held", "programs": "code-held"}
    assert [stage.from_step for stage in file.config.data.blends] == [1, 100]
    path.write_text(config_to_yaml(words.config))
    assert load_run_config(str(path), []).config == words.config


@pytest.mark.parametrize(
    "blend", ["[{prefix: a}]", "[{prefix: a, weight: -1}]", "[{prefix: a, wait: 1}]", "[a]", "{a: 1}"]
)
def test_a_blend_that_is_none(blend: str) -> None:
    assert_names(refused(load_run_config, None, [f"data.train={blend}"]), "data.train=", "{prefix, weight}")


def test_a_prefix_is_taken_as_it_stands() -> None:
    config = load_run_config(None, ["data.train=001", "data.input=raw/*.jsonl", "data.tokenizer=bytes"]).config
    assert (config.data.train, config.data.input) == ("001", "raw/*.jsonl")
    assert load_run_config(None, ["data.input=[a, b]"]).config.data.input == ("a", "b")


def test_files_of_questions_are_read_before_a_run_starts(start: Start, tmp_path: Path, a: str) -> None:
    good, empty, bad = (tmp_path / f"{name}.jsonl" for name in ("good", "empty", "bad"))
    good.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n')
    empty.touch()
    bad.write_text(good.read_text() + '{"context": "a", "choices": ["b", "c"], "answer": 2}\n')
    (tmp_path / "other").mkdir()
    (namesake := tmp_path / "other" / "good.jsonl.gz").touch()
    one = [OWN, f"data.train={a}"]
    assert start(*one, f"evaluate.tasks=[{good}]").config.evaluate.tasks == (str(good),)
    message = refused(start, *one, f"evaluate.tasks=[{empty}, {good}, {bad}, {tmp_path}/absent]")
    assert_names(message, "evaluate.tasks", empty, f"{bad}:2", tmp_path / "absent")
    assert len(message.splitlines()) == 3 + (message.count("\n") == 3), "what is wrong with each, a line"
    assert_names(refused(start, *one, f"evaluate.tasks=[{good}, {namesake}]"), "evaluate.tasks", "good")
