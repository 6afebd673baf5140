"""What DeepSpeed's own tool makes of checkpoints of ZeRO 1, 2 and 3 is imported bit for bit: weights, moments, step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.huggingface.export_tokenizer import write_tokenizer
from megalm.huggingface.import_model import import_model
from megalm.huggingface.pretrained_folder import MOMENTS
from megalm.huggingface.universal_checkpoint import UniversalCheckpoint
from megalm.huggingface.weight_mapping import hf_tensors
from tests.ranks import run_ranks
from tests.universal_checkpoints import SAVED, STEPS, train_and_save, write_config

pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed

CASES = {
    1: {"zero1-bf16": (1, "bf16"), "zero2-fp16": (2, "fp16"), "zero3": (3, "fp32")},
    2: {"zero1": (1, "fp32"), "zero2": (2, "fp32"), "zero3": (3, "fp32")},
}


@pytest.mark.parametrize("ranks", CASES)
def test_weights_moments_and_step_are_deepspeeds_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    config = write_config(tmp_path / "hf", 257, tie_word_embeddings=ranks == 1)
    write_tokenizer(load_tokenizer("bytes"), config.parent, 64, 257, "llama")
    runs = {tmp_path / name: facts for name, facts in CASES[ranks].items()}
    states: list[tuple[dict[str, Any], dict[str, Any]]] = run_ranks(ranks, train_and_save, config, runs, False)[0]
    for folder, (state, counters) in zip(runs, states, strict=True):
        source = UniversalCheckpoint(folder, config)
        made = import_model(source, tmp_path / f"{folder.name}-imported", None, lambda: None)
        assert source.folder.name == f"{SAVED}_universal"
        reader = CheckpointReader(made.checkpoint)
        assert (reader.verify(), reader.manifest.step, made.checkpoint.name) == ("", STEPS, "step-00000003")
        assert reader.manifest.counters == counters
        assert counters["skipped_steps"] == (1 if "fp16" in folder.name else 0)
        for tensor in hf_tensors(made.shape):
            ((name, size),) = tensor.parts
            for kind in ("master", *MOMENTS):
                found = reader.read_parameter(name, size, kind)
                np.testing.assert_array_equal(found.numpy(), state[kind][tensor.name], f"{folder.name} {name} {kind}")
                assert found.count_nonzero(), (folder.name, name, kind)
    assert json.loads(config.read_text())["num_key_value_heads"] == made.shape.num_key_value_heads
