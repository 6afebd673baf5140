"""Building of files: the same bytes whatever the workers, the units and the interruptions; everything counted."""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import json
import lzma
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from backports import zstd

from megalm.data.analysis.dataset_info import describe, verify
from megalm.data.builder import assembler as assembly_module
from megalm.data.builder import build_plan as plan_module
from megalm.data.builder import builder as builder_module
from megalm.data.builder.build_plan import BuildOptions, Filters
from megalm.data.builder.builder import BuildProgress, Built, build_files
from megalm.data.builder.merge import merge_datasets
from megalm.data.indexed.dataset import IndexedDataset, sidecar_path
from megalm.data.indexed.metadata import DocumentSources
from megalm.data.readers.input_files import InputFile
from megalm.data.readers.losses import Losses
from megalm.data.readers.records import ReadOptions
from megalm.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megalm.errors import ConfigError, DataError
from tests.messages import assert_names
from tests.unit.data.test_tokenizer import byte_level_json, words_json

SMALL_UNITS = 20_000


@pytest.fixture
def texts(source_texts: list[str]) -> list[str]:
    return [part for text in source_texts for part in text.split("\n\n") if part]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> list[Path]:
    """The same documents in three kinds of file, and one that is packed."""
    quarter = len(texts) // 4
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:quarter])
    (folder / "a.jsonl").write_text(lines)
    with gzip.open(folder / "b.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps({"text": text}) + "\n" for text in texts[quarter : 2 * quarter])
    (folder / "c.json").write_text(json.dumps(texts[2 * quarter : 3 * quarter], indent=1))
    table = pyarrow.table({"text": texts[3 * quarter :]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=20)
    return sorted(folder.iterdir())


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".sources")]


