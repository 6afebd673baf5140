"""A model of the maximal-update parametrisation is exported as one without, of the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.config.schema import ModelSection
from megalm.huggingface.export_model import FoldedReader, export_checkpoint, plan_export
from megalm.model.model_config import ModelConfig
from megalm.model.transformer import LanguageModel
from tests.huggingface_models import SIZES, random_model, save_model
from tests.messages import assert_names

# Multipliers that are no powers of two, and heads of which the root is none.
SECTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-qk-norm-tied": {"qk_norm": True, "tie_word_embeddings": True},
    "gpt2": {"style": "gpt2"},
    "gemma": {
        "qk_norm": True,
        "norm_zero_centered": True,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
        "attention_sinks": True,
    },
    "olmo": {"qk_norm": "whole", "norm_placement": "post", "num_key_value_heads": 2},
}


def saved(folder: Path, name: str, **facts: Any) -> tuple[ModelConfig, LanguageModel, CheckpointReader]:
    shape, model = random_model(ModelSection(mup_base_width=12, **SIZES, **SECTIONS[name]))
    return shape, model, CheckpointReader(save_model(folder / "run" / "checkpoints", shape, model, **facts))


def tokens() -> torch.Tensor:
    return torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_folded_weights_give_the_same_logits(name: str, tmp_path: Path) -> None:
    shape, model, reader = saved(tmp_path, name)
    folded = FoldedReader(reader, shape)
    assert (folded.shape.mup_base_width, folded.shape.attention_scale) == (None, None)
    plain = LanguageModel(folded.shape).eval()
    with torch.no_grad():
        for parameter_name, parameter in plain.named_parameters():
            parameter.copy_(folded.read_finite(parameter_name, tuple(parameter.shape)))
        torch.testing.assert_close(plain(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-qk-norm-tied", "gpt2"])
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _, model, reader = saved(tmp_path, name)
    export_checkpoint(plan_export(reader, tmp_path / "out", torch.float32, None), 1 << 40, "a name", lambda: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), rtol=1e-5, atol=1e-5)
    assert_names((tmp_path / "out" / "README.md").read_text(), "maximal-update", 12)


def test_a_gguf_file_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    from megalm.gguf.export_gguf import GGUF_FILE, check_gguf, export_gguf
    from megalm.huggingface.config_json import to_config

    _, model, reader = saved(tmp_path, "llama")
    plan = plan_export(reader, tmp_path / "out", torch.float32, None)
    export_gguf(plan, check_gguf(plan), "a name", lambda: None)
    config = transformers.AutoConfig.for_model(**to_config(plan.shape, 256, {}, "float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=GGUF_FILE, config=config)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens()).logits, model(tokens()), rtol=1e-5, atol=1e-5)
