"""Building and merging datasets: the same bytes for any number of workers, nothing lost without a count."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megalm.data.analysis.dataset_info import describe, document_text, verify
from megalm.data.builder import assembler as assembly_module
from megalm.data.builder import merge as merge_module
from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.builder import build_dataset, build_files
from megalm.data.builder.dedup import Dedup
from megalm.data.builder.merge import merge_datasets
from megalm.data.indexed.dataset import IndexedDataset, bin_path
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.readers.document_reader import Document
from megalm.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megalm.errors import ConfigError, DataError
from tests.messages import assert_names


@pytest.fixture
def documents(source_texts: list[str]) -> list[Document]:
    """Some hundred documents in several chunks, some of them empty."""
    parts = [part for text in source_texts for part in text.split("\ndef ")]
    texts = ["", *parts, "", *source_texts * 8]
    return [Document(text, f"file:{number}") for number, text in enumerate(texts, 1)]


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


def test_every_document_is_there(tmp_path: Path, documents: list[Document], model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    report = build_dataset(documents, tokenizer, tmp_path / "out", inputs=["my.jsonl"])
    dataset = IndexedDataset(tmp_path / "out")
    filled = [document.text for document in documents if document.text]
    assert [tokenizer.decode(dataset[index].tolist()) for index in range(len(dataset))] == filled
    assert all(dataset[index][-1] == tokenizer.eod_id for index in range(len(dataset)))
    assert (report.documents, report.empty_documents) == (len(filled), 2)
    assert report.text_bytes == sum(len(text.encode()) for text in filled)
    assert report.tokens == len(dataset.tokens)
    assert report.inexact_documents == 0


def test_the_sidecar_says_what_it_is_made_of(tmp_path: Path) -> None:
    build_dataset([Document("aab", "f:1")], ByteTokenizer(), tmp_path / "out", inputs=["f"])
    sidecar = json.loads((tmp_path / "out.json").read_bytes())
    assert sidecar["tokenizer"]["fingerprint"] == ByteTokenizer.fingerprint
    assert (sidecar["inputs"], sidecar["documents"], sidecar["tokens"], sidecar["text_bytes"]) == (["f"], 1, 4, 3)
    assert sidecar["bin_sha256"] == hashlib.sha256((tmp_path / "out.bin").read_bytes()).hexdigest()
    shares = [count / 4 for count in Counter("aab\0").values()]
    assert sidecar["unigram_entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_without_end_of_document(tmp_path: Path) -> None:
    build_dataset([Document("ab", "f")], ByteTokenizer(), tmp_path / "out", append_eod=False)
    assert IndexedDataset(tmp_path / "out").tokens.tolist() == [97, 98]


def test_documents_that_do_not_come_back_are_named(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eod>": 0, "a": 1, "b": 2}, unk_token="<eod>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    texts = [Document("a b", "f:1"), Document("A b", "f:2"), Document("b a", "f:3")]
    report = build_dataset(texts, load_tokenizer(tmp_path), tmp_path / "out")
    assert (report.documents, report.inexact_documents, report.inexact_names) == (3, 1, ["f:2"])


def test_failures_leave_nothing_and_destroy_nothing(tmp_path: Path, model_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield Document("text " * 300_000, "f:1")
        raise DataError("f:2: is not JSON")

    with pytest.raises(DataError, match="f:2"):
        build_dataset(broken(), load_tokenizer(model_path), tmp_path / "out")
    with pytest.raises(DataError) as error:
        build_dataset([Document("", "f")] * 3, ByteTokenizer(), tmp_path / "out")
    assert_names(error.value, tmp_path / "out", 3)
    assert list(tmp_path.iterdir()) == []
    build_dataset([Document("old", "f")], ByteTokenizer(), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError) as error:
        build_dataset([Document("new", "f")], ByteTokenizer(), tmp_path / "out")
    assert_names(error.value, tmp_path / "out.bin", "--overwrite")
    with pytest.raises(DataError, match="f:2"):
        build_dataset(broken(), ByteTokenizer(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    build_dataset([Document("new", "f")], ByteTokenizer(), tmp_path / "out", overwrite=True)
    assert document_text(tmp_path / "out", 0, ByteTokenizer()) == "new"


def test_merging_is_as_building_at_once(tmp_path: Path, documents: list[Document], model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    build_dataset(documents[:50], tokenizer, tmp_path / "a")
    build_dataset(documents[50:], tokenizer, tmp_path / "b")
    whole = build_dataset(documents, tokenizer, tmp_path / "whole")
    merged = merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert contents(tmp_path / "merged")[:2] == contents(tmp_path / "whole")[:2]
    for fact in ("documents", "empty_documents", "tokens", "text_bytes", "unigram_entropy", "bin_sha256", "tokenizer"):
        assert getattr(merged, fact) == getattr(whole, fact), fact


def test_merging_without_copies_is_as_building_without_them(tmp_path: Path) -> None:
    """Copies inside a dataset and across them, an empty one, and bytes of the single build: tokens, index, sources."""
    texts = [f"text {number % 40}" for number in range(90)] + ["", "last"]
    for name, part in (("a", texts[:50]), ("b", texts[50:]), ("whole", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    options = BuildOptions(on_error="skip")
    for name in ("a", "b"):
        build_files([tmp_path / f"{name}.jsonl"], ByteTokenizer(), tmp_path / name, options)
    single = BuildOptions(on_error="skip", dedup="exact")
    whole = build_files([tmp_path / f"{n}.jsonl" for n in "ab"], ByteTokenizer(), tmp_path / "x", single).reports[0]
    said: list[str] = []
    merged = merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", progress=said.append, dedup="exact")
    for line, names in zip(said, ((tmp_path / "a", 50, 10), (tmp_path / "b", 41, 40)), strict=True):
        assert_names(line, *names)
    for suffix in (".bin", ".idx", ".sources"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"x{suffix}").read_bytes(), suffix
    for fact in ("documents", "tokens", "unigram_entropy", "bin_sha256", "idx_sha256"):
        assert getattr(merged, fact) == getattr(whole, fact), fact
    assert (merged.removed["exact"], whole.removed["exact"], merged.text_bytes) == (50, 50, 0)
    verify(tmp_path / "merged")
    before = (tmp_path / "merged.bin").stat().st_mtime_ns
    assert merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", dedup="exact") == merged
    assert (tmp_path / "merged.bin").stat().st_mtime_ns == before
    with pytest.raises(DataError) as error:
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert_names(error.value, tmp_path / "merged.bin", "--overwrite")


def test_copies_of_documents_of_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As others write them; pieces of any size give the same."""
    rows = [([1, 2, 3, 4], [2, 2]), ([5], [1]), ([1, 2, 3, 4], [1, 3]), ([], []), ([5], [1]), ([], [0])]
    for name in "ab":
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for tokens, lengths in rows:
                writer.append_documents(tokens, np.array(lengths, dtype=np.int64), np.array([len(lengths)]))
    for size in (1 << 22, 3, 1):
        monkeypatch.setattr(merge_module, "COPIED_TOKENS", size)
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", overwrite=True, dedup="exact")
        found = IndexedDataset(tmp_path / "out")
        found.verify()
        assert found.tokens.tolist() == [1, 2, 3, 4, 5]
        assert found.sequence_lengths.tolist() == [2, 2, 1]
        assert found.document_index.tolist() == [0, 2, 3, 3]  # of two empty documents the first