def decoded(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [ByteTokenizer().decode(dataset[index].tolist()) for index in range(len(dataset))]


@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, SMALL_UNITS), (2, SMALL_UNITS), (1, None)])
def test_every_kind_of_file_in_order(
    tmp_path: Path, corpus: list[Path], texts: list[str], workers: int, unit_bytes: int | None
) -> None:
    steps: list[BuildProgress] = []
    options = BuildOptions(unit_bytes=unit_bytes)
    built = build_files(corpus, ByteTokenizer(), tmp_path / "out", options, workers, steps.append)
    assert decoded(tmp_path / "out") == texts
    (report,) = built.reports
    assert (report.documents, report.tokens) == (len(texts), sum(len(text.encode()) + 1 for text in texts))
    assert report.text_bytes == sum(len(text.encode()) for text in texts)
    assert steps[-1] == BuildProgress(report.documents, report.text_bytes, report.tokens, 1.0, "writing")
    verify(tmp_path / "out")
    assert not list(tmp_path.glob("*.building*")) + list(tmp_path.glob(".*"))
    sources = DocumentSources(tmp_path / "out", len(texts))
    for document in (0, 5, len(texts) // 4 - 1):
        source = sources[document]
        assert source is not None
        assert source.name == f"{corpus[0]}:{document + 1}"
        raw = corpus[0].read_bytes()[source.start : source.start + source.size]
        assert json.loads(raw)["text"] == texts[document]
    names = [str(source.name) if (source := sources[document]) else "" for document in range(len(texts))]
    quarter = len(texts) // 4
    assert names[quarter : quarter + 2] == [f"{corpus[1]}:1", f"{corpus[1]}:2"]
    assert names[3 * quarter - 1] == f"{corpus[2]}[{quarter - 1}]"
    assert names[-1] == f"{corpus[3]}:{len(texts) - 3 * quarter - 1}"


def test_the_same_bytes_for_any_workers_and_units(tmp_path: Path, corpus: list[Path], model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    results = []
    for number, (workers, unit) in enumerate([(1, None), (2, SMALL_UNITS), (1, 7_000)]):
        build_files(corpus, tokenizer, tmp_path / f"out{number}", BuildOptions(unit_bytes=unit), workers)
        results.append(contents(tmp_path / f"out{number}"))
    assert results[0] == results[1] == results[2]


class Stop(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def build_until(step: int, monkeypatch: pytest.MonkeyPatch, corpus: list[Path], prefix: Path) -> Built | None:
    """Build; after `step` units, or (-1) between the names of .bin and .json, the process is gone."""
    options = BuildOptions(unit_bytes=SMALL_UNITS, dedup="exact")
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(builder_module._Counts, "add", add)
        if step == -1:
            patch.setattr(assembly_module, "write_json", lambda *_: (_ for _ in ()).throw(Stop()))
            patch.setattr(assembly_module, "_unlink_all", lambda *_: None)
        try:
            return build_files(corpus, ByteTokenizer(), prefix, options)
        except Stop:
            return None


@pytest.mark.parametrize("step", [1, 4, -1])
def test_goes_on_from_finished_units(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = build_until(0, monkeypatch, corpus, tmp_path / "whole")
    assert whole is not None
    assert build_until(step, monkeypatch, corpus, tmp_path / "out") is None
    assert not (tmp_path / "out.json").exists()
    assert (tmp_path / "out.bin").exists() == (step == -1)
    resumed = build_until(0, monkeypatch, corpus, tmp_path / "out")
    assert resumed is not None
    assert (resumed.resumed > 0, resumed.was_there) == (True, False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert json.loads(sidecar_path(tmp_path / "out").read_text()) | {"prefix": "whole"} == json.loads(
        sidecar_path(tmp_path / "whole").read_text()
    )


@pytest.mark.parametrize("suffix", ["tokens", "npz", "json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_parts_are_made_again(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    build_until(0, monkeypatch, corpus, tmp_path / "whole")
    build_until(4, monkeypatch, corpus, tmp_path / "out")
    part = sorted((tmp_path / "out.building").glob(f"*.{suffix}"))[0]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    try:
        build_until(0, monkeypatch, corpus, tmp_path / "out")
    except DataError as error:  # found only when it was read: the next try makes it anew
        assert_names(error, part.with_suffix(".tokens"))
        build_until(0, monkeypatch, corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("content", ["", "{}", "[]", "null"])
def test_a_damaged_plan_is_made_again(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    build_until(0, monkeypatch, corpus, tmp_path / "whole")
    build_until(4, monkeypatch, corpus, tmp_path / "out")
    (tmp_path / "out.building" / "plan.json").write_text(content)
    for part in (tmp_path / "out.building").glob("0*.json"):
        part.write_text(content)
    build_until(0, monkeypatch, corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_build_writes_nothing(tmp_path: Path, corpus: list[Path]) -> None:
    def states() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}

    first = build_files(corpus, ByteTokenizer(), tmp_path / "out")
    before = states()
    again = build_files(corpus, ByteTokenizer(), tmp_path / "out", workers=2)
    assert again.was_there
    assert again.reports == first.reports
    assert states() == before
    corpus[0].touch()  # its content is the same
    assert build_files(corpus, ByteTokenizer(), tmp_path / "out").was_there
    with pytest.raises(DataError) as error:
        build_files(corpus, ByteTokenizer(), tmp_path / "out", BuildOptions(append_eod=False))
    assert_names(error.value, tmp_path / "out.bin", "--overwrite")
    corpus[0].write_text(json.dumps({"text": "other"}))
    with pytest.raises(DataError) as error:
        build_files(corpus, ByteTokenizer(), tmp_path / "out")
    assert_names(error.value, tmp_path / "out.bin", "--overwrite")
    build_files(corpus, ByteTokenizer(), tmp_path / "out", overwrite=True)
    assert decoded(tmp_path / "out")[0] == "other"


def test_other_options_throw_old_parts_away(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build_until(3, monkeypatch, corpus, tmp_path / "out")
    build_files(corpus, ByteTokenizer(), tmp_path / "out", BuildOptions(append_eod=False))
    (warning,) = caplog.messages
    assert_names(warning, tmp_path / "out.building")
    build_files(corpus, ByteTokenizer(), tmp_path / "fresh", BuildOptions(append_eod=False))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
def test_duplicates(tmp_path: Path, texts: list[str], dedup: str) -> None:
    longest = sorted(texts, key=len)[-40:]
    changed = [" ".join(["Changed", *text.split()[1:]]) for text in longest[:10]]
    order = random.Random(1)
    copies = order.sample(longest, 25)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in [*longest, *copies, *changed]))
    built = build_files([path], ByteTokenizer(), tmp_path / "out", BuildOptions(dedup=dedup, unit_bytes=5000))  # type: ignore[arg-type]
    kept = decoded(tmp_path / "out")
    assert built.reports[0].removed == {dedup: 75 - len(kept)}
    if dedup == "exact":
        assert kept == [*longest, *changed]
    else:
        assert kept[:30] == longest[:30]
        assert len(kept) <= 42  # one word of many is another: nearly all are found


def test_filters_are_counted(tmp_path: Path) -> None:
    documents = [
        "short",
        "x" * 5000,
        "1 2 3 4 5 6 7 8 9 10 + - * /",
        "the same line\n" * 50,
        "A fair sentence of words.",
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in documents))
    filters = Filters(
        min_characters=6, max_characters=4000, min_letter_share=0.5, max_repeated_line_share=0.5, max_word_length=20
    )
    built = build_files([tmp_path], ByteTokenizer(), tmp_path / "out", BuildOptions(filters=filters))
    assert decoded(tmp_path / "out") == documents[-1:]
    assert built.reports[0].removed == {
        "min_characters": 1,
        "max_characters": 1,
        "min_letter_share": 1,
        "max_repeated_line_share": 1,
        "max_word_length": 0,
    }


def test_bad_input_is_fatal_or_counted_with_file_and_line(tmp_path: Path) -> None:
    lines = [b'{"text": "%d"}' % number for number in range(3000)]
    lines[1700], lines[2500] = b'{"text": broken', b'{"text": ""}'
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(DataError) as error:
            build_files([path], ByteTokenizer(), tmp_path / "out", BuildOptions(unit_bytes=8000), workers)
        assert_names(error.value, f"{path}:1701", "--on-error skip")
    options = BuildOptions(unit_bytes=8000, on_error="skip")
    (report,) = build_files([path], ByteTokenizer(), tmp_path / "out", options, overwrite=True).reports
    assert (report.documents, report.skipped, report.empty_documents) == (2998, 1, 1)
    assert [message.split(": ")[0] for message in report.messages] == [f"{path}:1701"]
    options = BuildOptions(unit_bytes=8000, on_error="skip", empty_documents="fail")
    with pytest.raises(DataError) as error:
        build_files([path], ByteTokenizer(), tmp_path / "strict", options)
    assert_names(error.value, f"{path}:2501", "--empty-documents skip")


MEMBER = gzip.compress(b"".join(b'{"text": "%d %d"}\n' % (number, number**7) for number in range(4000)))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("unit_bytes", [None, 30_000])
@pytest.mark.parametrize(
    ("name", "content", "lost_share"),
    [
        ("b.jsonl.gz", MEMBER * 2 + MEMBER[1:] * 3, 0.6),
        ("b.jsonl.gz", b"no gzip" * 1000, 1.0),
        ("b.json", b'{"a":\n1}' + b" " * 50_000, 1.0),
        ("b.json", json.dumps(["a"] + ["b" * 3_000_000] + ["c"] * 9000).encode(), 0.99),
        ("b.parquet", b"PAR1" * 1000, 1.0),
    ],
)
def test_a_lost_file_is_no_document(
    tmp_path: Path, name: str, content: bytes, lost_share: float, unit_bytes: int | None, workers: int
) -> None:
    """It is counted apart, with its bytes, and a large loss is refused until it is accepted."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "whole"}\n' * 10 + b"broken\n")
    (tmp_path / name).write_bytes(content)
    inputs, read = [tmp_path / "a.jsonl", tmp_path / name], ReadOptions(largest_bytes=60_000)
    options = BuildOptions(on_error="skip", unit_bytes=unit_bytes, read=read)
    with pytest.raises(DataError) as error:
        build_files(inputs, ByteTokenizer(), tmp_path / "out", options, workers)
    assert_names(error.value, "--max-loss", f"{tmp_path / 'a.jsonl'}:11")
    assert not (tmp_path / "out.bin").exists()
    accepted = replace(options, max_loss=1.0)
    built = build_files(inputs, ByteTokenizer(), tmp_path / "out", accepted, workers)
    assert built.resumed > 0, "what was read is kept for a second try"
    (report,) = built.reports
    losses = Losses.from_report(report.losses)
    assert (report.skipped, losses.skipped, losses.lost_files, len(report.messages)) == (1, 1, 1, 2)
    assert losses.input_bytes == sum(path.stat().st_size for path in inputs)
    assert losses.lost_bytes == pytest.approx(lost_share * len(content), rel=0.3)
    with pytest.raises(DataError, match="--max-loss"):  # a stricter look at the same dataset
        build_files(inputs, ByteTokenizer(), tmp_path / "out", options, workers)
    assert build_files(inputs, ByteTokenizer(), tmp_path / "out", accepted, workers).was_there


def test_a_few_documents_may_be_skipped_whatever_their_share(tmp_path: Path) -> None:
    """Unless a limit is given: it holds for their number, and for their bytes."""
    path = tmp_path / "in.jsonl"
    options = BuildOptions(on_error="skip")
    for number, (broken, limit, is_refused) in enumerate(
        (
            (["broken"] * 20, None, False),
            (["broken"] * 21, None, True),
            (["x" * (1 << 20)], None, False),
            (["x" * ((1 << 20) + 1)], None, True),
            (["broken"], 0.009, True),
            (["broken"], 0.01, False),
            (["x" * 1000], 0.02, True),
        )
    ):
        path.write_text("".join('{"text": "a"}\n' for _ in range(100 - len(broken))) + "\n".join(broken))
        prefix, limited = tmp_path / f"out{number}", replace(options, max_loss=limit)
        if is_refused:
            with pytest.raises(DataError) as error:
                build_files([path], ByteTokenizer(), prefix, limited)
            assert_names(error.value, "--max-loss", len(broken), 100, f"{path}:{101 - len(broken)}")
        else:
            build_files([path], ByteTokenizer(), prefix, limited)


@pytest.mark.parametrize(("content", "removed"), [(b'{"text": "a"}\n' * 7, 7), (b"", 0), (b"broken\n" * 30, 0)])
def test_nothing_to_build_of(tmp_path: Path, content: bytes, removed: int) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    options = BuildOptions(on_error="skip", filters=Filters(min_characters=5))
    with pytest.raises(DataError) as error:
        build_files([tmp_path / "in.jsonl"], ByteTokenizer(), tmp_path / "out", options)
    assert_names(error.value, tmp_path / "out", 0, removed)
    assert "--max-loss" not in str(error.value)
    assert not list(tmp_path.glob("out.*i*x"))


def test_split_is_contiguous_and_whole(tmp_path: Path, corpus: list[Path], texts: list[str]) -> None:
    built = build_files(corpus, ByteTokenizer(), tmp_path / "x", BuildOptions(split=(90, 5, 5), unit_bytes=SMALL_UNITS))
    parts = [decoded(tmp_path / f"x-{name}") for name in ("train", "validation", "test")]
    assert [text for part in parts for text in part] == texts
    assert [len(part) for part in parts] == [report.documents for report in built.reports]
    assert abs(len(parts[0]) / len(texts) - 0.9) < 0.01
    assert build_files(corpus, ByteTokenizer(), tmp_path / "x", BuildOptions(split=(90, 5, 5))).was_there
    with pytest.raises(DataError, match="--split"):
        BuildOptions(split=(1,))


def test_shards_merged_are_the_whole(tmp_path: Path, corpus: list[Path]) -> None:
    shards = 3
    build_files(corpus, ByteTokenizer(), tmp_path / "whole", BuildOptions(unit_bytes=SMALL_UNITS))
    for shard in range(shards):
        options = BuildOptions(unit_bytes=SMALL_UNITS, shard=(shard, shards))
        build_files(corpus, ByteTokenizer(), tmp_path / f"s{shard}", options)
    prefixes = [tmp_path / f"s{shard}" for shard in range(shards)]
    report = merge_datasets(prefixes, tmp_path / "merged")
    assert (report.skipped, report.documents) == (0, len(decoded(tmp_path / "whole")))
    written = (tmp_path / "merged.bin").stat().st_mtime_ns
    assert merge_datasets(prefixes, tmp_path / "merged") == report
    assert (tmp_path / "merged.bin").stat().st_mtime_ns == written
    assert contents(tmp_path / "merged")[:2] == contents(tmp_path / "whole")[:2]
    verify(tmp_path / "merged")
    count = len(decoded(tmp_path / "whole"))
    merged, known = DocumentSources(tmp_path / "merged", count), DocumentSources(tmp_path / "whole", count)
    assert count > 200
    assert [merged[place] for place in range(0, 200, 7)] == [known[place] for place in range(0, 200, 7)]


def test_a_shard_of_an_input_that_grew_is_not_done(tmp_path: Path) -> None:
    """What came to the input may belong to this shard, or to none that is built again."""
    folder = tmp_path / "raw"
    folder.mkdir()
    options = BuildOptions(shard=(0, 2))
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name * 100}) + "\n")
    build_files([folder], ByteTokenizer(), tmp_path / "s0", options)
    assert build_files([folder], ByteTokenizer(), tmp_path / "s0", options).was_there
    (folder / "c.jsonl").write_text(json.dumps({"text": "c" * 100}) + "\n")
    with pytest.raises(DataError) as error:
        build_files([folder], ByteTokenizer(), tmp_path / "s0", options)
    assert_names(error.value, tmp_path / "s0.bin", "--overwrite")


def test_a_file_that_is_named_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in "abc"))
    build_files([path, path], ByteTokenizer(), tmp_path / "out")
    (warning,) = caplog.messages
    assert_names(warning, path)
    assert decoded(tmp_path / "out") == list("abcabc")
    sources = DocumentSources(tmp_path / "out", 6)
    assert [source.name for place in range(6) if (source := sources[place])] == 2 * [f"{path}:{n}" for n in (1, 2, 3)]
    assert build_files([path, path], ByteTokenizer(), tmp_path / "out").was_there
    with pytest.raises(DataError) as error:
        build_files([path], ByteTokenizer(), tmp_path / "out")
    assert_names(error.value, tmp_path / "out.bin", "--overwrite")


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"na\xefve.jsonl")
    path.write_text(json.dumps({"text": "a"}) + "\n")
    build_files([path], ByteTokenizer(), tmp_path / "out")
    verify(tmp_path / "out")
    source = DocumentSources(tmp_path / "out", 1)[0]
    assert source is not None
    assert source.name == f"{path}:1"
    assert build_files([path], ByteTokenizer(), tmp_path / "out").was_there


def test_a_little_text_is_shared_out(tmp_path: Path) -> None:
    """A file far smaller than a unit of work still gives every shard something."""
    lines = [json.dumps({"text": f"document {number}"}) for number in range(40)]
    (tmp_path / "small.jsonl").write_text("\n".join(lines))
    built = [
        build_files([tmp_path / "small.jsonl"], ByteTokenizer(), tmp_path / f"s{shard}", BuildOptions(shard=(shard, 4)))
        for shard in range(4)
    ]
    counts = [each.reports[0].documents for each in built]
    assert sum(counts) == 40
    assert min(counts) >= 5


def test_a_shard_of_an_input_that_cannot_be_cut(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "alone"}))
    with pytest.raises(DataError) as error:
        build_files([tmp_path / "one.jsonl"], ByteTokenizer(), tmp_path / "s0", BuildOptions(shard=(0, 2)))
    assert_names(error.value, "--shard 0/2", 1)


def test_damage_is_not_merged_and_not_verified(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 50)
        build_files([tmp_path / f"{name}.txt"], ByteTokenizer(), tmp_path / name)
    tokens = tmp_path / "b.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(b"x" + whole[1:])
    with pytest.raises(DataError, match=r"b\.bin"):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*")) + list(tmp_path.glob(".merged*"))
    tokens.write_bytes(whole)
    index = tmp_path / "b.idx"
    index.write_bytes(index.read_bytes() + b"\0")  # modes are allowed there, but were not written
    with pytest.raises(DataError) as error:
        verify(tmp_path / "b")
    assert_names(error.value, index, "b.json")


def test_blank_line_documents_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"title": "T", "body": "B"}\n')
    options = BuildOptions(read=ReadOptions(documents="blank-line", columns=("title", "body")))
    build_files([tmp_path], ByteTokenizer(), tmp_path / "out", options)
    assert decoded(tmp_path / "out") == ["one\ntwo", "three", "T\n\nB"]
    source = DocumentSources(tmp_path / "out", 3)[1]
    assert source is not None
    assert_names(source, f"{tmp_path / 'a.txt'}:6", 11, 16)


@pytest.mark.parametrize("blank", ["\n\n", "\n \n", ""])
def test_places_to_cut_at_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    """Text without an end must not be searched again from its start with every block."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 64)
    path = tmp_path / "in.txt"
    path.write_text("a line\n" * 500 + blank + "another\n" * 500)
    searched: list[int] = []
    options = ReadOptions(documents="blank-line")
    layout = plan_module.format_of(".txt", options)
    counting = replace(layout, first_end=lambda buffer: searched.append(len(buffer)) or layout.first_end(buffer))
    monkeypatch.setattr(plan_module, "format_of", lambda *_: counting)
    bounds = plan_module._bounds(InputFile.found_at(path), options, 1000)
    middle = 7 * 500 + len(blank)
    assert bounds == [0, *([middle] if blank else []), path.stat().st_size]
    assert max(searched) < 200
    assert sum(searched) < 4 * path.stat().st_size


def test_documents_too_long_are_refused(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * size}) for size in (10, 300_000, 20)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = BuildOptions(read=ReadOptions(largest_bytes=100_000))
    with pytest.raises(DataError) as error:
        build_files([tmp_path], ByteTokenizer(), tmp_path / "out", options)
    assert_names(error.value, f"{tmp_path / 'in.jsonl'}:2", "100,000", "--max-document-mb")
    (report,) = build_files(
        [tmp_path], ByteTokenizer(), tmp_path / "out", BuildOptions(read=options.read, on_error="skip")
    ).reports
    assert (report.documents, report.skipped) == (2, 1)
    again = build_files([tmp_path], ByteTokenizer(), tmp_path / "out", BuildOptions(read=options.read, on_error="skip"))
    assert again.was_there  # what was written into the folder is no input
    packed = tmp_path / "more" / "in.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    for workers, unit_bytes in ((1, None), (2, 8000)):
        limited = BuildOptions(read=options.read, on_error="skip", unit_bytes=unit_bytes)
        prefix = tmp_path / f"out{workers}"
        losses = build_files([packed], ByteTokenizer(), prefix, limited, workers).reports[0].losses
        assert (losses["read"], losses["skipped"], losses["lost_files"]) == (3, 1, 0)
        assert losses["skipped_bytes"] == pytest.approx(len(lines[1]), abs=1)
    assert again.reading.ignored_files == 4


def test_text_named_like_the_dataset_is_not_replaced_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.json").write_text('["a", "b"]')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"my\.json"):
        build_files(["my.json"], ByteTokenizer(), tmp_path / "my", overwrite=True)
    assert (tmp_path / "my.json").read_text() == '["a", "b"]'
    other = tmp_path / "other"
    other.mkdir()
    build_files(["my.json"], ByteTokenizer(), other / "my")
    assert decoded(other / "my") == ["a", "b"]


@pytest.mark.parametrize("link", ["same", "hard", "symbolic", "folder"])
@pytest.mark.parametrize("role", ["tokenizer", "input"])
def test_overwriting_never_destroys_what_the_build_reads(tmp_path: Path, role: str, link: str) -> None:
    folder, text = tmp_path / "col", tmp_path / "in.jsonl"
    folder.mkdir()
    text.write_text('{"text": "a b"}\n')
    read = folder / "my.json"
    if role == "tokenizer":
        vocabulary = tokenizers.models.WordLevel({"<eod>": 0, "a": 1, "b": 2}, unk_token="<eod>")
        tokenizers.Tokenizer(vocabulary).save(str(read))
    else:
        read.write_text('["a b"]')
    named = {"same": read, "folder": tmp_path / "other" / "my.json"}.get(link, tmp_path / "linked.json")
    if link == "hard":
        named.hardlink_to(read)
    elif link == "symbolic":
        named.symlink_to(read)
    elif link == "folder":
        (tmp_path / "other").symlink_to(folder)
    before = read.read_bytes()
    tokenizer = load_tokenizer(named) if role == "tokenizer" else ByteTokenizer()
    inputs = [text if role == "tokenizer" else named]
    with pytest.raises(ConfigError) as error:
        build_files(inputs, tokenizer, folder / "my", overwrite=True)
    assert_names(error.value, read, *({named} - {read}))
    assert "--overwrite" not in str(error.value)
    assert read.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["my.json"]
    build_files(inputs, tokenizer, folder / "other", overwrite=True)


def test_an_input_in_the_folder_that_a_build_empties(tmp_path: Path) -> None:
    text = tmp_path / "out.building" / "in.jsonl"
    text.parent.mkdir()
    text.write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=str(text)):
        build_files([text], ByteTokenizer(), tmp_path / "out")
    assert text.read_text() == '{"text": "a"}\n'


@pytest.mark.parametrize("name", ["notes.txt", "my.json", "000001.txt", "folder/notes.txt"])
def test_a_folder_with_files_of_others_is_not_emptied(tmp_path: Path, corpus: list[Path], name: str) -> None:
    kept = tmp_path / "out.building" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    with pytest.raises(DataError) as error:
        build_files(corpus, ByteTokenizer(), tmp_path / "out", overwrite=True)
    assert_names(error.value, tmp_path / "out.building" / Path(name).parts[0])
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("prefix", ["", ".", "data/.."])
def test_a_prefix_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=repr(str(Path(prefix)))):
        build_files(["in.jsonl"], ByteTokenizer(), Path(prefix))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "in.jsonl"]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_dataset_is_built_again(tmp_path: Path, corpus: list[Path], suffix: str, damage: str) -> None:
    """As the one who refuses it says. Where no size shows it, --overwrite reads it all to see."""
    build_files(corpus, ByteTokenizer(), tmp_path / "out")
    expected = contents(tmp_path / "out")
    merge_datasets([tmp_path / "out", tmp_path / "out"], tmp_path / "twice")
    for name in ("out", "twice"):
        path = tmp_path / f"{name}.{suffix}"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    if damage == "cut":
        with pytest.raises(DataError) as error:
            build_files(corpus, ByteTokenizer(), tmp_path / "out")
        assert_names(error.value, tmp_path / "out.bin", "--overwrite")
    assert not build_files(corpus, ByteTokenizer(), tmp_path / "out", overwrite=True).was_there
    assert contents(tmp_path / "out") == expected
    assert build_files(corpus, ByteTokenizer(), tmp_path / "out", overwrite=True).was_there
    merge_datasets([tmp_path / "out", tmp_path / "out"], tmp_path / "twice", overwrite=True)
    verify(tmp_path / "twice")


def test_an_input_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    monkeypatch.setattr(builder_module._Counts, "add", lambda *_: path.write_text('{"text": "abc"}\n'))
    with pytest.raises(DataError, match=str(path)):
        build_files([path], ByteTokenizer(), tmp_path / "out")
    assert not list(tmp_path.glob("out.bin"))


def test_two_builds_of_one_dataset_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    refused: list[str] = []

    def another(*_: object) -> None:
        with pytest.raises(DataError, match=r"out\.building") as error:
            build_files([path], ByteTokenizer(), tmp_path / "out")
        refused.append(str(error.value))

    monkeypatch.setattr(builder_module._Counts, "add", another)
    build_files([path], ByteTokenizer(), tmp_path / "out")
    assert len(refused) == 1
    assert decoded(tmp_path / "out") == ["a"]


def test_without_locks_it_is_built_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "as on Lustre, mounted without them")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    build_files([tmp_path / "in.jsonl"], ByteTokenizer(), tmp_path / "out")
    assert decoded(tmp_path / "out") == ["a"]


@pytest.mark.parametrize(
    ("bounds", "names"),
    [
        ({"min_letter_share": 2.0}, ["--min-letter-share 2"]),
        ({"max_repeated_line_share": -0.1}, ["--max-repeated-line-share -0.1"]),
        ({"max_word_length": 0.0}, ["--max-word-length 0"]),
        ({"max_word_length": float("nan")}, ["--max-word-length nan"]),
        ({"max_word_length": float("inf")}, ["--max-word-length inf"]),
        ({"min_characters": 10, "max_characters": 9}, ["--min-characters 10", "--max-characters 9"]),
    ],
)
def test_bounds_that_make_no_sense(bounds: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(DataError) as error:
        Filters(**bounds)
    assert_names(error.value, *names)
    Filters(min_characters=9, max_characters=9, min_letter_share=1.0, max_repeated_line_share=0.0)


def test_a_try_that_made_nothing_is_thrown_away_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n" + json.dumps({"text": "a"}) + "\n")
    with pytest.raises(DataError) as error:
        build_files([bad], ByteTokenizer(), tmp_path / "out")
    assert_names(error.value, f"{bad}:1", "'text'")
    build_files([bad], ByteTokenizer(), tmp_path / "out", BuildOptions(on_error="skip"))
    assert not caplog.messages


ENDS = ["<|im_end|>", "<|endoftext|>"]


def chat_json(folder: Path, texts: list[str]) -> Path:
    """A tokenizer with two tokens that could end a document; its tokenizer_config.json names the first."""
    path = byte_level_json(folder, texts)
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_special_tokens(ENDS)
    made.save(str(path))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ENDS[0]}))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_the_chosen_token_ends_every_document(
    tmp_path: Path, corpus: list[Path], texts: list[str], workers: int
) -> None:
    path, datasets = chat_json(tmp_path, texts), {}
    for name in (None, *ENDS):
        tokenizer = load_tokenizer(path, name)
        options = BuildOptions(unit_bytes=SMALL_UNITS)
        built = build_files(corpus, tokenizer, tmp_path / f"my-{name}", options, workers=workers)
        recorded = built.reports[0].tokenizer
        assert (recorded["eod_id"], recorded["eod_token"]) == (tokenizer.eod_id, name or ENDS[0])
        dataset = IndexedDataset(tmp_path / f"my-{name}")
        assert {int(dataset[number][-1]) for number in range(len(dataset))} == {tokenizer.eod_id}
        shown = describe(tmp_path / f"my-{name}")["end of document"]
        assert_names(shown, name or ENDS[0], tokenizer.eod_id)
        datasets[name] = contents(tmp_path / f"my-{name}")
    assert datasets[None] == datasets[ENDS[0]] != datasets[ENDS[1]]


