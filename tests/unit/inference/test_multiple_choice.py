"""Multiple choice: log-likelihoods as a plain softmax over the whole text gives them, and where a choice begins."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.readers.questions import Question, read_questions
from megalm.data.sampling.batch_loader import SequenceBatches
from megalm.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer
from megalm.errors import CheckpointError, DataError
from megalm.inference.inference_model import InferenceModel, read_facts
from megalm.train.multiple_choice import ChoiceTask, encode_question, log_likelihoods, read_choices
from tests.inference_models import GPT2, LLAMA, write_run
from tests.messages import assert_names

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 64
QUESTIONS: list[dict[str, Any]] = [
    {"context": "def read(self", "choices": ["):", ", name):\n    return name", " + 1"], "answer": 1},
    {"context": "x = se", "choices": ["lf.width", "t"], "answer": 0},  # the context's tokens are not kept
    {"context": "", "choices": ["class", "größe"], "answer": 0},
    {"context": "x = ", "choices": ["1", "2", "3", "4"], "answer": 3},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    text = source_files()["textwrap.py"].read_text(encoding="utf-8")
    train_tokenizer([text], path, vocab_size=500)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> InferenceModel:
    return InferenceModel(write_run(tmp_path_factory.mktemp("run"), tokenizer, LLAMA, LENGTH))


def write(path: Path, questions: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path


def plain_score(model: InferenceModel, tokens: Sequence[int], first: int) -> float:
    """Sum of log-probabilities of tokens from `first` on, one text at a time, the whole softmax in fp64."""
    with torch.no_grad():
        log_probabilities = model.network(torch.tensor([tokens]))[0].double().log_softmax(-1)
    return sum(float(log_probabilities[place - 1, tokens[place]]) for place in range(first, len(tokens)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_a_plain_softmax(model: InferenceModel, tmp_path: Path, batch_size: int) -> None:
    questions = read_choices(write(tmp_path / "q.jsonl", QUESTIONS), model.facts.encoding)
    found = log_likelihoods(questions, SequenceBatches(questions.sequences, batch_size), model, lambda: None)
    assert [len(scores) for scores in found] == [3, 2, 2, 4]

    def encode(texts: list[str]) -> list[list[int]]:
        return [tokens.tolist() for tokens in model.tokenizer.encode_batch(texts)]

    for question, scores in zip(QUESTIONS, found, strict=True):
        texts = encode([question["context"] + choice for choice in question["choices"]])
        (context,) = encode([question["context"]])
        agreed = len(context)
        while any(tokens[:agreed] != context[:agreed] for tokens in texts):
            agreed -= 1
        expected = [plain_score(model, [model.tokenizer.eod_id, *tokens], 1 + agreed) for tokens in texts]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """The same weights in Hugging Face's GPT-2, whose own loss is a mean over labels."""
    transformers = pytest.importorskip("transformers")
    model = InferenceModel(write_run(tmp_path, ByteTokenizer(), GPT2, LENGTH))
    shape = model.shape
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=shape.hidden_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_positions=LENGTH,
        layer_norm_epsilon=shape.norm_epsilon,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = dict(model.network.named_parameters())

    def put(name: str, *sources: str) -> None:
        whole = torch.cat([ours[source] for source in sources])
        matrix = whole.ndim == 2 and "wte" not in name and "wpe" not in name
        theirs.transformer.get_parameter(name).data.copy_(whole.t() if matrix else whole)

    put("wte.weight", "embedding.tokens.weight")
    put("wpe.weight", "embedding.positions.weight")
    for kind in ("weight", "bias"):
        put(f"ln_f.{kind}", f"final_norm.{kind}")
        for layer in range(shape.num_hidden_layers):
            here, there = f"layers.{layer}", f"h.{layer}"
            put(
                f"{there}.attn.c_attn.{kind}",
                *(f"{here}.attention.{part}.{kind}" for part in ("query", "key", "value")),
            )
            put(f"{there}.attn.c_proj.{kind}", f"{here}.attention.output.{kind}")
            put(f"{there}.mlp.c_fc.{kind}", f"{here}.mlp.up.{kind}")
            put(f"{there}.mlp.c_proj.{kind}", f"{here}.mlp.down.{kind}")
            put(f"{there}.ln_1.{kind}", f"{here}.attention_norm.{kind}")
            put(f"{there}.ln_2.{kind}", f"{here}.mlp_norm.{kind}")

    questions = read_choices(write(tmp_path / "q.jsonl", QUESTIONS), model.facts.encoding)
    found = log_likelihoods(questions, SequenceBatches(questions.sequences, 3), model, lambda: None)
    for question, scores in zip(QUESTIONS, found, strict=True):
        for choice, score in zip(question["choices"], scores, strict=True):
            tokens = torch.tensor([[256, *(question["context"] + choice).encode()]])
            labels = tokens.clone()
            labels[0, : 1 + len(question["context"].encode())] = -100
            with torch.no_grad():
                mean = theirs(tokens, labels=labels).loss
            assert score == pytest.approx(-float(mean) * len(choice.encode()), rel=1e-5)


