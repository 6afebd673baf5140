"""Documents that begin with a token, chosen or the tokenizer's own: built, recorded, compared, merged, sampled."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megalm.data.analysis.dataset_info import describe
from megalm.data.builder.build_plan import BuildOptions, make_plan
from megalm.data.builder.builder import build_dataset, build_files
from megalm.data.builder.merge import merge_datasets
from megalm.data.builder.rebuild import Wanted, ensure_dataset
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import start_report
from megalm.data.readers.document_reader import Document
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.readers.records import ReadOptions
from megalm.data.sampling.samples import IGNORE_INDEX, TrainingSamples
from megalm.data.tokenizers.chat_template import ChatTemplate
from megalm.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, describe_ends, load_tokenizer
from megalm.errors import DataError
from tests.messages import assert_names
from tests.unit.data.test_doors import door

BOS, EOD = "<|begin|>", "<|endoftext|>"
TEXTS = ["some text", f"{BOS} is text here", "another text that is longer than the others", "x"]
TURNS = (
    "{% for message in messages %}{{ message.role + ':' }}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE that puts a token before a text, as Llama 3's does."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOD, BOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(),
            tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)]),
        ]
    )
    path = tmp_path_factory.mktemp("begin") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    return path


def rows_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[number].tolist() for number in range(len(dataset))]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_begins_with_the_token(tmp_path: Path, corpus: Path, tokenizer_file: Path, workers: int) -> None:
    options = BuildOptions(unit_bytes=400)
    plain, begun = load_tokenizer(tokenizer_file), load_tokenizer(tokenizer_file, bos_token="auto")
    without = build_files([corpus], plain, tmp_path / "plain", options, workers=workers).reports[0]
    report = build_files([corpus], begun, tmp_path / "my", options, workers=workers).reports[0]
    rows = rows_of(tmp_path / "my")
    assert rows == [[1, *row] for row in rows_of(tmp_path / "plain")]
    assert rows[1].count(1) == 1, "its name in a text is text"
    assert report.tokens == without.tokens + len(rows) == sum(map(len, rows))
    assert (report.inexact_documents, report.text_bytes) == (0, without.text_bytes)
    assert (report.tokenizer["bos_id"], report.tokenizer["bos_token"]) == (1, BOS)
    assert without.tokenizer["bos_id"] is None
    assert_names(describe(tmp_path / "my")["begin of document"], BOS, 1)


def test_another_begin_is_another_dataset(tmp_path: Path, corpus: Path, tokenizer_file: Path) -> None:
    begun, chosen = (load_tokenizer(tokenizer_file, bos_token=bos) for bos in ("auto", BOS))
    build_files([corpus], begun, tmp_path / "my")
    assert build_files([corpus], chosen, tmp_path / "my").was_there
    with pytest.raises(DataError) as refused:
        build_files([corpus], load_tokenizer(tokenizer_file), tmp_path / "my")
    assert_names(refused.value, "--overwrite")
    plans = [
        make_plan(find_inputs([corpus], ReadReport()), BuildOptions(), start_report("my", used, True, {}, []).tokenizer)
        for used in (begun, chosen, load_tokenizer(tokenizer_file))
    ]
    assert plans[0].identity == plans[1].identity != plans[2].identity, "parts of a killed build are taken over"
    build_files([corpus], load_tokenizer(tokenizer_file, bos_token="none"), tmp_path / "none")
    with pytest.raises(DataError) as refused:
        merge_datasets([tmp_path / "none", tmp_path / "my"], tmp_path / "both")
    assert_names(refused.value, tmp_path / "none", tmp_path / "my", BOS, "--bos-token")
    build_files([corpus], begun, tmp_path / "more")
    assert merge_datasets([tmp_path / "more", tmp_path / "my"], tmp_path / "both").tokenizer["bos_id"] == 1
    # What a run wants otherwise is refused with the command that builds it, or built.
    with pytest.raises(DataError) as refused:
        ensure_dataset(tmp_path / "my", Wanted(load_tokenizer(tokenizer_file)))
    assert_names(refused.value, tmp_path / "my", BOS, "data.bos_token", "--bos-token none")
    with pytest.raises(DataError) as refused:
        ensure_dataset(tmp_path / "none", Wanted(begun))
    assert_names(refused.value, tmp_path / "none", BOS, "data.bos_token", f"--bos-token '{BOS}'")
    assert ensure_dataset(tmp_path / "none", Wanted(begun), "auto") is not None
    assert rows_of(tmp_path / "none") == rows_of(tmp_path / "my")


@pytest.mark.parametrize("template", ["{{ bos_token }}" + TURNS, TURNS])
def test_a_conversation_has_one(tmp_path: Path, tokenizer_file: Path, template: str) -> None:
    """A template that writes it does not give two; the one that the build puts there is not trained."""
    messages = [{"role": "assistant", "content": f"text {number}"} for number in range(3)]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    chat = ChatTemplate(template, {"bos_token": BOS})
    options = BuildOptions(chat=chat, read=ReadOptions(messages_key="messages"))
    tokenizer = load_tokenizer(tokenizer_file, bos_token="auto")
    build_files([tmp_path / "chats.jsonl"], tokenizer, tmp_path / "my", options)
    ((first, *row),) = rows_of(tmp_path / "my")
    assert first == 1
    assert 1 not in row
    dataset = IndexedDataset(tmp_path / "my")
    assert dataset.trained is not None
    trained = dataset.trained.at(range(len(row) + 1))
    shown = [tokenizer.decode([token]) for token in np.array([first, *row])[trained]]
    assert "".join(shown) == "".join(message["content"] for message in messages)
    assert not trained[0]


def test_samples_have_it_at_the_begin_of_each_document(tmp_path: Path, corpus: Path, tokenizer_file: Path) -> None:
    """Packed, no document loses it; with a document mask it is no target, and the token after it is."""
    build_files([corpus], load_tokenizer(tokenizer_file, bos_token="auto"), tmp_path / "my")
    samples = TrainingSamples(
        IndexedDataset(tmp_path / "my"), (0, 80), 64, seed=1, document_mask=True, packing="best_fit"
    )
    seen = 0
    for number in range(int(samples.samples_per_epoch)):
        (tokens, labels), documents = samples.sample(number), samples.documents(number)
        held = 64 - samples.padding(number)
        starts = np.flatnonzero(np.diff(documents[:held], prepend=-1))
        assert (tokens[starts] == 1).all()
        assert (tokens[:held] == 1).sum() == len(starts)
        assert (labels[starts] != IGNORE_INDEX).all()
        assert 1 not in labels
        seen += len(starts)
    assert seen == 80


def test_what_the_files_of_a_tokenizer_say(
    tmp_path: Path, tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_tokenizer("bytes", bos_token="auto").bos_id is None
    assert_names(describe_ends(load_tokenizer(tokenizer_file, bos_token="auto")), BOS, 1, EOD, 0)
    copy = tmp_path / "tokenizer.json"
    copy.write_text(tokenizer_file.read_text().replace(BOS, "[CLS]"))
    assert load_tokenizer(copy, bos_token="auto").bos_id is None
    copy.write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "eos_token": EOD}))
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(copy, bos_token="auto").bos_id == 1
    assert_names(caplog.text, BOS, "tokenizer_config.json", "--bos-token", "data.bos_token")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text and some more text"] * 20),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=14,
        minloglevel=2,
    )
    assert load_tokenizer(tmp_path / "llama.model", bos_token="auto").bos_id is None
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "llama.model", bos_token="auto").bos_token == "<s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<bos>"}))
    with pytest.raises(DataError) as refused:
        load_tokenizer(tmp_path / "llama.model", bos_token="auto")
    assert_names(refused.value, tmp_path / "tokenizer_config.json", "'<bos>'", "--bos-token")


def test_one_token_may_begin_and_end_a_document(tmp_path: Path) -> None:
    """As GPT-2's does: there are two between documents, and one without --append-eod."""
    both: Tokenizer = ByteTokenizer().with_bos("<eod>")
    build_dataset([Document("ab", "f"), Document("c", "f")], both, tmp_path / "two")
    assert IndexedDataset(tmp_path / "two").tokens.tolist() == [256, 97, 98, 256, 256, 99, 256]
    build_dataset([Document("ab", "f"), Document("c", "f")], both, tmp_path / "one", append_eod=False)
    assert IndexedDataset(tmp_path / "one").tokens.tolist() == [256, 97, 98, 256, 99]


def test_the_command(tmp_path: Path, corpus: Path, tokenizer_file: Path) -> None:
    words = ["--input", corpus, "--tokenizer", tokenizer_file, "--output-prefix", tmp_path / "my"]
    refused = door("build_dataset", *words, "--bos-token", "<|begn|>")
    assert refused.returncode == 2
    assert_names(refused.stderr, tokenizer_file, "'<|begn|>'", BOS)
    assert not (tmp_path / "my.bin").exists()
    built = door("build_dataset", *words)
    assert built.returncode == 0, built.stderr
    assert_names(built.stdout, BOS, 1, EOD, 0)
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "my", Wanted(load_tokenizer(tokenizer_file)))
    _, _, command = str(error.value).partition("python data_tools/build_dataset.py ")
    again = door("build_dataset", *shlex.split(command))
    assert again.returncode == 0, again.stderr
    assert BOS not in again.stdout
    assert ensure_dataset(tmp_path / "my", Wanted(load_tokenizer(tokenizer_file))) is None
