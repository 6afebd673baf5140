"""A model whose documents began with a token has it before each text, once; one without never has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.checkpoint.average import WeightAverage
from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.data.readers.questions import Question
from megalm.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer
from megalm.inference.inference_model import read_facts
from megalm.inference.text_eval import read_text
from megalm.train.multiple_choice import encode_question
from megalm.train.text_samples import prompt_tokens
from tests.inference_models import write_run

BOS = "<|begin|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(["some words and more of these words\n" * 30], path, vocab_size=276, special_tokens=[BOS])
    return load_tokenizer(path, bos_token=BOS)


def test_prompts_begin_with_it_once(tokenizer: Tokenizer) -> None:
    (plain,) = load_tokenizer(tokenizer.spec).encode_batch(["words"])
    begun = [tokenizer.bos_id, *plain.tolist()]
    assert prompt_tokens(tokenizer, ["words", f"{BOS}words", ""]) == [begun, begun, begun[:1]]
    assert prompt_tokens(load_tokenizer(tokenizer.spec), ["words", ""]) == [plain.tolist(), [tokenizer.eod_id]]


@pytest.mark.parametrize("document_mask", [False, True])
def test_what_is_evaluated_begins_with_it(tmp_path: Path, tokenizer: Tokenizer, document_mask: bool) -> None:
    """So every token of the text is scored, also where a document mask left nothing before it."""
    checkpoint = write_run(tmp_path / "run", tokenizer, document_mask=document_mask, bos_id=tokenizer.bos_id)
    facts = read_facts(checkpoint)
    assert facts.tokenizer.bos_id == tokenizer.bos_id
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    (ids,) = tokenizer.encode_batch(["some words"])
    found = read_text(str(tmp_path / "texts.jsonl"), facts)
    (window,) = found.sequences
    assert (window.tokens.tolist(), window.first) == ([tokenizer.bos_id, *ids.tolist()], 1)
    assert found.text_bytes == len("some words")
    for context in ("some ", ""):
        for sequence in encode_question(Question(context, ("words", "more"), 0, "q:1"), facts.encoding):
            assert sequence.tokens[0] == tokenizer.bos_id
            assert tokenizer.bos_id not in sequence.tokens[1:]


def test_one_token_before_a_text_that_ends_the_document_before_too(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    facts = read_facts(write_run(tmp_path, tokenizer, bos_id=tokenizer.eod_id))
    assert facts.tokenizer.text_start(document_mask=False) == [tokenizer.eod_id]
    assert prompt_tokens(facts.tokenizer, ["a", "<eod>a", ""]) == [[256, 97], [256, 97], [256]]


def test_an_average_keeps_it(tmp_path: Path) -> None:
    parts = [write_run(tmp_path / "run", ByteTokenizer(), step=step, bos_id=256, eod_id=256) for step in (1, 2)]
    written = WeightAverage([CheckpointReader(part) for part in parts]).write(tmp_path / "mean", "mean", lambda: None)
    assert read_facts(written).tokenizer.bos_id == 256
