"""A GGUF file has the numbers that transformers and llama.cpp read, and a tokenizer or the reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import CheckpointError, DataError
from megalm.gguf.export_gguf import GGUF_FILE, check_gguf, export_gguf, gguf_tensors
from megalm.gguf.gguf_tokenizer import CONTROL, NORMAL, UNUSED, to_gguf
from megalm.huggingface.config_json import to_config
from megalm.huggingface.export_model import plan_export
from megalm.huggingface.export_tokenizer import write_tokenizer
from megalm.model.model_config import ModelConfig
from megalm.model.transformer import LanguageModel
from tests.huggingface_models import FAMILIES, LLAMA_3, SECTIONS, random_model, save_model
from tests.messages import assert_names

YARN = FAMILIES["olmo3"].rope_scaling
assert YARN is not None
KINDS = {**SECTIONS, **FAMILIES, "llama-3": LLAMA_3}
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write(
    name: str, folder: Path, spec: str = "bytes", dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[ModelConfig, LanguageModel]:
    """A model, and its GGUF file in `folder`/out."""
    rows = load_tokenizer(spec).vocab_size + 3
    section = KINDS[name].model_copy(update={"vocab_size": rows, **changes})
    shape, model = random_model(section, vocab_size=rows)
    checkpoint = save_model(folder / "run" / "checkpoints", shape, model, spec)
    plan = plan_export(CheckpointReader(checkpoint), folder / "out", dtype, None)
    written = []
    size = export_gguf(plan, check_gguf(plan), "a name", lambda: written.append(1))
    assert len(written) == len(gguf_tensors(shape))
    assert 0 < (folder / "out" / GGUF_FILE).stat().st_size - size < 200_000
    return shape, model


# Of the others transformers reads no GGUF file, or not these choices.
@pytest.mark.parametrize("name", [*SECTIONS, "qwen2", "qwen3_moe", "gemma2", "gemma3_text"])
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape, model = write(name, tmp_path)
    # Of the file's keys it reads some only; those are held by llama.cpp's test below.
    facts = to_config(shape, 256, {}, "float32")
    config = transformers.AutoConfig.for_model(**facts)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=GGUF_FILE, config=config, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mistral", {}, ["model.sliding_window=8"]),
        ("llama", {"hidden_act": "gelu"}, ["model.hidden_act"]),
        ("qk-norm", {"qkv_bias": True, "attention_output_bias": True}, ["model.qkv_bias=true"]),
        ("qwen2", {"rope_scaling": LLAMA_3.rope_scaling}, ["model.rope_scaling"]),
        ("olmo2", {"tie_word_embeddings": True}, ["model.tie_word_embeddings=true"]),
        ("olmo3", {"full_attention_layers": (2,)}, ["model.sliding_window=8"]),
        ("olmo3", {"rope_scaling": YARN.model_copy(update={"beta_fast": 16.0})}, ["model.rope_scaling"]),
        ("smollm3", {"no_rope_layers": 2}, ["model.no_rope_layers=[1, 3, 5]"]),
        ("gemma3_text", {"rope_local_theta": 100.0}, ["model.rope_local_theta=100.0"]),
        ("gemma3_text", {"rope_local_theta": None}, ["model.rope_local_theta=null"]),
        ("olmo3", {"rope_scaling": YARN.model_copy(update={"attention_factor": 1.2})}, ["model.rope_scaling"]),
        ("gemma2", {"sliding_window": None, "full_attention_layers": None}, ["model.sliding_window=null"]),
        ("gemma3_text", {"attention_scale": 24**-0.5}, ["model.attention_scale"]),
        ("gemma3_text", {"num_hidden_layers": 62}, ["model.attention_scale"]),
        ("gpt_neox", {"qkv_bias": False, "attention_output_bias": False}, ["model.qkv_bias=false"]),
        ("gpt2", {"hidden_act": "silu"}, ["model.hidden_act"]),
        ("qwen3_moe", {"norm_topk_prob": False}, ["model.norm_topk_prob"]),
        ("qwen3_moe", {"num_dense_layers": 1}, ["model.moe_layers=[1, 2]"]),
        ("olmoe", {"norm_topk_prob": True}, ["model.norm_topk_prob=true"]),
        ("olmoe", {"num_key_value_heads": 2}, ["model.num_key_value_heads=2"]),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, changes: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        write(name, tmp_path, **changes)
    assert_names(refused.value, "llama.cpp", *named)
    assert not (tmp_path / "out").exists()


def test_bf16_rounds_matrices_only(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    _, model = write("llama", tmp_path, dtype=torch.bfloat16)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).tensors}
    expected = dict(model.named_parameters())["layers.1.mlp.down.weight"].detach().bfloat16()
    found = read["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == "BF16"
    bits = np.frombuffer(found.data.tobytes(), dtype=np.int16).reshape(expected.shape)
    assert np.array_equal(bits, expected.view(torch.int16).numpy())
    assert read["blk.1.ffn_norm.weight"].tensor_type.name == "F32"


def test_rows_without_a_token_are_unused() -> None:
    made = to_gguf(load_tokenizer("bytes"), 260)
    assert (len(made.tokens), len(set(made.tokens))) == (260, 260)
    assert made.kinds[256:] == [CONTROL, UNUSED, UNUSED, UNUSED]
    assert made.special == {"eos": 256}


def byte_level(folder: Path, pre: Any, **changes: Any) -> str:
    """A tokenizer.json with this pre-tokenizer, and these changes of its definition."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    definition = json.loads(made.to_str())
    definition["model"] |= changes.pop("model", {})
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(definition | changes))
    return str(path)


