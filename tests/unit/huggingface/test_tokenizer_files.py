"""What AutoTokenizer loads from an export gives megalm's ids, on any text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megalm.data.tokenizers.chat_template import ChatTemplate
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.huggingface.export_tokenizer import SENTENCEPIECE, TOKENIZER, ExportedTokenizer, write_tokenizer
from megalm.huggingface.sentencepiece_to_tokenizer_json import NoEquivalentError, SentencePieceModel
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

KINDS = ("unigram", "bpe", "prose", "bytes", "huggingface")
UNIGRAM = ("unigram", "prose")
AWKWARD = [
    "",
    " ",
    " " * 400,
    "   indented\n\twith tab  \n\n\n",
    "a\r\nb\x0c\x00\ufeff\x1b[0m",
    "caff\u00e8 \U0001f600 \u4e2d\u6587 \u3000\u00a0\u2028",
    "\u2581 the library's \u2581\u2581own space\u2585\u2581",
    "<0x41> <0x0A><0xE2>",
    "\U0010ffff\ue000",
    "=" * 500 + "-" * 333,
]
NAMES_OF_SPECIAL = "<eod> <unk> <pad></s> x<eod>y"


@pytest.fixture(scope="session")
def exported(
    tokenizer_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Any, ExportedTokenizer, Path]]:
    """Kind -> megalm's tokenizer, what transformers loads, what was said, the folder."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        ours = load_tokenizer(tokenizer_files[kind])
        said = write_tokenizer(ours, folder, longest=99, rows=ours.vocab_size, family="llama")
        found[kind] = ours, transformers.AutoTokenizer.from_pretrained(folder), said, folder
    return found


def _same(ours: Any, theirs: Any, model: SentencePieceModel | None, texts: Sequence[str]) -> int:
    """How many have the same ids; of a unigram model another cut of the same likelihood is told from a wrong one."""
    same = 0
    read = theirs(texts, split_special_tokens=True)["input_ids"]
    for text, ids, found in zip(texts, ours.encode_batch(texts), read, strict=True):
        expected = ids.tolist()
        assert theirs.decode(expected) == ours.decode(expected) == text
        same += found == expected
        assert found == expected or (model is not None and model.are_equally_likely(found, expected)), text
    return same


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same(kind: str, exported: dict[str, Any], source_texts: list[str]) -> None:
    ours, theirs, said, folder = exported[kind]
    model = SentencePieceModel(folder / SENTENCEPIECE) if kind in UNIGRAM else None
    lines = dict.fromkeys(line for text in source_texts for line in text.split("\n"))
    texts = [*AWKWARD, *source_texts, *lines]
    texts += [NAMES_OF_SPECIAL] if kind != "huggingface" else []  # there they are read as these tokens by megalm, too
    equal = _same(ours, theirs, model, texts)
    assert equal == len(texts) if model is None else equal > 0.99 * len(texts)
    alike, tried = (int(number) for number in re.findall(r"\d+", said.note)[:2])
    assert 0.9 * tried < alike <= tried
    assert model is not None or alike == tried
    assert (SENTENCEPIECE in said.note) == (model is not None), "whose ids are right in case of doubt"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_ids_are_the_same_on_any_text(text: str, exported: dict[str, Any]) -> None:
    for kind in ("bpe", "bytes", *UNIGRAM):
        ours, theirs, _, folder = exported[kind]
        model = SentencePieceModel(folder / SENTENCEPIECE) if kind in UNIGRAM else None
        _same(ours, theirs, model, [text])


@pytest.mark.parametrize(("end", "told"), [("{{ eos_token }}", False), ("{{ eos_token }}\n", False), ("", True)])
def test_a_chat_template_that_ends_no_turn_is_reported(end: str, told: bool, tmp_path: Path) -> None:
    template = ChatTemplate(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    said = write_tokenizer(load_tokenizer("bytes"), tmp_path, longest=99, rows=257, family="gpt2", template=template)
    assert ("<eod>" in said.note) == told
    assert ("learn to stop" in said.note) == told


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind: str, exported: dict[str, Any]) -> None:
    ours, theirs, said, folder = exported[kind]
    assert theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 99
    assert theirs.pad_token == {"unigram": "<pad>", "bpe": "<unk>", "prose": "<unk>"}.get(kind)
    assert said.special.get("pad_token") == theirs.pad_token_id != theirs.eos_token_id
    assert said.special["eos_token"] == ours.eod_id
    (row,) = ours.encode_batch(["a b"])
    assert theirs.decode([*row, ours.eod_id], skip_special_tokens=True) == "a b"
    assert load_tokenizer(folder / TOKENIZER).eod_id == ours.eod_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_can_end_a_document(kind: str, exported: dict[str, Any]) -> None:
    """As fine-tuning writes it: with letters instead, a model would never learn to stop."""
    ours, theirs, _, _ = exported[kind]
    read = theirs(f"a b{theirs.eos_token}")
    assert read["input_ids"][-1] == ours.eod_id
    assert set(read) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", KINDS)
