"""Tokenizers: exact on every text, the same bytes from the same input, honest about bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.tokenizers import sentencepiece_tokenizer
from megalm.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, describe_ends, load_tokenizer
from megalm.data.tokenizers.training import (
    SENTENCE_CHARACTERS,
    TokenizerReport,
    draw_sentences,
    split_sentences,
    train_tokenizer,
)
from megalm.errors import DataError
from tests.messages import assert_names

AWKWARD = [
    "",
    " ",
    "   indented\n\twith tab  \n\n\n",
    "a\r\nb\x0c\x00\ufeff",
    "café 😀 中文 \u3000\u00a0\u2028",
    "\u2581 the library's \u2581\u2581own space\u2585",
    "<eod> <unk> <0x41> </s> <|endoftext|>",
    "\U0010ffff\ue000",
]


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> Tokenizer:
    return load_tokenizer(model_path)


@pytest.fixture(params=["sentencepiece", "huggingface", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, source_texts: list[str]) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(request.getfixturevalue("model_path"))
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(byte_level_json(tmp_path, source_texts))


def byte_level_json(folder: Path, texts: list[str]) -> Path:
    """A tokenizer as GPT-2's: byte-level BPE."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts[:1], trainer)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def words_json(folder: Path) -> Path:
    """A tokenizer of two words that cannot encode any other."""
    vocabulary = {"<eod>": 0, "some": 1, "words": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = folder / "words.json"
    made.save(str(path))
    return path


def test_every_text_comes_back(tokenizer: Tokenizer, source_texts: list[str]) -> None:
    texts = [*AWKWARD, *source_texts]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert max(max(row, default=0) for row in rows) < tokenizer.vocab_size
    assert all(tokenizer.eod_id not in row for row in rows)


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer, source_texts: list[str]) -> None:
    texts = [*AWKWARD, *source_texts]
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.eod_id] == 0
    for text, row in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert int(sizes[np.array(row, dtype=np.int64)].sum()) == len(text.encode()), text[:40]


def test_control_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode_batch(["a b"])
    assert tokenizer.decode([*row, tokenizer.eod_id]) == "a b"


@given(text=st.text())
@settings(max_examples=200)
def test_any_text_comes_back(loaded: Tokenizer, text: str) -> None:
    assert loaded.decode(loaded.encode_batch([text])[0]) == text


def test_training_again_gives_the_same_bytes(model_path: Path, tmp_path: Path, source_texts: list[str]) -> None:
    report = train_tokenizer(iter(source_texts), tmp_path / "again.model", vocab_size=600)
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()
    assert report.documents == len(source_texts)
    assert report.sentences_used == report.sentences
    assert json.loads((tmp_path / "again.model.json").read_bytes())["threads"] == report.threads
    assert str(tmp_path).encode() not in model_path.read_bytes()


