"""Which checkpoints of a run are looked at, and what a model in this process takes and refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megalm.checkpoint.manifest import read_manifest, set_status, write_manifest
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import MicroBatch
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import CheckpointError, DataError
from megalm.inference.dataset_eval import DATA, DatasetTask, other_sets, own_sets
from megalm.inference.inference_model import InferenceModel, read_facts
from megalm.inference.run_checkpoints import good_checkpoints, nearest
from megalm.model.layer_factory import VocabularyOutput
from tests.checkpoint_files import save
from tests.inference_models import GPT2, write_run
from tests.messages import assert_names

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24


def test_good_ones_in_order_and_the_others_named(tmp_path: Path) -> None:
    folders = {step: save(tmp_path / "checkpoints", step) for step in (10, 20, 30, 40, 50)}
    set_status(folders[20], "bad", "loss of 9")
    set_status(folders[30], "suspect", None)
    lost = next(folders[40].glob("*.safetensors"))
    lost.unlink()
    good, others = good_checkpoints(tmp_path)
    assert good == [folders[10], folders[50]]
    for step, reason in zip((20, 30, 40), others, strict=True):
        assert_names(reason, folders[step].name)
    assert_names(others[0], "bad", "loss of 9")
    assert_names(others[1], "suspect")
    assert_names(others[2], lost)


def test_what_a_run_that_was_set_back_has_left_is_no_part_of_it(tmp_path: Path) -> None:
    folders = {step: save(tmp_path / "checkpoints", step) for step in (10, 20, 30, 40)}
    later = save(tmp_path / "checkpoints", 25, attempt=2)
    good, others = good_checkpoints(tmp_path)
    assert good == [folders[10], folders[20], later]
    for step, reason in zip((30, 40), others, strict=True):
        assert_names(reason, folders[step].name, 1, 2, later.name)


def test_a_run_without_a_good_one_is_refused(tmp_path: Path) -> None:
    command = f"megalm checkpoint list {tmp_path}"
    with pytest.raises(CheckpointError) as refused:
        good_checkpoints(tmp_path)
    assert_names(refused.value, command)
    set_status(save(tmp_path / "checkpoints", 10), "bad", "loss of 9")
    with pytest.raises(CheckpointError) as refused:
        good_checkpoints(tmp_path)
    assert_names(refused.value, command, "step-00000010", "loss of 9")


@pytest.mark.parametrize(
    ("percentages", "expected"),
    [
        ([25, 50, 75, 100], [100, 200, 300, 400]),
        ([0, 1], [100]),
        ([90, 100], [400]),
        ([37.5], [100]),  # as near to 200
        ([60, 40, 60], [200]),
    ],
)
def test_nearest_to_shares_of_the_run(percentages: list[float], expected: list[int]) -> None:
    assert nearest([100, 200, 300, 400], percentages) == expected


def test_facts_say_how_it_was_trained(tmp_path: Path) -> None:
    facts = read_facts(write_run(tmp_path / "run", ByteTokenizer(), length=LENGTH))
    assert (facts.sequence_length, facts.document_mask, facts.run_folder) == (LENGTH, False, tmp_path / "run")
    moved = facts.path.rename(tmp_path / "alone")
    assert read_facts(moved).run_folder is None


def test_a_tokenizer_that_moved(tmp_path: Path) -> None:
    gone = tmp_path / "gone.model"
    place = write_run(tmp_path / "run", ByteTokenizer())
    write_manifest(place, read_manifest(place).amended(tokenizer=str(gone)))
    with pytest.raises(DataError) as refused:
        read_facts(place)
    assert_names(refused.value, gone, place, "--tokenizer")
    assert read_facts(place, "bytes").tokenizer.vocab_size == 257


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", ByteTokenizer(), GPT2, spoilt={"final_norm.bias": math.inf})
    with pytest.raises(CheckpointError) as refused:
        InferenceModel(place)
    assert_names(refused.value, place, "final_norm.bias")


def test_datasets_of_the_tokenizer_have_a_total(tmp_path: Path) -> None:
    model = InferenceModel(write_run(tmp_path / "run", ByteTokenizer(), GPT2, LENGTH))
    for name, count in (("few", 30), ("many", 200)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.append(np.random.default_rng(count).integers(0, 256, count))
    sets = other_sets(model.facts, [str(tmp_path / name) for name in ("few", "many")])
    few, many, total = DatasetTask(DATA, sets, model.tokenizer, 4).rows(model, lambda: None)
    assert [row["dataset"] for row in (few, many, total)] == ["few", "many", "all"]
    assert [row["targets"] for row in (few, many, total)] == [29, 199, 228]
    assert total["loss"] == pytest.approx((29 * few["loss"] + 199 * many["loss"]) / 228)
    (row,) = DatasetTask(DATA, {"few": sets["few"]}, model.tokenizer, 4).rows(model, lambda: None)
    assert row == few
    (row,) = DatasetTask(DATA, {"many": sets["many"]}, model.tokenizer, 4, max_samples=2).rows(model, lambda: None)
    assert row["targets"] == 2 * LENGTH


def test_what_cannot_be_evaluated_on_is_refused(tmp_path: Path) -> None:
    model = InferenceModel(write_run(tmp_path / "run", ByteTokenizer(), GPT2, LENGTH))
    with pytest.raises(DataError, match="absent"):
        other_sets(model.facts, [str(tmp_path / "absent")])
    with pytest.raises(CheckpointError) as no_config:
        own_sets(model.facts, lambda line: None)
    assert_names(no_config.value, model.facts.path, "config.yaml", "--data")
    with IndexedDatasetWriter(tmp_path / "other", np.uint16) as writer:
        writer.append([5, 300, 7])
    task = DatasetTask(DATA, other_sets(model.facts, [str(tmp_path / "other")]), model.tokenizer, 4)
    with pytest.raises(DataError) as refused:
        task.rows(model, lambda: None)
    assert_names(refused.value, 300, 257)


def test_logits_exist_for_a_chunk_of_tokens_at_a_time(tmp_path: Path) -> None:
    model = InferenceModel(write_run(tmp_path / "run", ByteTokenizer(), GPT2, LENGTH))
    rows: list[int] = []
    output = model.network.head.output
    assert isinstance(output, VocabularyOutput)
    whole = output.chunk

    def noted(logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        rows.append(len(logits))
        return whole(logits, labels, gradient)

    output.chunk = noted
    tokens = np.random.default_rng(0).integers(0, 256, (100, LENGTH))
    batch = MicroBatch(tokens, tokens, None)
    loss = model.evaluate([batch])
    assert sum(rows) == tokens.size > max(rows) == model.network.head.chunk_tokens
    rows.clear()
    assert model.row_losses(batch).sum() == pytest.approx(loss, rel=1e-6)
    assert max(rows) == LENGTH


def test_bf16_is_near(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", ByteTokenizer(), GPT2, LENGTH)
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.append(np.random.default_rng(0).integers(0, 256, 300))
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = InferenceModel(place, dtype=dtype)
        task = DatasetTask(DATA, other_sets(model.facts, [str(tmp_path / "data")]), model.tokenizer, 4)
        losses.append(task.rows(model, lambda: None)[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)