def test_converters_learn_that_no_space_comes_before_a_text(kind: str, exported: dict[str, Any]) -> None:
    """Where it is missing, llama.cpp's adds one, and every text has other ids."""
    config = json.loads((exported[kind][3] / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False
    assert config["add_bos_token"] is False


def test_a_row_without_a_token_becomes_the_padding(tmp_path: Path) -> None:
    ours = load_tokenizer("bytes")
    said = write_tokenizer(ours, tmp_path, longest=10, rows=300, family="llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == said.special["pad_token"] == ours.vocab_size == 257
    assert theirs(["a", "bcd"], padding=True)["input_ids"] == [[97, 257, 257], [98, 99, 100]]


def test_what_was_read_is_amended(tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(Path(tokenizer_files["huggingface"]).parent, own)
    read = json.loads((own / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    read |= {"chat_template": template, "a_fact": 7, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    (own / "tokenizer_config.json").write_text(json.dumps(read))
    out = tmp_path / "out"
    out.mkdir()
    ours = load_tokenizer(own / "tokenizer.json")
    said = write_tokenizer(ours, out, longest=10, rows=600, family="llama")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["a_fact"] == 7
    assert written["add_bos_token"] is False  # training adds none
    assert said.has_chat_template
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.bos_token == "<|begin|>"
    chat = theirs.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    assert chat == "a b<|endoftext|>"
    assert theirs(chat)["input_ids"] == [*ours.encode_batch(["a b"])[0].tolist(), ours.eod_id]


@pytest.mark.parametrize(
    ("kind", "family", "name"),
    [
        ("bpe", "llama", "tokenizer.model"),
        ("bpe", "qwen3", SENTENCEPIECE),
        ("unigram", "llama", SENTENCEPIECE),
    ],
)
def test_only_what_converters_read_right_has_the_name_that_they_look_for(
    kind: str, family: str, name: str, tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    """Of the others llama.cpp's would make other ids, and say nothing."""
    write_tokenizer(load_tokenizer(tokenizer_files[kind]), tmp_path, longest=10, rows=800, family=family)
    assert [path.name for path in tmp_path.glob("*.model")] == [name]


def test_a_tokenizer_that_changes_the_text_is_not_written_wrong(tmp_path: Path) -> None:
    """SentencePiece's own defaults: a normaliser, a space before the text, no bytes."""
    (tmp_path / "words.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "plain"), vocab_size=18, minloglevel=2
    )
    out = tmp_path / "out"
    out.mkdir()
    ours = load_tokenizer(tmp_path / "plain.model", bos_token="<s>")
    said = write_tokenizer(ours, out, longest=10, rows=18, family="llama")
    assert TOKENIZER not in said.files
    assert said.files == (SENTENCEPIECE,) == tuple(path.name for path in out.iterdir())
    assert_names(said.note, TOKENIZER, SENTENCEPIECE, "<s>", ours.bos_id)
    assert said.special == {"bos_token": ours.bos_id}


def test_wrong_ids_are_found_before_they_are_written(
    tokenizer_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison looks at real ids: with the merges in another order there are others."""
    right = SentencePieceModel.to_tokenizer

    def wrong(self: SentencePieceModel) -> Any:
        made = right(self)
        content = json.loads(made.to_str())
        content["model"]["merges"].reverse()
        return type(made).from_str(json.dumps(content))

    monkeypatch.setattr(SentencePieceModel, "to_tokenizer", wrong)
    said = write_tokenizer(load_tokenizer(tokenizer_files["bpe"]), tmp_path, longest=10, rows=800, family="llama")
    assert_names(said.note, TOKENIZER, SENTENCEPIECE)
    assert [path.name for path in tmp_path.iterdir()] == [SENTENCEPIECE]


def test_equally_likely_is_no_excuse(tokenizer_files: dict[str, str]) -> None:
    model = SentencePieceModel(tokenizer_files["unigram"])
    ours = load_tokenizer(tokenizer_files["unigram"])
    row = ours.encode_batch(["    return self.value"])[0].tolist()
    letters = [int(token) for letter in "    return self.value" for token in ours.encode_batch([letter])[0]]
    assert ours.decode(letters) == ours.decode(row)
    assert model.are_equally_likely(row, row[::-1])
    assert not model.are_equally_likely(row, letters)
    assert not SentencePieceModel(tokenizer_files["bpe"]).are_equally_likely(row, row)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_pieces_of_a_person_have_no_equivalent(model_type: str, tokenizer_files: dict[str, str]) -> None:
    """SentencePiece cuts a text at them first, whatever is likelier; the other library does not."""
    with pytest.raises(NoEquivalentError):
        SentencePieceModel(tokenizer_files[f"own-pieces-{model_type}"]).to_tokenizer()


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("trainer_spec", "model_type", 3),  # whole words
        ("normalizer_spec", "add_dummy_prefix", True),
        ("normalizer_spec", "remove_extra_whitespaces", True),
        ("normalizer_spec", "precompiled_charsmap", b"any"),
        ("trainer_spec", "byte_fallback", False),
    ],
)
def test_one_setting_is_enough_to_have_no_equivalent(
    section: str, setting: str, value: object, tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(Path(tokenizer_files["unigram"]).read_bytes())
    setattr(getattr(model, section), setting, value)
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    with pytest.raises(NoEquivalentError):
        SentencePieceModel(tmp_path / "other.model").to_tokenizer()