def test_choices_begin_at_the_same_token(model: InferenceModel, tokenizer: Tokenizer) -> None:
    for content in QUESTIONS:
        question = Question(content["context"], tuple(content["choices"]), content["answer"], "here:1")
        found = encode_question(question, model.facts.encoding)
        assert len({sequence.first for sequence in found}) == 1
        assert len({tuple(sequence.tokens[: sequence.first]) for sequence in found}) == 1
        for choice, sequence in zip(question.choices, found, strict=True):
            assert sequence.tokens[0] == tokenizer.eod_id
            assert tokenizer.decode(sequence.tokens[1:].tolist()) == question.context + choice
            assert choice.endswith(tokenizer.decode(sequence.tokens[-1:].tolist())), "and the choice is scored"


def test_a_token_across_the_boundary_is_scored_for_all(tokenizer: Tokenizer, model: InferenceModel) -> None:
    """`se` + `lf` is one token, `self`, which the context alone does not have."""
    question = Question("x = se", ("lf.width", "t"), 0, "here:1")
    alone, whole = (ids.tolist() for ids in tokenizer.encode_batch([question.context, question.context + "lf.width"]))
    assert whole[: len(alone)] != alone, "a tokenizer for which this tests nothing"
    found = encode_question(question, model.facts.encoding)
    before = tokenizer.decode(found[0].tokens[: found[0].first].tolist())
    assert question.context.startswith(before)
    assert len(before) < len(question.context)


def test_documents_kept_apart_follow_no_end(tmp_path: Path) -> None:
    facts = read_facts(write_run(tmp_path, ByteTokenizer(), GPT2, LENGTH, document_mask=True)).encoding
    plain, empty = (encode_question(Question(context, ("a", "b"), 0, "x:1"), facts)[0] for context in ("ab", ""))
    assert (plain.tokens.tolist(), plain.first) == ([97, 98, 97], 2)
    assert (empty.tokens.tolist(), empty.first) == ([256, 97], 1), "something has to stand before it"