def test_another_end_is_another_dataset(tmp_path: Path, corpus: list[Path], texts: list[str]) -> None:
    path = chat_json(tmp_path, texts)
    first = load_tokenizer(path, ENDS[0])
    build_files(corpus, first, tmp_path / "my")
    assert build_files(corpus, load_tokenizer(path), tmp_path / "my").was_there
    other = load_tokenizer(path, ENDS[1])
    with pytest.raises(DataError) as refused:
        build_files(corpus, other, tmp_path / "my")
    assert_names(refused.value, "--overwrite")
    assert not build_files(corpus, other, tmp_path / "my", overwrite=True).was_there


def unencodable(folder: Path, kind: str) -> tuple[Path, str, ReadOptions]:
    """A file whose last document of three holds a word that `words_json` lacks; and that document's place."""
    texts, options = ["some words", "words", "some unknown"], ReadOptions()
    name, place, content = {
        "lines": ("a.jsonl", ":3", b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)),
        "packed": ("a.jsonl.gz", ":3", gzip.compress("".join(f'"{text}"\n' for text in texts).encode())),
        "array": ("a.json", "[2]", json.dumps(texts).encode()),
        "parts": ("a.txt", ":5", "\n\n".join(texts).encode()),
        "whole": ("a.txt", "", texts[-1].encode()),
        "table": ("a.parquet", ":2", b""),  # rows count from 0
    }[kind]
    path = folder / name
    if kind == "parts":
        options = ReadOptions(documents="blank-line")
    if kind == "table":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2)
    else:
        path.write_bytes(content)
    return path, f"{path}{place}", options


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("lines", 1), ("lines", 2), ("packed", 2), ("array", 1), ("parts", 1), ("whole", 1), ("table", 1)],
)
def test_a_document_that_cannot_be_encoded_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    path, place, read = unencodable(tmp_path, kind)
    (tmp_path / "good.jsonl").write_text('"some"\n' * 5)
    tokenizer = load_tokenizer(words_json(tmp_path))
    options = BuildOptions(read=read, unit_bytes=20)
    with pytest.raises(DataError) as refused:
        build_files([tmp_path / "good.jsonl", path], tokenizer, tmp_path / "x", options, workers=workers)
    assert_names(refused.value, place, tokenizer.spec, "--on-error")
    skipping = replace(options, on_error="skip")
    built = build_files([tmp_path / "good.jsonl", path], tokenizer, tmp_path / "y", skipping, workers=workers)
    (report,) = built.reports
    assert (report.documents, report.skipped) == (5 if kind == "whole" else 7, 1)
    (message,) = report.messages
    assert_names(message, place, tokenizer.spec)
    assert build_files([tmp_path / "good.jsonl", path], tokenizer, tmp_path / "y", skipping).was_there


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt"])
def test_compressed_text_without_the_ending_is_named(tmp_path: Path, packing: str, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(PACKERS[packing](b'{"text": "some words"}\n' * 200))
    with pytest.raises(DataError) as refused:
        build_files([path], ByteTokenizer(), tmp_path / "x")
    assert_names(refused.value, path, packing)
    renamed = path.rename(tmp_path / f"a{kind}{packing}")
    assert build_files([renamed], ByteTokenizer(), tmp_path / "x").reports[0].text_bytes


def test_a_missing_key_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "some words"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"content": ["some words"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError) as refused:
            build_files([tmp_path / name], ByteTokenizer(), tmp_path / "x")
        assert_names(refused.value, "'text'", "content", "--text-key")
