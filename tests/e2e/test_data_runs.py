"""Runs on mixtures: what is read, validated and told, from the command to the documents of a step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megalm.data.builder.builder import build_files
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.train.step_lookup import samples_of_step
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import ROOT, Finished, finish, pretrain, rows, train_rows, write_json

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Story:
    folder: Path
    first: Finished  # 4 steps of a mixture
    second: Finished  # goes on to 8, from step 7 on with code alone
    third: Finished  # goes on to 10 with a batch of 8


@pytest.fixture(scope="module")
def story(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = load_tokenizer(small_data.tokenizer)
    documents = small_data.documents
    for name, part in (("web", documents[:-20]), ("code", documents[-20:-8]), ("held", documents[-8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": each.text}) + "\n" for each in part))
        build_files([folder / f"{name}.jsonl"], tokenizer, folder / name)
    small = write_json(folder / "eight.json", train_batch_size=8)
    first = train(folder, small_data, "train.steps=4")
    stages = "data.stages=[{from_step: 7, blend: [{prefix: code, weight: 1}]}]"
    second = train(folder, small_data, "train.steps=8", stages, "--resume", "auto")
    last = ("train.steps=10", stages, "--resume", "auto")
    third = train(folder, small_data, *last, json_file=small, validation="{held: held}")
    return Story(folder, first, second, third)


def train(
    folder: Path,
    data: SmallData,
    *words: str,
    json_file: str | Path = "fp32.json",
    validation: str = "{held: held, seen: code}",
) -> Finished:
    small = [word for word in data.words if not word.startswith(("data.", "evaluate."))]
    own = (
        "run.name=mine",
        "data.train=[{prefix: web, weight: 3}, {prefix: code, weight: 1}]",
        f"data.validation={validation}",
        "data.allow_validation_on_training=true",
        f"data.tokenizer={data.tokenizer}",
        "data.sequence_length=64",
        "evaluate.interval_steps=2",
        "schedule.kind=constant",
    )
    return finish(folder, pretrain(*small, *own, *words, json_file=json_file))


def pieces(folder: Path, step: int) -> list[tuple[int, str, str, str]]:
    """(sample, dataset, source, text) as inspect_dataset.py says them."""
    command = [sys.executable, ROOT / "data_tools" / "inspect_dataset.py", "--run", "runs/mine", "--step", str(step)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.split(r"^--- sample (\d+): (\w+) document \d+, (.*), its tokens .*\n", done.stdout, flags=re.MULTILINE)
    assert f"step {step} of runs/mine" in found[0]
    return [
        (int(a), b, c, d.removesuffix("\n")) for a, b, c, d in zip(*(found[i::4] for i in range(1, 5)), strict=True)
    ]


def test_it_trains_and_goes_on(story: Story) -> None:
    for finished in (story.first, story.second, story.third):
        assert finished.code == 0, finished.explain()
    assert [row["samples"] for row in train_rows(story.folder)] == [*range(16, 129, 16), 136, 144]


def test_the_mixture_and_its_repetition_are_reported(story: Story) -> None:
    assert re.search(r"data +web: 75\.0% of the samples, 0\.\d\d epochs of [\d,]+ tokens\n", story.first.stdout)
    assert re.search(r"data +code: 25\.0% of the samples, \d\.\d\d epochs", story.first.stdout)
    assert re.search(r"data +from step 7: code 100\.0%\n", story.second.stdout)


def test_the_training_loss_by_dataset(story: Story) -> None:
    found = train_rows(story.folder)
    assert all({"loss_of_web", "loss_of_code"} <= row.keys() for row in found)
    assert [row["loss_of_web"] is None for row in found] == [row["step"] >= 7 for row in found]
    for row in found[6:]:
        assert row["loss_of_code"] == pytest.approx(row["loss"], rel=1e-6)
    for row in found[:6]:  # every sample has as many targets
        assert 0.75 * row["loss_of_web"] + 0.25 * row["loss_of_code"] == pytest.approx(row["loss"], rel=1e-6)


def test_each_validation_set_has_rows_and_the_total_counts(story: Story) -> None:
    found = [row for row in rows(story.folder) if row["kind"] == "eval" and row["step"] == 4]
    assert [row["dataset"] for row in found] == ["held", "seen", "validation"]
    held, seen, total = found
    assert total["targets"] == held["targets"] + seen["targets"]
    mean = (held["loss"] * held["targets"] + seen["loss"] * seen["targets"]) / total["targets"]
    assert total["loss"] == pytest.approx(mean, rel=1e-12)
    told = [line for line in story.first.stdout.splitlines() if line.startswith("step 4: validation")]
    for row, line in zip((held, seen, total), told, strict=True):
        assert f"{row['loss']:.4f}" in line
        assert row is total or row["dataset"] in line
    manifest = json.loads((story.folder / "runs/mine/checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["validation_loss"] == total["loss"]


def test_other_validation_data_is_not_compared_with_the_lowest_loss(story: Story) -> None:
    shown = [finished.stdout.splitlines() for finished in (story.second, story.third)]
    notes = [[line for line in lines if "validation" in line and "lowest" in line] for lines in shown]
    assert list(map(len, notes)) == [0, 1]
    manifest = json.loads((story.folder / "runs/mine/checkpoints/step-00000008/manifest.json").read_text())
    assert manifest["best_validation_loss"] is not None
    found = [row for row in rows(story.folder) if row["kind"] == "eval" and row["step"] == 10]
    assert [row["dataset"] for row in found] == ["held", "validation"]
    assert found[0]["loss"] == found[1]["loss"]


def test_the_documents_of_any_step(story: Story) -> None:
    first = pieces(story.folder, 2)
    assert sorted({sample for sample, *_ in first}) == list(range(16, 32))
    shares = {name: len({sample for sample, dataset, *_ in first if dataset == name}) for name in ("web", "code")}
    assert shares == {"web": 12, "code": 4}
    lines = {name: (story.folder / f"{name}.jsonl").read_text().splitlines() for name in ("web", "code")}
    for _, dataset, source, text in first:
        line = re.fullmatch(rf".*{dataset}\.jsonl:(\d+), bytes [\d,]+ to [\d,]+", source)
        assert line, source
        assert text.strip() in json.loads(lines[dataset][int(line[1]) - 1])["text"]
    later = pieces(story.folder, 8)
    assert {(sample, dataset) for sample, dataset, *_ in later} == {(sample, "code") for sample in range(112, 128)}
    last = pieces(story.folder, 10)
    assert {(sample, dataset) for sample, dataset, *_ in last} == {(sample, "code") for sample in range(136, 144)}


def test_packed_documents_are_whole_also_at_another_length(story: Story, small_data: SmallData, tmp_path: Path) -> None:
    own = ("run.name=packed", f"data.train={story.folder / 'web'}", f"data.tokenizer={small_data.tokenizer}")
    own = (*own, "data.packing=best_fit", "data.split=95,5", "schedule.warmup_steps=0")
    for steps, length in ((2, 64), (4, 96)):
        resume = ("--resume", "auto") if steps == 4 else ()
        words = small_data.changed(*own, f"train.steps={steps}", f"data.sequence_length={length}", *resume)
        finished = finish(tmp_path, pretrain(*words))
        assert finished.code == 0, finished.explain()
        assert re.search(r"data +.*web: .* samples with \d\.\d\d% padding\n", finished.stdout)
    folder, seen = tmp_path / "runs" / "packed", Counter[tuple[int, int]]()
    lengths = IndexedDataset(story.folder / "web").sequence_lengths
    found = [samples_of_step(folder, step) for step in range(1, 5)]
    for number, read in enumerate(found):
        for piece in read.pieces:
            rest = lengths[piece.document] - piece.first
            assert number >= 2 or piece.end - piece.first in (65, rest), "to its document's end, or a full sample"
            seen.update((piece.document, token) for token in range(piece.first + 1, piece.end))
    assert set(seen.values()) == {1}, "no label twice"
    labels = [sum(piece.end - piece.first for piece in read.pieces) - 16 for read in found]
    assert [row["tokens"] for row in train_rows(tmp_path)] == np.cumsum(labels).tolist(), "without padding"


def test_what_is_consumed_may_not_change(story: Story, small_data: SmallData) -> None:
    other = "data.stages=[{from_step: 5, blend: [{prefix: code, weight: 1}]}]"
    refused = train(story.folder, small_data, "train.steps=20", other, "--resume", "auto")
    assert refused.code == 2, refused.explain()
    for words in ("order", "web 75.0%", "code 25.0%", "sample 96", "sample 64"):
        assert words in refused.stderr


def test_a_dry_run_tells_the_same_and_warns(story: Story, small_data: SmallData) -> None:
    dry = train(story.folder, small_data, "train.steps=1000", "data.stride=16", "--dry-run")
    assert dry.code == 0, dry.explain()
    assert re.search(r"web: 75\.0% of the samples, \d\.\d\d epochs of [\d,]+ tokens, each token \d", dry.stdout)
    (warning,) = (line for line in dry.stdout.splitlines() if line.startswith("WARNING: web"))
    assert "data.stride=16" in warning
    assert "data.sequence_length=64" in warning
    refused = train(story.folder, small_data, "train.steps=1000", "data.max_epochs=1", "--dry-run")
    assert (refused.code, "data.max_epochs=1" in refused.stderr) == (2, True)