def test_merging_refuses_what_does_not_belong_together(tmp_path: Path, model_path: Path) -> None:
    build_dataset([Document("a", "f")], ByteTokenizer(), tmp_path / "a")
    build_dataset([Document("a", "f")], load_tokenizer(model_path), tmp_path / "b")
    with pytest.raises(DataError) as error:
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert_names(error.value, tmp_path / "a", "bytes", tmp_path / "b", "sentencepiece:small.model")
    with pytest.raises(ConfigError, match=str(tmp_path / "a")):
        merge_datasets([tmp_path / "a", tmp_path / "a"], tmp_path / "a", overwrite=True)
    with pytest.raises(DataError):
        merge_datasets([tmp_path / "a"], tmp_path / "out")
    assert not bin_path(tmp_path / "out").exists()
    (tmp_path / "b.json").unlink()  # as datasets of others come
    with pytest.raises(DataError) as error:
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert_names(error.value, tmp_path / "b.bin", 257)
    assert not bin_path(tmp_path / "out").exists()
    build_dataset([Document("c", "f")], ByteTokenizer(), tmp_path / "c")
    (tmp_path / "c.json").unlink()
    with IndexedDatasetWriter(tmp_path / "i32", np.int32) as writer:
        writer.append([1])
    with pytest.raises(DataError, match=r"i32: holds int32, .*c uint16"):
        merge_datasets([tmp_path / "c", tmp_path / "i32"], tmp_path / "out")
    merged = merge_datasets([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    assert (merged.options["complete"], merged.documents, merged.text_bytes) == (False, 2, 0)


@pytest.mark.parametrize("text", ['{"text": "a", "id": NaN}\n{"text": "b"}\n', '["a", "b"]', '{\n"version": "1.0"}'])
def test_a_file_named_like_a_description_is_none(tmp_path: Path, text: str) -> None:
    """raw.json beside raw.bin, as Megatron's tools leave it: the dataset is opened and merged, the text stays."""
    for name in ("raw", "other"):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.append([1, 2, 3])
    (tmp_path / "raw.json").write_text(text)
    assert read_sidecar(tmp_path / "raw") is None
    assert describe(tmp_path / "raw")["tokens"] == "3"
    assert merge_datasets([tmp_path / "raw", tmp_path / "other"], tmp_path / "out").tokens == 6
    with pytest.raises(DataError) as error:
        build_dataset([Document("a", "f")], ByteTokenizer(), tmp_path / "raw", overwrite=True)
    assert_names(error.value, tmp_path / "raw.json")
    assert (tmp_path / "raw.json").read_text() == text
    (tmp_path / "raw.json").write_text("{")
    with pytest.raises(DataError, match=r"raw\.json"):
        read_sidecar(tmp_path / "raw")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder\.json"):
        read_sidecar(tmp_path / "folder")


def test_a_merge_never_destroys_what_it_reads(tmp_path: Path) -> None:
    """Its parts by another path, and the text and tokenizer of shards that are built beside them."""
    folder, prefixes = tmp_path / "col", [tmp_path / "a", tmp_path / "b"]
    folder.mkdir()
    for prefix in prefixes:
        build_dataset([Document("a", "f")], ByteTokenizer(), prefix)
    (folder / "x.bin").hardlink_to(tmp_path / "b.bin")
    (tmp_path / "linked").symlink_to(tmp_path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eod>": 0, "a": 1}, unk_token="<eod>"))
    made.save(str(folder / "my.json"))
    (folder / "text.json").write_text('["a", "a", "a", "a"]')
    for shard in range(2):
        options = BuildOptions(shard=(shard, 2))
        for name, tokenizer in (("my", load_tokenizer(folder / "my.json")), ("text", ByteTokenizer())):
            texts = [folder / "text.json", folder / "text.json"]
            build_files(texts, tokenizer, folder / f"{name}.shards" / str(shard), options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    for parts, output, destroyed in (
        (prefixes, tmp_path / "linked" / "a", tmp_path / "a.bin"),
        (prefixes, folder / "x", tmp_path / "b.bin"),
        ([folder / "my.shards" / shard for shard in "01"], folder / "my", folder / "my.json"),
        ([folder / "text.shards" / shard for shard in "01"], folder / "text", folder / "text.json"),
    ):
        with pytest.raises(ConfigError) as error:
            merge_datasets(parts, output, overwrite=True)
        assert_names(error.value, destroyed)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_types_of_tokens_are_merged_into_the_widest(tmp_path: Path, dedup: Dedup) -> None:
    """Another toolkit can have written the same tokenizer's ids as int32."""
    build_dataset([Document("a", "f"), Document("b", "f")], ByteTokenizer(), tmp_path / "ours")
    for name, rows in (("theirs", [[98, 256], [99, 256]]), ("outside", [[257]])):
        with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
            for row in rows:
                writer.append(row)
    merged = merge_datasets([tmp_path / "ours", tmp_path / "theirs"], tmp_path / "out", dedup=dedup)
    found = IndexedDataset(tmp_path / "out")
    assert (merged.dtype, found.dtype) == ("int32", np.int32)
    assert found.tokens.tolist() == [97, 256, 98, 256, *([98, 256] * (dedup == "none")), 99, 256]
    verify(tmp_path / "out")
    with pytest.raises(DataError) as error:
        merge_datasets([tmp_path / "ours", tmp_path / "outside"], tmp_path / "x")
    assert_names(error.value, tmp_path / "outside.bin", 257)


def test_counts_of_a_merge_of_what_is_not_known_are_not_known(tmp_path: Path) -> None:
    for name in "abcd":
        build_dataset([Document(name, "f")], ByteTokenizer(), tmp_path / name)
    for name in "bcd":
        (tmp_path / f"{name}.json").unlink()  # as datasets of others come
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    merge_datasets([tmp_path / "c", tmp_path / "d"], tmp_path / "cd")
    merged = merge_datasets([tmp_path / name for name in ("a", "ab", "cd")], tmp_path / "all")
    assert (merged.documents, merged.options["complete"], merged.text_bytes) == (5, False, 0)
    assert merged.tokenizer["name"] == "bytes"


def test_a_merge_that_was_killed_leaves_nothing_for_good(tmp_path: Path) -> None:
    for name in "ab":
        build_dataset([Document(name, "f")], ByteTokenizer(), tmp_path / name)
    left = [".out.bin.node-1.tmp", ".out.idx.node-1.tmp", "out.building/seen", ".other.bin.node-1.tmp"]
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", dedup="exact")
    assert [path.name for path in tmp_path.glob(".*")] == [".other.bin.node-1.tmp"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), DataError("no space")])
def test_a_merge_that_ends_behind_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    """Tokens without PREFIX.json would be in the way of the next try."""
    for name in "ab":
        build_dataset([Document(name, "f")], ByteTokenizer(), tmp_path / name)
    prefixes = [tmp_path / "a", tmp_path / "b"]
    with monkeypatch.context() as patch:
        patch.setattr(assembly_module, "write_json", lambda *_: (_ for _ in ()).throw(fault))
        with pytest.raises(type(fault)):
            merge_datasets(prefixes, tmp_path / "out")
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob(".*"))
    with monkeypatch.context() as patch:  # killed: nothing is tidied up
        patch.setattr(assembly_module, "write_json", lambda *_: (_ for _ in ()).throw(fault))
        patch.setattr(merge_module.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(assembly_module, "_unlink_all", lambda *_: None)
        with pytest.raises(type(fault)):
            merge_datasets(prefixes, tmp_path / "out")
    assert (tmp_path / "out.bin").exists()
    with pytest.raises(DataError) as error:
        merge_datasets([*prefixes, tmp_path / "a"], tmp_path / "out")  # of something else
    assert_names(error.value, tmp_path / "out.bin", "--overwrite")
    assert (tmp_path / "out.bin").exists()
    merge_datasets(prefixes, tmp_path / "out")
    IndexedDataset(tmp_path / "out").verify()
    assert not list(tmp_path.glob(".*"))


def test_two_merges_into_one_dataset_at_once(tmp_path: Path) -> None:
    for name in "ab":
        build_dataset([Document(name, "f")], ByteTokenizer(), tmp_path / name)
    prefixes, refused = [tmp_path / "a", tmp_path / "b"], list[str]()

    def another(_: str) -> None:
        with pytest.raises(DataError, match=r"out\.building") as error:
            merge_datasets(prefixes, tmp_path / "out")
        refused.append(str(error.value))

    merge_datasets(prefixes, tmp_path / "out", progress=another)
    assert len(refused) == 2
    IndexedDataset(tmp_path / "out").verify()


def test_inspection(tmp_path: Path, model_path: Path) -> None:
    prefix = tmp_path / "out"
    build_dataset([Document("one", "f"), Document("three", "f")], ByteTokenizer(), prefix)
    facts = describe(prefix, ByteTokenizer()) | verify(prefix)
    assert (facts["documents"], facts["tokens"]) == ("2", "10")
    assert "256" in facts.values()  # the largest token
    sha256 = hashlib.sha256(bin_path(prefix).read_bytes()).hexdigest()
    assert any(sha256 in value for value in facts.values())
    assert document_text(prefix, 1, ByteTokenizer()) == "three"
    assert document_text(prefix, 0) == "111 110 101 256"
    with IndexedDatasetWriter(tmp_path / "other", np.uint16) as writer:
        writer.append([1, 2, 300])
    with pytest.raises(DataError) as error:
        document_text(tmp_path / "other", 0, ByteTokenizer())
    assert_names(error.value, tmp_path / "other.bin", 0, 300, 257)
    with pytest.raises(DataError) as error:
        document_text(prefix, 2)
    assert_names(error.value, prefix, 2)
    other = load_tokenizer(model_path)
    with pytest.raises(DataError) as error:
        describe(prefix, other)
    assert_names(error.value, prefix, "bytes", ByteTokenizer.fingerprint[:12], model_path, other.fingerprint[:12])
    raw = bytearray(bin_path(prefix).read_bytes())
    raw[0] ^= 1
    bin_path(prefix).write_bytes(raw)
    with pytest.raises(DataError) as error:
        verify(prefix)
    assert_names(error.value, tmp_path / "out.bin", "out.json", sha256[:12])
    raw[1] = 9
    bin_path(prefix).write_bytes(raw)
    with pytest.raises(DataError) as error:
        verify(prefix)
    assert_names(error.value, tmp_path / "out.bin", 257)