def test_accuracies_and_their_errors(model: InferenceModel, tmp_path: Path) -> None:
    """By hand from the scores: the longest text is rarely likeliest, but may be by byte."""
    questions = read_choices(write(tmp_path / "q.jsonl", QUESTIONS), model.facts.encoding)
    batches = SequenceBatches(questions.sequences, 4)
    scores = log_likelihoods(questions, batches, model, lambda: None)
    sizes = [[len(choice.encode()) for choice in question["choices"]] for question in QUESTIONS]
    best = [int(np.argmax(score)) for score in scores]
    best_by_byte = [int(np.argmax(np.array(score) / size)) for score, size in zip(scores, sizes, strict=True)]
    assert best != best_by_byte, "questions for which this tests nothing"
    # Three right by the one measure; how many by the other follows.
    answers = [*best[:3], (best[3] + 1) % 4]
    changed = [{**question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    again = read_choices(write(tmp_path / "again.jsonl", changed), model.facts.encoding)
    (row,) = ChoiceTask([again], 4).rows(model, lambda: None)
    by_byte = sum(one == other for one, other in zip(answers, best_by_byte, strict=True)) / 4
    assert (row["questions"], row["accuracy"], row["byte_accuracy"]) == (4, 0.75, by_byte)
    assert row["accuracy_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert row["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 4) / 4)


def test_scores_that_are_no_numbers_answer_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Weights of a run that went wrong: every score is NaN, and the first choice would seem to be the best."""
    model = InferenceModel(
        write_run(tmp_path / "run", tokenizer, spoilt={"final_norm.weight": 3e38, "head.weight": 3e38})
    )
    asked = read_choices(write(tmp_path / "q.jsonl", QUESTIONS), model.facts.encoding)
    with pytest.raises(CheckpointError, match="step-00000010"):
        ChoiceTask([asked], 4).rows(model, lambda: None)


def test_a_choice_of_which_nothing_is_left(model: InferenceModel, tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eod>": 0, "word": 1, "<unk>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    facts = replace(model.facts.encoding, tokenizer=load_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="here:3"):
        encode_question(Question("", ("word", "  "), 0, "here:3"), facts)
    assert [len(one.tokens) for one in encode_question(Question("", ("word", "other"), 0, "here:4"), facts)] == [2, 2]


def test_long_contexts_lose_their_beginning(model: InferenceModel, tmp_path: Path) -> None:
    long = {"context": "x = 1\n" * 60, "choices": ["y", "z = 2"], "answer": 0}
    found = read_choices(write(tmp_path / "q.jsonl", [long, QUESTIONS[3]]), model.facts.encoding)
    assert found.cut == 1
    assert max(len(sequence.tokens) for sequence in found.sequences) == LENGTH + 1
    (uncut,) = model.tokenizer.encode_batch([long["context"] + "z = 2"])
    assert found.sequences[1].tokens.tolist() == uncut[-(LENGTH + 1) :].tolist()
    whole = encode_question(Question(long["context"], tuple(long["choices"]), 0, "here:1"), model.facts.encoding)
    assert [one.targets for one in found.sequences[:2]] == [one.targets for one in whole], "the choice is scored still"
    too_long = {"context": "a", "choices": ["b", "c = 3\n" * 60], "answer": 0}
    with pytest.raises(DataError) as refused:
        read_choices(write(tmp_path / "q.jsonl", [too_long]), model.facts.encoding)
    assert_names(refused.value, f"{tmp_path}/q.jsonl:1", LENGTH)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{", ["JSON"]),
        ("[]", ["context", "choices", "answer"]),
        ('{"context": "a", "choices": ["b", "c"]}', ["context", "choices", "answer"]),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', ["context"]),
        ('{"context": "a", "choices": ["b"], "answer": 0}', ["choices"]),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', ["choices"]),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', ["answer", 0, 1]),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', ["answer", 0, 1]),
        ('{"context": "a", "choices": ["b", "c"], "answer": "1"}', ["answer", 0, 1]),
    ],
)
def test_what_is_no_question_is_reported_with_its_line(tmp_path: Path, line: str, names: list[object]) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert_names(caught.value, f"{path}:3", *names)


def test_packed_files_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(question).encode() + b"\n" for question in QUESTIONS)))
    assert [question.answer for question in read_questions(path)] == [1, 0, 0, 3]
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "empty.jsonl").write_text("\n")
    for refused in (path, tmp_path / "absent.jsonl", tmp_path / "empty.jsonl"):
        with pytest.raises(DataError) as caught:
            read_questions(refused)
        assert_names(caught.value, refused)