def test_pieces_of_the_trained_tokenizer(model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.vocab_size == 600
    assert tokenizer.eod_id == 1
    newline, tab = tokenizer.encode_batch(["\n", "\t"])
    assert (len(newline), len(tab)) == (1, 1)
    (indented,) = tokenizer.encode_batch(["        return"])
    assert len(indented) < 4  # runs of spaces are pieces


def test_digits_stay_single_however_frequent_a_number_is(tmp_path: Path, source_texts: list[str]) -> None:
    train_tokenizer([source_texts[1] + "\nin 2024" * 5000], tmp_path / "digits.model", vocab_size=500)
    tokenizer = load_tokenizer(tmp_path / "digits.model")
    (row,) = tokenizer.encode_batch(["in 2024"])
    assert [tokenizer.decode([token]) for token in row][-4:] == ["2", "0", "2", "4"]


def test_fingerprint_is_of_the_pieces_not_of_the_path(
    model_path: Path, tmp_path: Path, source_texts: list[str]
) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(model_path.read_bytes())
    train_tokenizer(source_texts[:1], tmp_path / "other.model", vocab_size=600)
    fingerprints = [load_tokenizer(path).fingerprint for path in (model_path, copy, tmp_path / "other.model")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_sentences_lose_nothing_but_the_breaks() -> None:
    text = "short\n\n\tx" + "y" * (2 * SENTENCE_CHARACTERS + 5) + "\u2581end"
    parts = list(split_sentences(text))
    assert max(map(len, parts)) <= SENTENCE_CHARACTERS
    assert "".join(parts) == text.translate({ord(mark): None for mark in "\n\t\0\u2581\u2585"})


def test_trains_on_a_line_without_end(tmp_path: Path, source_texts: list[str]) -> None:
    line = source_texts[0].replace("\n", " ")
    train_tokenizer([line], tmp_path / "long.model", vocab_size=500)
    (row,) = load_tokenizer(tmp_path / "long.model").encode_batch([line])
    assert len(row) < len(line) / 2


def test_special_tokens_are_never_text(tmp_path: Path, source_texts: list[str]) -> None:
    said: list[str] = []
    path = tmp_path / "special.model"
    report = train_tokenizer(source_texts, path, 500, special_tokens=["<pad>", "<user>"], progress=said.append)
    assert report.special_tokens == ["<pad>", "<user>"]
    assert_names(said[-1], 500)
    tokenizer = load_tokenizer(path)
    (row,) = tokenizer.encode_batch(["<user> says <pad>"])
    assert not {2, 3} & set(row)
    assert tokenizer.decode([2, *row, 3]) == "<user> says <pad>"
    for wrong in (["<eod>"], ["<a>", "<a>"], [""]):
        with pytest.raises(DataError) as error:
            train_tokenizer(source_texts, path, 500, special_tokens=wrong)
        assert_names(error.value, wrong, "<eod>", "<unk>")


def test_long_lines_are_counted(tmp_path: Path, source_texts: list[str]) -> None:
    long = source_texts[0].replace("\n", " ")
    report = train_tokenizer([source_texts[1], long], tmp_path / "x.model", 500)
    assert report.cut_sentences == len(long.replace("\t", "")) // SENTENCE_CHARACTERS


def test_long_texts_are_encoded_in_parts(
    model_path: Path, source_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(model_path)
    text = "\n".join(source_texts)
    (whole,) = tokenizer.encode_batch([text])
    monkeypatch.setattr(sentencepiece_tokenizer, "LONGEST_TEXT", 5_000)
    (parts,) = tokenizer.encode_batch([text])
    assert abs(len(parts) - len(whole)) < 20
    assert tokenizer.decode(parts.tolist()) == text
    assert tokenizer.is_exact(text, parts)
    assert not tokenizer.is_exact(text, parts[:-1])


def test_a_tokenizer_that_changes_text_is_found_out(tmp_path: Path, source_texts: list[str]) -> None:
    """A model as others train them: it lowers case and adds a space, which the length of the text may hide."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source_texts[0].splitlines()),
        model_prefix=str(tmp_path / "other"),
        vocab_size=500,
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "other.model")
    texts = ["lower case", "Upper Case", "two  spaces"]
    rows = tokenizer.encode_batch(texts)
    exact = [tokenizer.is_exact(text, row) for text, row in zip(texts, rows, strict=True)]
    assert exact == [True, False, False]


def test_draws_lines_evenly_and_in_their_order() -> None:
    report = TokenizerReport(500, "bpe", [], threads=1)
    texts = ["\n".join(f"{number:04}" for number in range(start, start + 500)) for start in (0, 500)]
    drawn = draw_sentences(texts, 100, report)
    assert (report.documents, report.sentences, report.sentences_used, len(drawn)) == (2, 1000, 100, 100)
    assert drawn == sorted(set(drawn))
    assert 30 < sum(line < "0500" for line in drawn) < 70


def test_a_vocabulary_too_large_names_the_largest(tmp_path: Path, source_texts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        train_tokenizer(source_texts[:1], tmp_path / "x.model", vocab_size=60_000)
    said = str(error.value).replace(str(tmp_path), "").replace(",", "")
    asked, largest = (int(number) for number in re.findall(r"\d+", said))
    assert asked == 60_000
    train_tokenizer(source_texts[:1], tmp_path / "x.model", vocab_size=largest)
    assert load_tokenizer(tmp_path / "x.model").vocab_size == largest


def test_training_refuses_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\b26\d\b") as error:
        train_tokenizer(["some text"], tmp_path / "x.model", vocab_size=200)
    assert_names(error.value, tmp_path / "x.model", 200)
    with pytest.raises(DataError) as error:
        train_tokenizer(["", "\n"], tmp_path / "x.model", vocab_size=300)
    assert_names(error.value, tmp_path / "x.model", 2)
    with pytest.raises(DataError) as error:
        train_tokenizer(["text"], tmp_path / "x.model", vocab_size=300, model_type="wordpiece")  # type: ignore[arg-type]
    assert_names(error.value, "'wordpiece'", "unigram", "bpe")
    assert not list(tmp_path.iterdir())


def test_loading_refuses_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    (tmp_path / "x.json").write_text('{"a": 1}')
    (tmp_path / "y.json").write_text("{")
    for name in ("none.model", "x.model", "x.json", "y.json"):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            load_tokenizer(tmp_path / name)


def test_huggingface_end_of_document(tmp_path: Path, source_texts: list[str]) -> None:
    path = byte_level_json(tmp_path, source_texts)
    assert load_tokenizer(tmp_path).eod_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "!"}}')
    assert load_tokenizer(path).eod_id == tokenizers.Tokenizer.from_file(str(path)).token_to_id("!")
    definition = json.loads(path.read_text())
    definition["added_tokens"] = []
    del definition["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer_config.json").unlink()
    path.write_text(json.dumps(definition))
    with pytest.raises(DataError) as error:
        _ = load_tokenizer(path).eod_id
    assert_names(error.value, path, "--eod-token", "data.eod_token")


def test_bytes_tokenizer_ids() -> None:
    (row,) = ByteTokenizer().encode_batch(["hé"])
    assert row.tolist() == [104, 195, 169]
    assert ByteTokenizer().decode([104, 195]) == "h\ufffd"


def changed_json(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    definition = json.loads(path.read_text())
    change(definition)
    path.write_text(json.dumps(definition))
    return path


def test_dropout_of_a_tokenizer_is_switched_off(tmp_path: Path, source_texts: list[str]) -> None:
    path = byte_level_json(tmp_path, source_texts)
    plain = load_tokenizer(path).encode_batch(source_texts)[0].tolist()
    changed_json(path, lambda definition: definition["model"].update(dropout=0.5))
    dropped = load_tokenizer(path)
    again = [dropped.encode_batch(source_texts)[0].tolist() for _ in range(2)]
    assert again == [plain, plain]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ('{"model": ' + '{"a": ' * 3000 + "1" + "}" * 3001, ()),
        ('{"hello": 0, "world": 1}', ("AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",)),
        ('{"version": "1.0"}', ("model",)),
        ("[]", ("model",)),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ("git lfs pull",)),
    ],
)
def test_a_json_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str, names: tuple[str, ...]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError) as refused:
        load_tokenizer(path)
    assert_names(refused.value, path, *names)
    assert "\n" not in str(refused.value)


def test_a_file_of_tiktoken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cl100k.tiktoken"
    path.write_text("IQ== 0\n")
    with pytest.raises(DataError) as refused:
        load_tokenizer(path)
    assert_names(refused.value, path, "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)")


@pytest.mark.parametrize("hostile", ["id", "regex"])
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, source_texts: list[str], hostile: str) -> None:
    def change(definition: dict[str, Any]) -> None:
        if hostile == "id":
            definition["model"]["vocab"]["far"] = 4_000_000_000
        else:
            pattern = {"type": "Split", "pattern": {"Regex": "(?<=a{1,99}[)"}, "behavior": "Isolated", "invert": False}
            definition["pre_tokenizer"] = pattern

    path = changed_json(byte_level_json(tmp_path, source_texts), change)
    with pytest.raises(DataError) as refused:
        load_tokenizer(path)
    assert_names(refused.value, path)


def test_several_ends_of_a_document_are_reported(
    tmp_path: Path, source_texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = byte_level_json(tmp_path, source_texts)
    found = tokenizers.Tokenizer.from_file(str(path))
    found.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
    found.save(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    loaded = load_tokenizer(path)
    assert loaded.eod_id == found.token_to_id("<|im_end|>")
    assert_names(caplog.text, "<|im_end|>", "<|endoftext|>", "--eod-token", "data.eod_token")
    assert_names(describe_ends(loaded), "<|im_end|>", loaded.eod_id, "tokenizer_config.json")
    caplog.clear()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert load_tokenizer(path).eod_id == found.token_to_id("<|endoftext|>")
    assert "<|im_end|>" not in caplog.text


def test_the_chosen_end_of_a_document(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    own, text = tokenizer.eod_id, tokenizer.eod_token
    assert not tokenizer.eod_is_chosen
    chosen = load_tokenizer(tokenizer.spec, text)
    assert (chosen.eod_id, chosen.eod_token, chosen.eod_is_chosen) == (own, text, True)
    assert not caplog.records
    assert chosen.with_eod(own - 1 if own else own + 1).eod_id != own
    assert (chosen.eod_id, chosen.fingerprint) == (own, tokenizer.fingerprint)
    wrong = f"{text[:-1]} {text[-1]}"
    for eod in (wrong, tokenizer.vocab_size, -1):
        with pytest.raises(DataError) as refused:
            tokenizer.with_eod(eod)
        assert_names(refused.value, tokenizer.spec, repr(eod), text)
        assert "\n" not in str(refused.value)


def test_an_end_that_is_ordinary_text_is_reported(
    tmp_path: Path, source_texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = byte_level_json(tmp_path, source_texts)
    assert load_tokenizer(path, "!").eod_id == tokenizers.Tokenizer.from_file(str(path)).token_to_id("!")
    assert_names(caplog.text, "'!'", path)


def test_the_text_that_cannot_be_encoded_is_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(words_json(tmp_path))
    with pytest.raises(DataError) as refused:
        tokenizer.encode_batch(["some", "other words", "some words"])
    assert_names(refused.value, tokenizer.spec)
    first, bad, last = tokenizer.encode_each(["some", "other words", "some words"])
    assert isinstance(bad, DataError)
    assert [row.tolist() for row in (first, last) if not isinstance(row, DataError)] == [[1], [1, 2]]
