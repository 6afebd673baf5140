"""Going on with other settings on purpose: batch, sequence length, schedule, steps, data; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import step_folders
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.data.builder.builder import build_dataset
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.runs.metrics_log import live_rows
from tests.e2e.conftest import SIX_STEPS, SmallData
from tests.e2e.jobs import PRETRAIN, Finished, finish, launcher, pretrain, rows, run_folder, train_rows, write_json
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

OTHER = ("data.sequence_length=32", "schedule.kind=constant", "schedule.peak_learning_rate=1e-4")


def train(folder: Path, small_data: SmallData, *more: str, json_file: str | Path = "fp32.json") -> Finished:
    return finish(folder, pretrain(*small_data.changed(*SIX_STEPS, *more), json_file=json_file))


def numbers(folder: Path, first: int) -> list[tuple[int, float, float, float]]:
    live = [row for row in live_rows(rows(folder)) if row["kind"] == "train" and row["step"] >= first]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in live]


def numbers_in(line: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", line))


def manifest(folder: Path, step: int) -> Manifest:
    return read_manifest(run_folder(folder) / "checkpoints" / f"step-{step:08d}")


@pytest.fixture
def copied(six_steps: Path, tmp_path: Path) -> Path:
    shutil.copytree(six_steps, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_command_that_a_run_tells_goes_on(copied: Path, small_data: SmallData) -> None:
    """As it stands in the log, from the checkout's folder: the run's own settings say the rest."""
    told = re.findall(r"deepspeed launch/pretrain\.py (.*)", (run_folder(copied) / "log.txt").read_text())
    assert told == ["run.name=mine --resume auto train.steps=12"]
    finished = finish(copied, [*launcher("forked"), PRETRAIN, *told[0].split()])
    assert finished.code == 0, finished.explain()
    assert [row["step"] for row in train_rows(copied)] == list(range(1, 13))
    assert json.loads((run_folder(copied) / "deepspeed.json").read_text())["bf16"] == {"enabled": False}


def test_another_batch_length_and_schedule(small_data: SmallData, copied: Path) -> None:
    """As people mend a spoilt run: back to a good step, shorter samples, a larger batch, a small constant rate."""
    larger = write_json(copied / "larger.json", train_batch_size=32)
    changed = (*OTHER, "schedule.warmup_steps=0", "train.steps=9")
    finished = train(copied, small_data, *changed, "--resume", "3", json_file=larger)
    assert finished.code == 0, finished.explain()
    notes = [line for line in finished.stdout.splitlines() if "note: " in line]
    for numbers_told in ((16, 32), (64, 32), (4, 0.0001), (32, 0)):
        assert any(set(map(str, numbers_told)) <= numbers_in(note) for note in notes), finished.explain()
    before = numbers(copied, 1)
    assert [row[0] for row in before] == list(range(1, 10))
    assert [row[3] for row in before[3:]] == [1e-4] * 6
    data = manifest(copied, 9).data_position.segments
    told = [(part.sequence_length, part.global_batch, part.samples_consumed, part.begins) for part in data]
    assert told == [(64, 16, 48, "anew"), (32, 32, 192, "recut")]
    assert train_rows(copied)[-1]["tokens"] == 3 * 1024 + 6 * 1024
    # And once more from the middle of it: the same order of samples is put together again.
    finished = train(copied, small_data, *changed, "--resume", "6", json_file=larger)
    assert finished.code == 0, finished.explain()
    assert not [line for line in finished.stdout.splitlines() if "note: " in line and {"16", "32"} <= numbers_in(line)]
    assert numbers(copied, 1) == before


def test_extended_on_a_new_schedule(small_data: SmallData, copied: Path) -> None:
    finished = train(copied, small_data, "train.steps=6", "--resume", "auto", "--extend-steps", "6")
    assert finished.code == 0, finished.explain()
    rates = [row[3] for row in numbers(copied, 6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(rates[0] / 10), "from the rate of then to a tenth"
    segments = manifest(copied, 12).schedule.segments
    assert [(part.first_step, part.offset_steps, part.steps) for part in segments] == [(1, 0, 6), (7, 6, 6)]
    before = numbers(copied, 1)
    # The command of the first start goes on with what it was extended to.
    finished = train(copied, small_data, "train.steps=6", "--resume", "9")
    assert finished.code == 0, finished.explain()
    assert numbers(copied, 1) == before
    assert len(before) == 12


def test_a_new_run_from_the_weights_alone(small_data: SmallData, six_steps: Path, tmp_path: Path) -> None:
    start = str(run_folder(six_steps) / "checkpoints" / "step-00000006")
    flags = ("--resume", start, "--extend-steps", "4", "--extend-strategy", "weights")
    finished = train(tmp_path, small_data, *flags)
    assert finished.code == 0, finished.explain()
    found = numbers(tmp_path, 1)
    assert [row[0] for row in found] == [1, 2, 3, 4]
    assert found[0][1] < numbers(six_steps, 1)[0][1] - 0.3, "the first batch again, by a model that has learnt"
    assert manifest(tmp_path, 4).counters["optimizer_step"] == 4
    assert next(row["event"] for row in rows(tmp_path) if row["kind"] == "event") == "start"
    same = tmp_path / "same"  # a refusal leaves its failure in the run folder, and others use this one
    shutil.copytree(six_steps, same)
    refused = train(same, small_data, "--resume", str(run_folder(same) / "checkpoints" / "step-00000006"), *flags[2:])
    assert refused.code == 2
    assert "run.name" in refused.stderr


def test_what_differs_is_refused_in_full_unless_it_is_allowed(small_data: SmallData, copied: Path) -> None:
    build_dataset(small_data.documents[:20], load_tokenizer(small_data.tokenizer), copied / "other")
    other = ("train.steps=8", f"data.train={copied / 'other'}", "--resume", "auto")
    refused = train(copied, small_data, *other, "model.rope_theta=5000", "train.seed=9")
    assert refused.code == 2
    for said in (
        r"rope_theta\b.*10000\.0.*5000\.0",
        r"train\.seed\b.*\b1234\b.*\b9\b",
        r"resume\.allow=\[model,order,dataset\]",
    ):
        assert re.search(said, refused.stderr), refused.explain()
    assert refused.stderr.count("\n") == 1
    unknown = train(copied, small_data, *other, "resume.allow=[corpus]")
    assert unknown.code == 2
    assert '"dataset", "tokenizer", "order", "model"' in unknown.stderr
    allowed = train(copied, small_data, *other, "resume.allow=[dataset]")
    assert allowed.code == 0, allowed.explain()
    data = manifest(copied, 8).data_position.segments
    assert [(part.samples_consumed, part.begins) for part in data] == [(96, "anew"), (32, "anew")]


def test_nothing_but_the_name_goes_on_with_the_run_s_own(small_data: SmallData, copied: Path) -> None:
    """The first command had a dozen words, and a JSON that is not the default one."""
    before = (run_folder(copied) / "config.yaml").read_text()
    plain = [*launcher("forked"), PRETRAIN, "run.name=mine"]
    again = finish(copied, [*plain, "--resume", "3"])
    assert again.code == 0, again.explain()
    assert "runs/mine/config.yaml" in again.stdout
    assert (run_folder(copied) / "config.yaml").read_text() == before
    undisturbed = [row for row in rows(copied) if row["kind"] == "train" and row["attempt"] == 1 and row["step"] > 3]
    assert numbers(copied, 4) == [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in undisturbed]
    # What is stated now counts and is told; the plan says the same.
    larger = write_json(copied / "larger.json", train_batch_size=32)
    changed = ["--deepspeed_config", larger, "--resume", "auto", "guard.window=70"]
    plan = finish(copied, [*plain, *changed, "--dry-run"])
    assert re.search(r"model.hidden_size +64 ", plan.stdout), plan.explain()
    told = finish(copied, [*plain, *changed, "--extend-steps", "6"])
    assert told.code == 0, told.explain()
    for words in (("guard.window", "128", "70"), (str(larger), "train_batch_size", "16", "32")):
        assert any(all(word in line for word in words) for line in told.stdout.splitlines()), told.explain()
    # The last step is the extension's, whose rates it has again: nothing was stated about them.
    extended = numbers(copied, 1)
    last = finish(copied, [*plain, "--resume", "9"])
    assert last.code == 0, last.explain()
    assert numbers(copied, 1) == extended
    assert len(extended) == 12
    refused = finish(copied, [*plain, "--resume", "auto", "model.num_hidden_layers=3"])
    assert refused.code == 2
    (line,) = refused.stderr.splitlines()
    assert re.search(r"num_hidden_layers\b.*\b2\b.*\b3\b", line)


def test_there_must_be_something_to_extend(small_data: SmallData, tmp_path: Path) -> None:
    alone = train(tmp_path, small_data, "--extend-steps", "5")
    assert alone.code == 2
    assert "--resume" in alone.stderr
    empty = train(tmp_path, small_data, "--resume", "auto", "--extend-steps", "5")
    assert empty.code == 2
    assert len(empty.stderr.splitlines()) == 1, empty.explain()
    assert json.dumps(sorted(path.name for path in tmp_path.glob("runs/mine/checkpoints/*"))) == "[]"


def test_a_run_whose_metrics_are_deleted_resumes_from_the_newest_checkpoint(
    copied: Path, small_data: SmallData
) -> None:
    """Only the checkpoints still record the attempts; the numbers go on from theirs, and retention keeps the newest."""
    run = run_folder(copied)
    for steps in (8, 10):
        assert train(copied, small_data, f"train.steps={steps}", "--resume", "auto").code == 0
    for path in (run / "metrics.jsonl", run / "resume.json", *run.glob("environment*.json")):
        path.unlink()
    more = train(copied, small_data, "train.steps=12", "checkpoint.keep_last=2", "--resume", "auto")
    assert more.code == 0, more.explain()
    assert [row["step"] for row in rows(copied) if row["kind"] == "train"] == [11, 12]
    assert {row["attempt"] for row in rows(copied)} == {4}
    assert [path.name for path in step_folders(run / "checkpoints")] == ["step-00000010", "step-00000012"]


def test_freezing_and_averaging_from_here_on_and_back(copied: Path, small_data: SmallData) -> None:
    def go_on(*settings: str) -> Finished:
        finished = finish(copied, [*launcher("forked"), PRETRAIN, "run.name=mine", "--resume", "auto", *settings])
        assert finished.code == 0, finished.explain()
        return finished

    frozen = "train.parameter_groups=[{match: 'layers.0.*', frozen: true}]"
    said = go_on("train.steps=8", frozen, "train.ema_decay=0.5").stdout
    assert_names(said, "layers.0.attention.key.weight", "train.ema_decay=0.5")
    before, after = (CheckpointReader(run_folder(copied) / "checkpoints" / f"step-0000000{step}") for step in (6, 8))
    for name, shape in after.shapes().items():
        is_frozen = name.startswith("layers.0.")
        assert after.kinds(name) == (("master",) if is_frozen else ("master", "exp_avg", "exp_avg_sq", "ema")), name
        stayed = torch.equal(before.read_parameter(name, shape), after.read_parameter(name, shape))
        assert stayed == is_frozen, name
    said = go_on("train.steps=9", "train.parameter_groups=[]", "train.ema_decay=null").stdout
    assert_names(said, "layers.0.attention.key.weight", "train.ema_decay")
    last = CheckpointReader(run_folder(copied) / "checkpoints/step-00000009")
    name, shape = "layers.0.mlp.up.weight", last.shapes()["layers.0.mlp.up.weight"]
    assert last.kinds(name) == ("master", "exp_avg", "exp_avg_sq")
    assert not torch.equal(after.read_parameter(name, shape), last.read_parameter(name, shape))
