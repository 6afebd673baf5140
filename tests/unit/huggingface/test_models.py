"""An exported model is the same one in transformers, an imported one the same here: bit for bit and by logits.

Logits may differ by 1e-5: both add the same products, in other orders.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import Manifest, read_manifest, shape_of, write_manifest
from megalm.config.schema import ModelSection
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.export_model import Exported, export_checkpoint, plan_export
from megalm.huggingface.export_tokenizer import write_tokenizer
from megalm.huggingface.import_model import Imported, import_model
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.inference.generation import CachedModel
from megalm.inference.inference_model import InferenceModel
from megalm.model.model_config import ModelConfig
from megalm.model.transformer import LanguageModel
from tests.huggingface_models import SECTIONS, SIZES, random_model, save_model
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

LENGTH = 40


def nothing() -> None:
    """Nobody watches."""


def export(checkpoint: Path, target: Path, dtype: torch.dtype = torch.float32, largest: int = 1 << 40) -> Exported:
    return export_checkpoint(plan_export(CheckpointReader(checkpoint), target, dtype, None), largest, "a name", nothing)


def import_(source: Path, target: Path) -> Imported:
    return import_model(HuggingFaceFolder(source), target, None, nothing)


def exported(section: ModelSection, folder: Path, **words: Any) -> tuple[ModelConfig, LanguageModel, Path, Path]:
    """A model, its checkpoint and its export."""
    shape, model = random_model(section, length=LENGTH)
    checkpoint = save_model(folder / "run" / "checkpoints", shape, model)
    export(checkpoint, folder / "out", **words)
    return shape, model, checkpoint, folder / "out"


def test_an_export_never_draws_an_id_without_a_token(tmp_path: Path) -> None:
    shape, _, _, folder = exported(ModelSection(vocab_size=300, **SIZES), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.generation_config.suppress_tokens == list(range(257, 300))
    with torch.no_grad():  # every id is equally likely
        theirs.get_output_embeddings().weight.zero_()
    torch.manual_seed(0)
    drawn = theirs.generate(tokens_of(shape)[:1, :3] % 257, max_new_tokens=30, do_sample=True)[0]
    assert int(drawn.max()) < 257


def tokens_of(shape: ModelConfig) -> torch.Tensor:
    return torch.randint(0, shape.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SECTIONS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    shape, model, _, folder = exported(SECTIONS[name], tmp_path)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert sum(parameter.numel() for parameter in theirs.parameters()) == shape.parameter_count()
    tokens = tokens_of(shape)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.bos_token_id) == (256, None)


@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_exported_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    shape, _, checkpoint, folder = exported(SECTIONS[name], tmp_path)
    imported = CheckpointReader(import_(folder, tmp_path / "back").checkpoint)
    assert imported.verify() == ""
    assert imported.holds_weights_only
    before, after = CheckpointReader(checkpoint).model(), imported.model()
    assert before.keys() == after.keys() == shape.parameters().keys()
    assert all(torch.equal(before[found], after[found]) for found in before)
    again = shape_of(imported.path, imported.manifest)
    kept = {"dropout": shape.dropout, "attention_dropout": shape.attention_dropout}
    assert {**vars(again), **kept} == vars(shape)
    # And what is exported of it is the same file.
    export(imported.path, tmp_path / "twice")
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_several_files_hold_the_same_as_one(tmp_path: Path) -> None:
    shape, model, checkpoint, folder = exported(SECTIONS["gpt2"], tmp_path)
    export(checkpoint, tmp_path / "parts", largest=20_000)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(names) > 3
    assert names == sorted(set(index["weight_map"].values()))
    together = {key: value for name in names for key, value in load_file(tmp_path / "parts" / name).items()}
    whole = load_file(folder / "model.safetensors")
    assert together.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], together[name]) for name in whole)
    assert index["metadata"]["total_size"] == 4 * shape.parameter_count()
    for name in names:
        held = load_file(tmp_path / "parts" / name)
        assert len(held) == 1 or sum(4 * value.numel() for value in held.values()) <= 20_000
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts").eval()
    tokens = tokens_of(shape)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    back = CheckpointReader(import_(tmp_path / "parts", tmp_path / "back").checkpoint).model()
    assert all(torch.equal(value, back[name]) for name, value in CheckpointReader(checkpoint).model().items())


def test_bf16_is_the_rounded_model(tmp_path: Path) -> None:
    _, _, checkpoint, folder = exported(SECTIONS["llama"], tmp_path, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    head = CheckpointReader(checkpoint).model()["head.weight"]
    assert torch.equal(theirs.lm_head.weight, head.bfloat16())
    back = CheckpointReader(import_(folder, tmp_path / "back").checkpoint).model()
    assert torch.equal(back["head.weight"], head.bfloat16().float())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, model = random_model(SECTIONS["gpt2"], length=LENGTH)
    checkpoint = save_model(tmp_path / "run/checkpoints", shape, model)
    read = CheckpointReader.read
    order: list[str] = []

    def noted(self: CheckpointReader, key: Any) -> torch.Tensor:
        order.append(key.name)
        return read(self, key)

    monkeypatch.setattr(CheckpointReader, "read", noted)
    written: list[int] = []
    plan = plan_export(CheckpointReader(checkpoint), tmp_path / "out", torch.float32, None)
    export_checkpoint(plan, 1 << 40, "", lambda: written.append(len(order)))
    steps = np.diff([0, *written])
    assert set(steps) == {1, 3}, "query, key and value are one tensor there, any other is one of ours"
    assert sum(steps) == len(shape.parameters())


def theirs_of(name: str) -> Any:
    """Random models that transformers itself makes."""
    torch.manual_seed(5)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, initializer_range=0.2, rms_norm_eps=1e-4)
        return transformers.LlamaForCausalLM(config)
    if name == "qwen3":
        config = transformers.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True, initializer_range=0.2)
        return transformers.Qwen3ForCausalLM(config)
    small = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, initializer_range=0.2))


def saved(name: str, folder: Path) -> Any:
    theirs = theirs_of(name).eval()
    theirs.save_pretrained(folder)
    write_tokenizer(load_tokenizer("bytes"), folder, LENGTH, 257, "llama")
    return theirs


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_model_that_transformers_saved_has_its_loss_here(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "hf")
    imported = import_(tmp_path / "hf", tmp_path / "run")
    reader = CheckpointReader(imported.checkpoint)
    shape = shape_of(reader.path, reader.manifest)
    model = LanguageModel(shape).eval()
    weights = reader.model()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[parameter_name])
        tokens = tokens_of(shape)
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
        total, count = model(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(total / count, theirs(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5)
    row = np.array([[1, 2, 3]])
    offline = CachedModel(InferenceModel(imported.checkpoint)).next_token_logits(row, np.array([2]))
    np.testing.assert_allclose(offline, theirs(torch.from_numpy(row)).logits[:, -1].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_names_without_a_prefix_and_saved_tables_are_read(name: str, tmp_path: Path) -> None:
    """As the first GPT-2 was published: no `transformer.`, and its causal masks beside the weights."""
    saved(name, tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "one")
    weights = load_file(tmp_path / "hf/model.safetensors")
    prefix, buffer = {
        "llama": ("model.", "layers.0.self_attn.rotary_emb.inv_freq"),
        "gpt2": ("transformer.", "h.0.attn.bias"),
    }[name]
    plain = {key.removeprefix(prefix): value for key, value in weights.items()}
    save_file({**plain, buffer: torch.ones(1, 1, 4, 4)}, tmp_path / "hf/model.safetensors")
    import_(tmp_path / "hf", tmp_path / "two")
    one, two = (CheckpointReader(tmp_path / at / "checkpoints/step-00000000").model() for at in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_tied_head_that_is_stored_too_must_be_the_table(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()}, path)
    import_(tmp_path / "hf", tmp_path / "one")
    save_file({**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1}, path)
    with pytest.raises(DataError) as refused:
        import_(tmp_path / "hf", tmp_path / "two")
    assert_names(refused.value, "lm_head.weight", "transformer.wte.weight", "tie_word_embeddings")


NORM = "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({NORM: None}, [NORM, "config.json"]),
        ({BIAS: torch.zeros(32)}, [BIAS]),
        ({NORM: torch.zeros(31)}, [NORM, "[31]", "[32]"]),
        ({NORM: torch.zeros(32, dtype=torch.int8)}, [NORM, "I8", "F32"]),
        ({NORM: torch.full((32,), torch.nan)}, [NORM]),
        ({"norm.weight": torch.zeros(32)}, ["norm.weight", "model.safetensors"]),
    ],
)
def test_wrong_tensors_are_refused_by_name(change: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    weights = {**load_file(tmp_path / "hf/model.safetensors"), **change}
    weights = {name: value for name, value in weights.items() if value is not None}
    save_file(weights, tmp_path / "hf/model.safetensors")
    with pytest.raises(DataError) as refused:
        import_(tmp_path / "hf", tmp_path / "run")
    assert_names(refused.value, *names)
    assert str(refused.value).count(f"{tmp_path / 'hf'}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "nothing is left of it"


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    whole = weights.read_bytes()

    def refused(*names: object) -> None:
        with pytest.raises(DataError) as caught:
            import_(tmp_path / "hf", tmp_path / "run")
        assert_names(caught.value, tmp_path / "hf", *names)
        assert not (tmp_path / "run").exists()

    weights.write_bytes(whole[:-100])
    refused(weights)
    index = tmp_path / "hf/model.safetensors.index.json"
    weights.unlink()
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    refused(index, "'../model.safetensors'")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    refused("model-00001-of-00002.safetensors", index.name)
    index.unlink()
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"anything")
    refused("pytorch_model.bin", "save_pretrained")
    (tmp_path / "hf/pytorch_model.bin").unlink()
    refused(weights.name, index.name)
    weights.write_bytes(whole)
    (tmp_path / "hf/tokenizer.json").unlink()
    refused("tokenizer.json", "--tokenizer")
    (tmp_path / "hf/config.json").unlink()
    refused("config.json")
    shutil.rmtree(tmp_path / "hf")
    refused("config.json", weights.name)


def test_a_vocabulary_larger_than_the_tokenizers_is_kept_and_a_smaller_one_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    imported = import_(tmp_path / "hf", tmp_path / "run")
    assert imported.tokenizer.vocab_size == 257
    assert "vocab_size: 300" in imported.config.read_text()
    tokenizer = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 300
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError) as refused:
        import_(tmp_path / "hf", tmp_path / "other")
    assert_names(refused.value, "tokenizer.json", 301, 300, "--tokenizer")


def test_what_megalm_does_otherwise_with_texts_is_reported(tmp_path: Path, tokenizer_files: dict[str, str]) -> None:
    theirs_of("llama").save_pretrained(tmp_path / "hf")  # its configuration has eos_token_id 2
    folder = Path(tokenizer_files["huggingface"]).parent
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == 2
    with pytest.raises(DataError) as refused:
        import_model(HuggingFaceFolder(tmp_path / "hf"), tmp_path / "run", folder, nothing)
    assert_names(refused.value, "tokenizer.json", 600, 300, "--tokenizer")
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    larger = transformers.LlamaConfig(vocab_size=600, max_position_embeddings=LENGTH, **sizes)
    transformers.LlamaForCausalLM(larger).save_pretrained(tmp_path / "larger")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A <|endoftext|>", special_tokens=[("<|begin|>", 0), ("<|endoftext|>", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    ends, eos = import_model(HuggingFaceFolder(tmp_path / "larger"), tmp_path / "run", tmp_path, nothing).notes
    assert_names(ends, "<|endoftext|>")
    assert_names(eos, "config.json", "eos_token_id=2")
    _, _, _, own = exported(SECTIONS["llama"], tmp_path / "own")
    assert import_(own, tmp_path / "back").notes == ()


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    shape, model = random_model(SECTIONS["llama"])
    with torch.no_grad():
        model.layers[1].mlp.up.weight[3, 4] = torch.nan
    path = save_model(tmp_path / "run/checkpoints", shape, model)
    with pytest.raises(CheckpointError) as refused:
        export(path, tmp_path / "out")
    assert_names(refused.value, "layers.1.mlp.up.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    shape, model = random_model(ModelSection(style="llama", **SIZES))
    path = save_model(tmp_path / "run/checkpoints", shape, model)
    broken = Manifest.model_construct()
    content = read_manifest(path).content
    broken._content = {**content, "model": {**content["model"], "num_hidden_layers": 4}}
    write_manifest(path, broken)
    with pytest.raises(CheckpointError) as refused:
        export(path, tmp_path / "out")
    assert_names(refused.value, path / "manifest.json", "tensors.layers.3.attention_norm.weight")
    assert not (tmp_path / "out").exists()
