"""A model imported with other tokens: rows follow what tokens stand for, and the logits of old tokens stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.config.schema import ModelSection
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import DataError
from megalm.huggingface.export_model import export_checkpoint, plan_export
from megalm.huggingface.import_model import Imported, import_model
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.huggingface.vocabulary_change import NewRows
from tests.huggingface_models import SECTIONS, SIZES, random_model, save_model
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

ADDED = ["<tool>", "naïve 東京", " two words"]
TEXT = "a <tool>call</tool> naïve 東京! or two words"


def nothing() -> None:
    """Nobody watches."""


def export(checkpoint: Path, target: Path) -> Path:
    export_checkpoint(plan_export(CheckpointReader(checkpoint), target, torch.float32, None), 1 << 40, "one", nothing)
    return target


def saved(folder: Path, section: ModelSection, tokenizer: str = "bytes") -> Path:
    """A model in Hugging Face format with its tokenizer."""
    shape, model = random_model(section, load_tokenizer(tokenizer).vocab_size)
    return export(save_model(folder / "run" / "checkpoints", shape, model, tokenizer), folder / "hf")


def import_(
    source: Path, target: Path, tokenizer: Path | None = None, rule: str | None = None, **more: Any
) -> Imported:
    rows = None if rule is None else NewRows(rule)
    return import_model(HuggingFaceFolder(source), target, tokenizer, nothing, new_rows=rows, **more)


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits  # type: ignore[no-any-return]


def listed(path: Path, tokens: list[str]) -> Path:
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "rule"), [("llama", None), ("llama-gqa-tied", "zero"), ("gpt2", "copy:a"), ("gpt2-untied", None)]
)
def test_added_tokens_leave_the_old_ones_as_they_are(tmp_path: Path, name: str, rule: str | None) -> None:
    source = saved(tmp_path, SECTIONS[name])
    made = import_(source, tmp_path / "new", rule=rule, add_tokens=listed(tmp_path / "more.txt", ADDED))
    assert (made.tokenizer.vocab_size, made.shape.vocab_size) == (260, 260)
    assert_names(made.notes[0], 260, 257, 3, "'<tool>'")
    again = export(made.checkpoint, tmp_path / "again")
    ids = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(1))
    before, after = logits_of(source, ids), logits_of(again, ids)
    assert (after[..., :257] - before).abs().max() <= 1e-6
    reader, old = CheckpointReader(made.checkpoint), HuggingFaceFolder(source)
    untied = [] if made.shape.tie_word_embeddings else ["head.weight"]
    for part in ["embedding.tokens.weight", *untied]:
        rows, whole = reader.read_finite(part, made.shape.parameters()[part]), old.read(part)
        assert torch.equal(rows[:257], whole)
        expected = {None: whole.double().mean(0).float(), "zero": torch.zeros_like(whole[0]), "copy:a": whole[97]}[rule]
        assert torch.equal(rows[257:], expected.expand(3, -1))
    # The tokenizer reads and writes them, here and in transformers, before and after an export.
    ours = made.tokenizer.encode_batch([TEXT])[0].tolist()
    assert [token for token in ours if token >= 257] == [257, 258, 259]
    assert made.tokenizer.decode(ours) == TEXT
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    assert theirs(TEXT)["input_ids"] == ours
    assert theirs.decode(ours) == TEXT


def test_padded_rows_are_used_first_and_rows_stay_a_multiple(tmp_path: Path) -> None:
    source = saved(tmp_path, ModelSection(vocab_size=260, **SIZES))
    whole = HuggingFaceFolder(source).read("embedding.tokens.weight")
    first = 258  # its padding is the 257th
    for number, size in ((1, 260), (2, 260), (3, 264)):
        tokens = listed(tmp_path / "more.txt", [f"<{place}>" for place in range(number)])
        made = import_(source, tmp_path / f"new{number}", rule="zero", add_tokens=tokens)
        assert made.shape.vocab_size == size
        rows = CheckpointReader(made.checkpoint).read_finite("embedding.tokens.weight", (size, 32))
        assert not rows[first : first + number].any()
        assert torch.equal(rows[:first], whole[:first])
        assert torch.equal(rows[first + number : 260], whole[first + number :])
        # Of no token: as likely as others, whatever new rows are.
        rest = rows[max(260, first + number) :]
        assert torch.equal(rest, whole[:first].double().mean(0).float().expand(len(rest), -1))


@pytest.mark.parametrize(("old", "new"), [("unigram", "huggingface"), ("huggingface", "bpe"), ("bpe", "bytes-json")])
def test_another_tokenizer_takes_rows_by_what_tokens_stand_for(
    tmp_path: Path, tokenizer_files: dict[str, str], old: str, new: str
) -> None:
    if new == "bytes-json":
        other = saved(tmp_path / "bytes", SECTIONS["gpt2"]) / "tokenizer.json"
    else:
        other = Path(tokenizer_files[new])
    source = saved(tmp_path, SECTIONS["llama"], tokenizer_files[old])
    made = import_(source, tmp_path / "new", other, rule="zero")
    theirs, ours = load_tokenizer(tokenizer_files[old]), load_tokenizer(other)
    whole = HuggingFaceFolder(source).read("head.weight")
    rows = CheckpointReader(made.checkpoint).read_finite("head.weight", (made.shape.vocab_size, 32))
    old_contents = theirs.token_contents()
    by_bytes: dict[bytes, list[int]] = {}
    for token, (_, content) in old_contents.items():
        by_bytes.setdefault(content, []).append(token)
    copied = 0
    for token, (kind, content) in ours.token_contents().items():
        candidates = by_bytes.get(content, [])
        if not candidates:
            assert not rows[token].any(), content
            continue
        copied += 1
        same_kind = [row for row in candidates if old_contents[row].kind == kind] or candidates
        assert any(torch.equal(rows[token], whole[row]) for row in same_kind), content
    assert copied > 200
    count = int(ours.known_ids().sum())
    assert_names(made.notes[0], count, copied, count - copied)
    assert made.shape.vocab_size % np.gcd(theirs.vocab_size, 128) == 0
    # Spaces are written in other ways, and mean the same.
    spaces = {"unigram": "▁the", "bpe": "▁the", "huggingface": "Ġthe"}
    if new in spaces:
        row, there = (t.vocabulary()[spaces[k]] for t, k in ((ours, new), (theirs, old)))
        assert torch.equal(rows[row], whole[there])


def test_the_models_own_tokenizer_under_another_path_changes_nothing(
    tmp_path: Path, tokenizer_files: dict[str, str]
) -> None:
    source = saved(tmp_path, SECTIONS["llama"], tokenizer_files["bpe"])
    for number, path in enumerate((Path(tokenizer_files["bpe"]), source / "tokenizer.json")):
        made = import_(source, tmp_path / f"new{number}", path)
        assert made.notes == ()
        rows = CheckpointReader(made.checkpoint).read_finite("head.weight", (made.shape.vocab_size, 32))
        assert torch.equal(rows, HuggingFaceFolder(source).read("head.weight"))


@pytest.mark.parametrize("kind", ["unigram", "bpe", "huggingface"])
def test_tokens_added_to_each_kind_of_tokenizer(tmp_path: Path, tokenizer_files: dict[str, str], kind: str) -> None:
    source = saved(tmp_path, SECTIONS["llama"], tokenizer_files[kind])
    old = load_tokenizer(tokenizer_files[kind])
    file = tmp_path / "more.json"
    file.write_text(
        json.dumps([*ADDED, {"content": "<|endoftext|>" if kind != "huggingface" else "<|user|>", "special": True}])
    )
    made = import_(source, tmp_path / "new", add_tokens=file)
    ids = made.tokenizer.encode_batch([TEXT])[0].tolist()
    assert [token - old.vocab_size for token in ids if token >= old.vocab_size] == [0, 1, 2]
    assert made.tokenizer.decode(ids) == TEXT
    assert made.tokenizer.eod_id == old.eod_id, "a name that usually ends documents changes nothing"
    (plain,) = made.tokenizer.encode_batch(["<|endoftext|><|user|>"])
    assert plain.max() < old.vocab_size, "the name of a special token in a text is text"
    sample = "def main(self):\n    return None"
    assert made.tokenizer.encode_batch([sample])[0].tolist() == old.encode_batch([sample])[0].tolist()
    again = export(made.checkpoint, tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(again)(TEXT)["input_ids"] == ids


def test_what_cannot_be_added_is_refused(tmp_path: Path, tokenizer_files: dict[str, str]) -> None:
    source = saved(tmp_path, SECTIONS["gpt2"], tokenizer_files["huggingface"])
    file = tmp_path / "more.txt"

    def refused(tokens: list[str], *names: object, rule: str | None = None, tokenizer: Path | None = None) -> None:
        with pytest.raises(DataError) as error:
            import_(source, tmp_path / "new", tokenizer, rule, add_tokens=listed(file, tokens))
        assert_names(error.value, *names)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()

    refused([], "--add-tokens", file)
    refused(["<a>", "<b>", "<a>"], "--add-tokens", file, "'<a>'")
    refused(["<a>", "Ġthe"], "'Ġthe'")
    refused(["<a>", " the"], "' the'")
    refused(["<a>"], "--new-rows", "copy:nothing", rule="copy:nothing")
    with pytest.raises(DataError) as error:
        import_(source, tmp_path / "new", rule="zero")
    assert_names(error.value, "--new-rows", "zero", "--add-tokens")
    with pytest.raises(DataError) as error:
        NewRows("median")
    assert_names(error.value, "--new-rows", "median")
    with pytest.raises(DataError) as error:
        import_(source, tmp_path / "new", add_tokens=tmp_path / "missing.txt")
    assert_names(error.value, "--add-tokens", tmp_path / "missing.txt")
    for content in ('{"a": 1}', '[{"content": "<a>", "lstrip": true}]', '["<a>", ""]'):
        (tmp_path / "more.json").write_text(content)
        with pytest.raises(DataError) as error:
            import_(source, tmp_path / "new", add_tokens=tmp_path / "more.json")
        assert_names(error.value, "--add-tokens", tmp_path / "more.json")
    for kind in ("own-pieces-unigram",):  # a SentencePiece model without an equal tokenizer.json
        other = Path(tokenizer_files[kind])
        refused(["<a>"], other, "--tokenizer", tokenizer=other)
    shutil.rmtree(tmp_path / "run")


def test_a_token_that_the_decoder_reads_otherwise_is_refused(tmp_path: Path, tokenizer_files: dict[str, str]) -> None:
    """A byte-level decoder takes the characters of its alphabet for bytes."""
    source = saved(tmp_path, SECTIONS["gpt2"], tokenizer_files["huggingface"])
    with pytest.raises(DataError) as error:
        import_(source, tmp_path / "new", add_tokens=listed(tmp_path / "more.txt", ["café"]))
    assert_names(error.value, "'café'")
