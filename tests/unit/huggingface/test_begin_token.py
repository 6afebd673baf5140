"""A model whose documents begin with a token, published and taken over: transformers puts it there too, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import read_manifest
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.gguf.export_gguf import GGUF_FILE, check_gguf, export_gguf
from megalm.huggingface.export_model import export_checkpoint, plan_export
from megalm.huggingface.import_model import import_model
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.inference.inference_model import InferenceModel, read_facts
from megalm.inference.text_eval import TextTask, read_text
from tests.huggingface_models import SECTIONS, random_model, save_model
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

TEXTS = ["def f(x):", " \u4e2d\u00e8 ", "a\n b"]
# Kind of tokenizer -> a token; what ends a document may begin the next, as GPT-2's does.
BEGINS = {"huggingface": "<|begin|>", "bpe": "<eod>", "unigram": "<pad>", "bytes": "<eod>"}


def nothing() -> None:
    """Nobody watches."""


def checkpoint_of(folder: Path, spec: str, bos_id: int | None, name: str = "llama-gqa-tied") -> Path:
    rows = load_tokenizer(spec).vocab_size
    section = SECTIONS[name].model_copy(update={"vocab_size": rows})
    shape, model = random_model(section, vocab_size=rows)
    facts: dict[str, Any] = {"bos_id": bos_id, "data": {"data.sequence_length": 40}}
    return save_model(folder / "run" / "checkpoints", shape, model, spec, **facts)


def publish(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Export it; return what its JSON files hold, by their names."""
    plan = plan_export(CheckpointReader(checkpoint), target, torch.float32, None)
    export_checkpoint(plan, 1 << 40, "a name", nothing)
    return {path.stem: json.loads(path.read_text()) for path in target.glob("*.json")}


@pytest.mark.parametrize("kind", BEGINS)
def test_transformers_has_the_ids_and_the_loss_of_what_is_evaluated(
    kind: str, tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    begun = load_tokenizer(tokenizer_files[kind], bos_token=BEGINS[kind])
    checkpoint = checkpoint_of(tmp_path, tokenizer_files[kind], begun.bos_id)
    files = publish(checkpoint, tmp_path / "out")
    assert files["tokenizer_config"]["add_bos_token"] is True
    assert files["tokenizer_config"]["bos_token"] == BEGINS[kind]
    assert files["config"]["bos_token_id"] == files["generation_config"]["bos_token_id"] == begun.bos_id
    assert f"(id {begun.bos_id})" in (tmp_path / "out" / "README.md").read_text()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = InferenceModel(checkpoint)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = read_text(str(tmp_path / "texts.jsonl"), ours.facts)
    total = 0.0
    for text, window in zip(TEXTS, found.sequences, strict=True):
        ids = torch.tensor([theirs(text)["input_ids"]])
        assert ids[0].tolist() == window.tokens.tolist()
        assert ids[0, 0] == begun.bos_id
        with torch.no_grad():
            total += float(network(ids, labels=ids).loss) * window.targets
            torch.testing.assert_close(network(ids).logits, ours.network(ids), atol=1e-5, rtol=1e-5)
    (row,) = TextTask([found], ours.tokenizer.token_bytes(), 2).rows(ours, nothing)
    assert row["loss"] == pytest.approx(total / row["targets"], abs=1e-5)
    assert theirs("a", "b")["input_ids"].count(begun.bos_id) == 2
    chat = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    made = theirs.apply_chat_template([{"role": "user", "content": "a"}], chat_template=chat, return_dict=False)
    assert made == theirs("a")["input_ids"], "once"


@pytest.mark.parametrize("kind", ["huggingface", "unigram"])
def test_an_import_keeps_it(kind: str, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """As the folder's tokenizer does it, so that data are built with it by default; and the export has it again."""
    bos_id = load_tokenizer(tokenizer_files[kind], bos_token=BEGINS[kind]).bos_id
    first = publish(checkpoint_of(tmp_path, tokenizer_files[kind], bos_id), tmp_path / "out")
    made = import_model(HuggingFaceFolder(tmp_path / "out"), tmp_path / "back", None, nothing)
    assert made.tokenizer.bos_id == read_manifest(made.checkpoint).bos_id == bos_id
    assert not any(BEGINS[kind] in note for note in made.notes)
    assert load_tokenizer(made.tokenizer.spec, bos_token="auto").bos_id == bos_id
    assert read_facts(tmp_path / "out").tokenizer.bos_id == read_facts(made.checkpoint).tokenizer.bos_id == bos_id
    again = publish(made.checkpoint, tmp_path / "twice")
    for name in ("config", "generation_config", "tokenizer_config", "tokenizer"):
        assert again[name] == first[name]


def test_another_tokenizer_without_one_is_reported(tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    publish(checkpoint_of(tmp_path, tokenizer_files["huggingface"], 0), tmp_path / "out")
    other = Path(tokenizer_files["bpe"])
    made = import_model(HuggingFaceFolder(tmp_path / "out"), tmp_path / "back", other, nothing)
    assert made.tokenizer.bos_id is None
    (note,) = (note for note in made.notes if "--bos-token" in note)
    assert_names(note, BEGINS["huggingface"], other.name)


def test_without_one_none_is_put_before_a_text(tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """Also where the files of the run's tokenizer do it themselves."""
    files = publish(checkpoint_of(tmp_path, tokenizer_files["huggingface"], None), tmp_path / "out")
    assert files["tokenizer_config"]["add_bos_token"] is False
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    (ids,) = load_tokenizer(tokenizer_files["huggingface"]).encode_batch(["a b"])
    assert theirs("a b")["input_ids"] == ids.tolist()
    assert read_facts(tmp_path / "out").tokenizer.bos_id is None


@pytest.mark.parametrize("kind", ["huggingface", "bytes"])
def test_a_gguf_file_says_so(kind: str, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for bos_id in (load_tokenizer(tokenizer_files[kind], bos_token=BEGINS[kind]).bos_id, None):
        folder = tmp_path / str(bos_id)
        checkpoint = checkpoint_of(folder, tokenizer_files[kind], bos_id)
        plan = plan_export(CheckpointReader(checkpoint), folder / "out", torch.float32, None)
        export_gguf(plan, check_gguf(plan), "a name", nothing)
        read = gguf.GGUFReader(folder / "out" / GGUF_FILE).fields
        assert read["tokenizer.ggml.add_bos_token"].contents() == (bos_id is not None)
        if bos_id is not None:
            assert read["tokenizer.ggml.bos_token_id"].contents() == bos_id