@pytest.mark.parametrize(
    ("pre", "changes", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {}, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_PATTERN), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            {"model": {"ignore_merges": True}},
            "llama-bpe",
        ),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            {},
            "smollm",
        ),
    ],
)
def test_the_pre_tokenizer_follows_from_the_definition(
    pre: Any, changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    made = to_gguf(load_tokenizer(byte_level(tmp_path, pre, **changes)), 310)
    assert (made.model, made.pre) == ("gpt2", name)
    assert made.merges
    assert made.kinds[made.special["eos"]] == CONTROL


@pytest.mark.parametrize(
    ("pre", "changes", "named"),
    [
        (pre_tokenizers.Whitespace(), {}, ["pre-tokenizer"]),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}, ["pre-tokenizer"]),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {"model": {"ignore_merges": True}}, ["ignore_merges"]),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {"normalizer": {"type": "Lowercase"}}, ["Lowercase"]),
    ],
)
def test_a_tokenizer_that_it_would_read_otherwise_is_refused(
    pre: Any, changes: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    spec = byte_level(tmp_path, pre, **changes)
    with pytest.raises(DataError) as refused:
        to_gguf(load_tokenizer(spec), 310)
    assert_names(refused.value, spec, *named)


def test_a_normalization_is_reported(tmp_path: Path) -> None:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert_names(to_gguf(load_tokenizer(byte_level(tmp_path, pre, normalizer={"type": "NFC"})), 310).note, "NFC")


@pytest.mark.parametrize("kind", ["unigram", "prose", "own-pieces-bpe"])
def test_a_model_that_is_cut_otherwise_is_refused(kind: str, tokenizer_files: dict[str, str]) -> None:
    with pytest.raises(DataError) as refused:
        to_gguf(load_tokenizer(tokenizer_files[kind]), 900)
    assert_names(refused.value, tokenizer_files[kind])


def converted(spec: str, folder: Path) -> Path:
    """The tokenizer.json that an export makes of it, as fine-tuning leaves it: without the `.model`."""
    folder.mkdir()
    ours = load_tokenizer(spec)
    write_tokenizer(ours, folder, longest=99, rows=ours.vocab_size, family="llama")
    return folder / "tokenizer.json"


def test_pieces_of_an_export_are_described_as_their_model(tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    path = converted(tokenizer_files["bpe"], tmp_path / "out")
    one, other = (to_gguf(load_tokenizer(str(spec)), 803) for spec in (tokenizer_files["bpe"], path))
    assert one.tokens == other.tokens
    merged = [token for token, name in enumerate(one.tokens) if one.kinds[token] == NORMAL and len(name) > 1]
    assert len(merged) > 300
    assert sorted(merged, key=lambda token: -one.scores[token]) == sorted(
        merged, key=lambda token: -other.scores[token]
    )
    assert (one.model, one.special["eos"]) == (other.model, other.special["eos"])
    definition = json.loads(path.read_text())
    merges = definition["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    first = next(rank for rank, name in enumerate(made) if made.count(name) > 1)
    apart = [*merges[:first], *merges[first + 1 :], merges[first]]  # llama.cpp has one score for both
    for wrong in (merges[1:], apart):
        path.write_text(json.dumps({**definition, "model": {**definition["model"], "merges": wrong}}))
        with pytest.raises(DataError) as refused:
            to_gguf(load_tokenizer(str(path)), 803)
        assert_names(refused.value, path, "merges")


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qk-norm", "gpt2"])
@pytest.mark.parametrize("kind", ["bpe", "bpe-json", "huggingface", "bytes"])
def test_llama_cpp_has_the_same_ids_and_logits(
    name: str, kind: str, tokenizer_files: dict[str, str], source_texts: list[str], tmp_path: Path
) -> None:
    """Where llama-cpp-python is installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    spec = str(converted(tokenizer_files["bpe"], tmp_path / "json")) if kind == "bpe-json" else tokenizer_files[kind]
    ours = load_tokenizer(spec)
    _, model = write(name, tmp_path, spec)
    theirs = opened(llama_cpp, tmp_path)
    lines = list(dict.fromkeys(line for text in source_texts for line in text.split("\n") if line))[:3000]
    lines += ["na\u00efve \U0001f600 \u4e2d\u6587", "   indented\twith tab  ", "=" * 50]
    for line, ids in zip(lines, ours.encode_batch(lines), strict=True):
        assert theirs.tokenize(line.encode(), add_bos=False, special=False) == ids.tolist(), line
    assert theirs.token_eos() == ours.eod_id
    assert_same_logits(theirs, model, ours.encode_batch([lines[0] + lines[1]])[0][:30].tolist())


def opened(llama_cpp: Any, folder: Path) -> Any:
    # Its own cache and attention are of half precision otherwise.
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    path = str(folder / "out" / GGUF_FILE)
    return llama_cpp.Llama(path, n_ctx=48, logits_all=True, verbose=False, n_threads=1, swa_full=True, **exact)


def assert_same_logits(theirs: Any, model: LanguageModel, tokens: list[int]) -> None:
    """To 1e-2: its products are of another precision."""
    theirs.eval(tokens)
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0]
    found = torch.from_numpy(np.array(theirs.scores[: len(tokens)]))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", [*(name for name in FAMILIES if name != "mistral"), "llama-3"])
def test_llama_cpp_computes_each_family(name: str, tmp_path: Path) -> None:
    """Where llama-cpp-python is installed: texts beyond windows and the positions of the first training."""
    llama_cpp = pytest.importorskip("llama_cpp")
    _, model = write(name, tmp_path)
    tokens = torch.randint(0, 257, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_same_logits(opened(llama_cpp, tmp_path), model, tokens)
