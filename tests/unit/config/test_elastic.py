"""A run that resumes on other ranks: what stays, what is fitted, and which ranks a refusal names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_cases import CPU, refused

from megalm.config.loading import config_to_yaml, load_run_config
from megalm.config.schema import ParallelSection
from megalm.planning.batch_size import BatchPlan, RunBatch, plan_batch
from megalm.planning.engine_checks import CheckContext
from megalm.planning.run_checks import check_run
from megalm.runs.run_settings import ConfigFiles, read_settings
from tests.messages import assert_names

ZERO_1 = {"zero_optimization": {"stage": 1}}
GRID = ("parallel.tensor=4", "parallel.pipeline=2", "parallel.sequence=true")
Come = Callable[..., ConfigFiles]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Come]:
    """Write what a run leaves in its folder; gives a function that reads its settings on other ranks."""

    def write(ranks: int, batch: tuple[int, int, int], json_file: dict[str, Any], *words: str) -> Come:
        own = tmp_path / "mine"
        own.mkdir(exist_ok=True)
        names = (f"run.root={tmp_path}", "run.name=mine")
        (own / "config.yaml").write_text(config_to_yaml(load_run_config(None, [*words, *names]).config))
        (own / "deepspeed.json").write_text(json.dumps(json_file | ZERO_1))
        keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        (own / "deepspeed.resolved.json").write_text(json.dumps(dict(zip(keys, batch, strict=True))))
        (own / "environment.json").write_text(json.dumps({"world_size": ranks}))

        def come(ranks: int, *said: str, json_file: Path | None = None) -> ConfigFiles:
            named = None if json_file is None else str(json_file)
            return read_settings(None, [*names, *said], named, resume=True, ranks=ranks, device=CPU)

        return come

    return write


def batch_of(files: ConfigFiles, ranks: int, most: int = 10**9) -> BatchPlan:
    """The batch with which the run would start, after all its rules."""
    check_run(files.loaded, files.deepspeed, ranks, CPU, data_needed=False)
    topology = CheckContext(files.loaded, files.deepspeed, ranks, CPU).topology
    run_batch = RunBatch.of(files.loaded, files.deepspeed)
    return plan_batch(files.deepspeed.settings, topology, "", lambda it: it.micro_batch <= most, run_batch)[0]


def degrees(files: ConfigFiles) -> dict[str, object]:
    """The keys of the grid that are not the defaults."""
    return {name: value for name, value in files.loaded.config.parallel if value != getattr(ParallelSection(), name)}


TENSOR_4 = {"tensor": 4, "sequence": True}


@pytest.mark.parametrize(
    ("ranks", "said", "expected", "batch"),
    [
        (8, (), {**TENSOR_4, "pipeline": 2}, (4, 4, 1)),
        (16, (), {**TENSOR_4, "pipeline": 2}, (4, 2, 2)),
        (64, (), {**TENSOR_4, "pipeline": 2}, (2, 1, 8)),
        (4, (), TENSOR_4, (4, 4, 1)),  # of the legal ones the least changed
        (2, (), {"pipeline": 2}, (4, 4, 1)),
        (1, (), {}, (4, 4, 1)),
        (2, ("parallel.context=2",), {"context": 2}, (4, 4, 1)),  # what is said now stays
        (4, ("parallel.pipeline=1",), TENSOR_4, (4, 4, 1)),
        (8, ("parallel.tensor=1",), {"pipeline": 2}, (4, 1, 4)),
    ],
)
def test_degrees_that_are_not_said_now_are_fitted(
    folder: Callable[..., Come],
    ranks: int,
    said: tuple[str, ...],
    expected: dict[str, object],
    batch: tuple[int, int, int],
) -> None:
    come = folder(8, (16, 4, 4), {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}, *GRID)
    files = come(ranks, *said)
    assert degrees(files) == expected
    assert batch_of(files, ranks) == BatchPlan(16, *batch)
    fitted = {key for key, source in files.loaded.sources.items() if source.startswith("fitted")}
    assert fitted.isdisjoint(word.partition("=")[0] for word in said)
    assert {f"parallel.{name}" for name in {*TENSOR_4, "pipeline"} - expected.keys()} - fitted <= {
        word.partition("=")[0] for word in said
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"train_micro_batch_size_per_gpu": 4},  # whose batch would follow the ranks
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
        {"train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto"},
        {},
    ],
)
def test_the_batch_stays_and_no_micro_batch_grows(folder: Callable[..., Come], sizes: dict[str, Any]) -> None:
    come = folder(4, (16, 4, 1), sizes)
    for ranks, micro in ((8, 2), (4, 4), (1, 4)):
        assert batch_of(come(ranks), ranks) == BatchPlan(16, micro, 16 // micro // ranks, ranks)
    folder(8, (16, 2, 1), sizes)
    assert batch_of(come(8), 8) == BatchPlan(16, 2, 1, 8), "once more on the ranks of a detour"


def test_a_growing_batch_and_one_that_no_rank_count_but_its_own_divides(folder: Callable[..., Come]) -> None:
    sizes = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 4}
    come = folder(1, (12, 4, 3), sizes, "schedule.batch=[{from_step: 5, sequences: 18}]")
    assert batch_of(come(2), 2) == BatchPlan(12, 3, 2, 2), "divides 6 and 9"
    assert batch_of(come(6), 6) == BatchPlan(12, 1, 2, 6)
    assert_names(refused(come, 4), 3, 6, 12)


def test_a_micro_batch_comes_back_with_its_grid(folder: Callable[..., Come], tmp_path: Path) -> None:
    """Of "auto" the largest that any start had is the limit, not the small one of a detour."""
    come = folder(8, (16, 2, 1), {"train_micro_batch_size_per_gpu": "auto"})
    before = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    (tmp_path / "mine" / "deepspeed.resolved.attempt-1.json").write_text(json.dumps(before))
    assert batch_of(come(4), 4) == BatchPlan(16, 4, 1, 4)
    assert batch_of(come(1), 1) == BatchPlan(16, 4, 4, 1)


def test_a_batch_of_the_first_command_is_the_run_s(folder: Callable[..., Come]) -> None:
    """It is no longer said, and the JSON alone would give another."""
    come = folder(2, (32, 4, 4), {"train_micro_batch_size_per_gpu": 4}, "batch.global_sequences=32")
    assert batch_of(come(2), 2) == BatchPlan(32, 4, 4, 2)
    assert batch_of(come(1), 1) == BatchPlan(32, 4, 8, 1)
    assert batch_of(come(1, "batch.global_sequences=8"), 1) == BatchPlan(8, 4, 2, 1), "unless another is said now"


def test_sizes_that_are_said_now_are_another_batch(folder: Callable[..., Come], tmp_path: Path) -> None:
    come = folder(4, (16, 4, 1), {"train_micro_batch_size_per_gpu": 4})
    (tmp_path / "other.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 8}))
    assert batch_of(come(4, json_file=tmp_path / "other.json"), 4) == BatchPlan(32, 8, 1, 4)


@pytest.mark.parametrize(
    ("ranks", "said", "near", "also"),
    [
        (3, (), {2, 4}, ()),
        (6, (), {4, 8}, ()),
        (12, (), {8, 16}, ()),
        (1000, (), {128}, ()),
        (4, ("parallel.tensor=4", "parallel.pipeline=2"), {8}, ("parallel.tensor=4", "parallel.pipeline=1")),
        (12, ("parallel.tensor=4", "parallel.pipeline=2"), {8, 16}, ()),
    ],
)
def test_a_refusal_names_the_nearest_ranks(
    folder: Callable[..., Come], ranks: int, said: tuple[str, ...], near: set[int], also: tuple[str, ...]
) -> None:
    come = folder(8, (16, 4, 4), {"train_batch_size": 16}, *GRID)
    message = refused(come, ranks, *said)
    named = re.search(r"start ([\d or]+) ranks", message)
    assert named is not None, message
    assert {int(number) for number in named[1].split(" or ")} == near
    assert_names(message, ranks, 16, "parallel.tensor=4", "parallel.pipeline=2", *also)
    for number in near:
        assert batch_of(come(number, *said), number).global_batch == 16


def test_what_is_wrong_on_any_ranks_is_left_to_its_rule(folder: Callable[..., Come]) -> None:
    files = folder(8, (16, 4, 4), {"train_batch_size": 16}, *GRID)(6, "parallel.tensor=3")
    assert_names(refused(batch_of, files, 6), "parallel.tensor=3", "model.num_attention_heads=4")
