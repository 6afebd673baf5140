"""Conversations: rendered and marked as transformers does, kept with their tokens, and no targets where unmarked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from megalm.data.analysis.dataset_info import describe, document_text, verify
from megalm.data.analysis.sample_sources import spans_of
from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.builder import build_files
from megalm.data.builder.merge import merge_datasets
from megalm.data.builder.rebuild import Wanted, rebuild_command
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.indexed.trained_tokens import trained_path
from megalm.data.readers.records import ReadOptions
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import IGNORE_INDEX, TrainingSamples, ValidationSamples
from megalm.data.tokenizers.chat_template import ChatTemplate, load_chat_template
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import DataError
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

PREFIXES = """\
{%- if tools %}{{ '<|im_start|>system\\ntools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | default('', true) }}
{%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}
{{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GENERATION = """\
{%- if tools %}{{ '<|im_start|>system\\ntools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content | default('', true) }}
{%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message.content + eos_token }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CONVERSATIONS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief — and kind 🙂."},
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "It is 4 🙂"},
            {"role": "user", "content": "And doubled?"},
            {"role": "assistant", "content": "Eight."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "The weather in Graz?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Graz"}}]},
            {"role": "tool", "content": '{"celsius": 21}'},
            {"role": "assistant", "content": "It is 21 °C."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    },
    {"messages": [{"role": "user", "content": "Nobody answers."}]},
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye " * 30}]},
]


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([json.dumps(CONVERSATIONS)], trainer)
    folder = tmp_path_factory.mktemp("chat")
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": GENERATION}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def options_of(template: ChatTemplate, **changes: Any) -> BuildOptions:
    read = ReadOptions(messages_key="messages")
    return replace(BuildOptions(append_eod=False, read=read, chat=template), **changes)


def write_lines(path: Path, records: Sequence[Any] = CONVERSATIONS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def dataset(tmp_path: Path, chat_tokenizer: Path) -> IndexedDataset:
    options = options_of(load_chat_template(None, str(chat_tokenizer)))
    build_files([write_lines(tmp_path / "chats.jsonl")], load_tokenizer(chat_tokenizer), tmp_path / "chats", options)
    return IndexedDataset(tmp_path / "chats")


def bits_of(dataset: IndexedDataset, document: int) -> list[bool]:
    assert dataset.trained is not None
    return list(dataset.trained.at(dataset.sequence_positions(document)).tolist())


def test_generation_blocks_give_the_tokens_and_mask_of_transformers(
    dataset: IndexedDataset, chat_tokenizer: Path
) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chat_tokenizer), eos_token="<|im_end|>")
    for number, record in enumerate(CONVERSATIONS):
        expected = theirs.apply_chat_template(
            record["messages"],
            tools=record.get("tools"),
            chat_template=GENERATION,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        assert dataset[number].tolist() == expected["input_ids"]
        assert bits_of(dataset, number) == [bool(bit) for bit in expected["assistant_masks"]]
    report = read_sidecar(dataset.prefix)
    assert report is not None
    assert report["trained"]["tokens"] == sum(sum(bits_of(dataset, number)) for number in range(4)) > 0
    assert report["inexact_documents"] == 0


def test_prefixes_mark_the_turns_of_the_assistant(chat_tokenizer: Path) -> None:
    template = ChatTemplate(PREFIXES)
    for record in CONVERSATIONS:
        text, trained = template.render(json.dumps({"tools": None, **record}))
        answers = [message for message in record["messages"] if message["role"] == "assistant"]
        assert len(trained) == len(answers)
        for (start, end), message in zip(trained, answers, strict=True):
            said = message["content"] or json.dumps(message["tool_calls"][0])
            assert text[start:end] == f"{said}<|im_end|>\n"


def test_a_template_that_cannot_be_split() -> None:
    last_only = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError) as error:
        ChatTemplate(last_only).render(json.dumps({"tools": None, **CONVERSATIONS[0]}))
    assert_names(error.value, "message 2", "generation")


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now('%Y') }}", "strftime_now"),
    ],
)
def test_what_a_template_refuses_and_may_not_do(template: str, named: str) -> None:
    with pytest.raises(DataError) as error:
        ChatTemplate(template).render(json.dumps({"tools": None, **CONVERSATIONS[0]}))
    assert_names(error.value, named)


def test_templates_are_found_and_refused(tmp_path: Path, chat_tokenizer: Path, dataset: IndexedDataset) -> None:
    found = load_chat_template(None, str(chat_tokenizer))
    assert found == ChatTemplate(GENERATION, {"eos_token": "<|im_end|>"})
    (tmp_path / "mine.jinja").write_text("{% if %}")
    for file, tokenizer, named in (
        (tmp_path / "mine.jinja", "bytes", "line 1"),
        (tmp_path / "absent.jinja", "bytes", "absent.jinja"),
        (None, "bytes", "--chat-template"),
    ):
        with pytest.raises(DataError) as error:
            load_chat_template(file, tokenizer)
        assert_names(error.value, named)
    # What rebuilds a dataset takes its template from its own description.
    sidecar = read_sidecar(dataset.prefix)
    assert sidecar is not None
    command = rebuild_command(dataset.prefix, sidecar, Wanted(load_tokenizer(chat_tokenizer)))
    for words in ("--messages-key messages", f"--chat-template {dataset.prefix}.json"):
        assert words in command
    assert load_chat_template(f"{dataset.prefix}.json", str(chat_tokenizer)) == found


@pytest.mark.parametrize(
    "records",
    [[CONVERSATIONS[2]], [{"text": "no messages"}], [{"messages": "text"}], [{"messages": [{"content": "no role"}]}]],
)
def test_conversations_that_train_nothing_are_refused(
    tmp_path: Path, chat_tokenizer: Path, records: list[dict[str, Any]]
) -> None:
    options = options_of(load_chat_template(None, str(chat_tokenizer)))
    path = write_lines(tmp_path / "in.jsonl", records)
    with pytest.raises(DataError):
        build_files([path], load_tokenizer(chat_tokenizer), tmp_path / "out", options)
    assert not [path for path in tmp_path.glob("out.*") if path.name != "out.building"]


def test_a_tokenizer_that_reads_no_special_tokens(tmp_path: Path, model_path: Path) -> None:
    path, options = write_lines(tmp_path / "in.jsonl"), options_of(ChatTemplate(PREFIXES))
    with pytest.raises(DataError) as error:
        build_files([path], load_tokenizer(model_path), tmp_path / "out", options)
    assert_names(error.value, str(model_path), "special tokens", "tokenizer.json")


def test_the_same_bits_for_any_units_splits_and_merges(tmp_path: Path, chat_tokenizer: Path) -> None:
    template, tokenizer = load_chat_template(None, str(chat_tokenizer)), load_tokenizer(chat_tokenizer)
    records = [CONVERSATIONS[number % 4] | {"extra": number} for number in range(40)]
    path = write_lines(tmp_path / "in.jsonl", records)

    def build(name: str, source: Path = path, **changes: Any) -> IndexedDataset:
        build_files([source], tokenizer, tmp_path / name, options_of(template, append_eod=True, **changes))
        return IndexedDataset(tmp_path / f"{name}-train" if "split" in changes else tmp_path / name)

    def bits(dataset: IndexedDataset) -> bytes:
        return trained_path(dataset.prefix).read_bytes()

    whole = build("whole")
    assert whole.trained is not None
    assert not whole.trained.at(np.cumsum(whole.sequence_lengths, dtype=np.int64) - 1).any()  # what ends a document
    assert bits(build("small", unit_bytes=700)) == bits(whole)
    column = [record["messages"] for record in CONVERSATIONS[::3]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "t.parquet")
    table = build("table", tmp_path / "t.parquet")
    assert [bits_of(table, 0), bits_of(table, 1)] == [bits_of(whole, 0), bits_of(whole, 3)]
    part = build("part", split=(60.0, 40.0))
    assert [bits_of(part, n) for n in range(len(part))] == [bits_of(whole, n) for n in range(len(part))]
    shards = [build(f"shard{number}", shard=(number, 2)) for number in range(2)]
    merge_datasets([shard.prefix for shard in shards], tmp_path / "merged")
    assert bits(IndexedDataset(tmp_path / "merged")) == bits(whole)
    unique = build("unique", dedup="exact")
    merge_datasets([shard.prefix for shard in shards], tmp_path / "once", dedup="exact")
    assert len(unique) == 4
    assert bits(IndexedDataset(tmp_path / "once")) == bits(unique)
    build_files([write_lines(tmp_path / "text.jsonl", [{"text": "text"}])], tokenizer, tmp_path / "text")
    with pytest.raises(DataError) as error:
        merge_datasets([whole.prefix, tmp_path / "text"], tmp_path / "mixed")
    assert_names(error.value, str(tmp_path / "text"), "data.train")


def test_missing_and_damaged_marks_are_refused(dataset: IndexedDataset) -> None:
    path, content = trained_path(dataset.prefix), trained_path(dataset.prefix).read_bytes()
    assert verify(dataset.prefix)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match="hash"):
        verify(dataset.prefix)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="bytes expected"):
        IndexedDataset(dataset.prefix)
    path.unlink()
    with pytest.raises(DataError) as error:
        TrainingSamples(IndexedDataset(dataset.prefix), (0, 4), 8, seed=1)
    assert_names(error.value, path, "missing")


def test_only_trained_tokens_are_targets(dataset: IndexedDataset) -> None:
    for masked in (False, True):
        samples = TrainingSamples(dataset, (0, 4), 16, seed=3, document_mask=masked)
        plain = TrainingSamples(replace_marks(dataset), (0, 4), 16, seed=3, document_mask=masked)
        blend = BlendedSamples([samples], [MixtureStage(0, (1.0,))])
        assert samples.fingerprint != plain.fingerprint
        for index in range(30):
            tokens, labels = samples.sample(index)
            whole_tokens, whole = plain.sample(index)
            bits = dataset.trained.at(samples.place(index).positions[1:])  # type: ignore[union-attr]
            assert tokens.tolist() == whole_tokens.tolist()
            assert labels.tolist() == np.where(bits, whole, IGNORE_INDEX).tolist()
            assert samples.target_count(index) == blend.target_count(index) == (labels != IGNORE_INDEX).sum()
        with BatchLoader(samples, BatchLayout(8, 2, 1, 2)) as loader:
            batch = loader.batch(8)
        assert batch.target_count == sum(map(samples.target_count, range(8, 16)))
    spans = list(spans_of(blend, 0, 30))
    assert sum(sum(span.trained or ()) for span in spans) > 0
    with pytest.raises(DataError):
        ValidationSamples(dataset, (2, 3), 8)  # nobody answers there


def replace_marks(dataset: IndexedDataset) -> IndexedDataset:
    """The same tokens, without their description and marks."""
    other = f"{dataset.prefix}-plain"
    for suffix in (".bin", ".idx"):
        Path(other + suffix).write_bytes(Path(dataset.prefix + suffix).read_bytes())
    return IndexedDataset(other)


def test_inspection_marks_what_is_trained(dataset: IndexedDataset, chat_tokenizer: Path) -> None:
    text = document_text(dataset.prefix, 0, load_tokenizer(chat_tokenizer))
    assert "«It is 4 🙂<|im_end|>»" in text
    assert "«Eight.<|im_end|>»" in text
    assert text.count("«") == 2
    assert "«" in document_text(dataset.prefix, 0)
    assert "%" in describe(dataset.prefix)["trained tokens"]
