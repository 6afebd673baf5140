"""Evaluation sets kept out of a dataset: as a plain search finds them, the same for any build, counted and listed."""

from __future__ import annotations

import json
import random
import re
import string
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalm.data.analysis.dataset_info import describe, verify
from megalm.data.builder import builder as builder_module
from megalm.data.builder import word_hashes
from megalm.data.builder.build_plan import BuildOptions, Filters
from megalm.data.builder.builder import build_files, check_build
from megalm.data.builder.decontamination import (
    CUT_MARGIN,
    MOST_PARTS,
    OverlapOptions,
    Overlaps,
    describe_overlap,
    read_evaluation_sets,
    without_overlaps,
)
from megalm.data.builder.merge import merge_datasets
from megalm.data.builder.rebuild import Wanted, ensure_dataset, rebuild_command
from megalm.data.builder.word_hashes import words_of
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import DatasetMetadata, overlaps_path, read_sidecar
from megalm.data.readers.records import ReadOptions
from megalm.data.tokenizers.chat_template import ChatTemplate
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import ConfigError, DataError
from tests.messages import assert_names

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "Which planet of the sun has the most moons?"  # nine words
SMALL_UNITS = 4_000


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def filler(seed: int, words: int = 120) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9))) for _ in range(words))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    records = [{"question": QUESTION, "answer": "72"}, {"question": SHORT, "answer": "Saturn"}, {"question": "Why?"}]
    return write_lines(tmp_path / "exam.jsonl", records)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty documents, of which 7 and 40 quote the question, 20 the short one, and 30 only part of each."""
    texts = [filler(number) for number in range(60)]
    texts[7] = f"{texts[7]}\n{QUESTION.upper().replace(',', ' --')} {texts[7]}"
    texts[40] = QUESTION.partition("in May")[0] + texts[40]
    texts[20] += f" {SHORT}"
    texts[30] = " ".join(QUESTION.split()[:12]) + f" {texts[30]} " + " ".join(SHORT.split()[:8]) + " rings"
    return write_lines(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])


def options_of(*files: Path | str, **changes: Any) -> BuildOptions:
    return BuildOptions(overlap=OverlapOptions(tuple(map(str, files)), **changes), unit_bytes=SMALL_UNITS)


def build(corpus: Path, prefix: Path, options: BuildOptions, **more: Any) -> DatasetMetadata:
    return build_files([corpus], ByteTokenizer(), prefix, options, **more).reports[0]


def decoded(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [ByteTokenizer().decode(dataset[index].tolist()) for index in range(len(dataset))]


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def listed(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in overlaps_path(prefix).read_text().splitlines()]


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".sources", ".overlaps")]


@pytest.mark.parametrize(("tokens", "seed"), [(1, 0), (3, 1), (8, 2), (13, 3)])
def test_as_a_plain_search(tmp_path: Path, tokens: int, seed: int) -> None:
    """Texts of few different words, so that some runs are in both and others nearly."""
    generator = random.Random(seed)
    vocabulary = [*"abc", "Ä", "café", "東"]

    def text(words: int) -> str:
        return "".join(f"{generator.choice(vocabulary)}{generator.choice((' ', ', ', chr(10)))}" for _ in range(words))

    items = [text(generator.randint(0, 2 * tokens + 12)) for _ in range(30)]
    pieces = [item for item in items if len(words_in(item)) > 9]
    documents = [text(40) + generator.choice(pieces)[generator.randint(0, 3) :] + text(9) for _ in range(40)]
    options = OverlapOptions((str(write_lines(tmp_path / "items.jsonl", items)),), tokens)
    index = read_evaluation_sets(options, ByteTokenizer())
    found = index.find(documents)
    matched = 0
    for number, document in enumerate(documents):
        words = words_in(document)
        expected = set()
        for item in items:
            wanted = [word for _, _, word in words_in(item)]
            size = tokens if len(wanted) >= tokens else len(wanted) if len(wanted) >= min(tokens, 8) else 0
            runs = {tuple(wanted[start : start + size]) for start in range(len(wanted) - size + 1)} if size else set()
            for start in range(len(words) - size + 1):
                if tuple(word for _, _, word in words[start : start + size]) in runs:
                    expected.add((words[start][0], words[start + size - 1][1]))
        ours = found.get(number)
        assert (set() if ours is None else set(zip(ours.first.tolist(), ours.end.tolist(), strict=True))) == expected
        matched += bool(expected)
    assert matched if tokens > 1 else matched == len(documents)
    short = [item for item in items if len(words_in(item)) < min(tokens, 8)]
    assert (index.files[0].items, index.files[0].unchecked) == (30, len(short))


def words_in(text: str) -> list[tuple[int, int, str]]:
    """First and end character, and the folded word, by regular expressions."""
    found = re.finditer(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text)
    bare = [(match.start(), match.end(), unicodedata.normalize("NFKD", match.group())) for match in found]
    return [(start, end, re.sub("[\u0300-\u036f]", "", word).casefold()) for start, end, word in bare]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Don't STOP me—now!", "don\u2019t, stop (me) now"),
        ("Café résumé", "cafe\u0301 RE\u0301SUME\u0301"),
        ("\uff26\uff35\uff2c\uff2c width", "full\u3000width"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("x_1=f(y)", "X 1 F Y"),
        ("ὁ ΣΊΣΥΦΟΣ", "\u03bf σισυφος"),
        ("東京は 日本", "東 京は日本"),
    ],
)
def test_what_counts_as_the_same_words(one: str, other: str) -> None:
    assert words_of(one).hashes.tolist() == words_of(other).hashes.tolist()
    assert len(words_of(one).hashes) > 1


def test_other_words_have_other_hashes() -> None:
    texts = ["ab c", "a bc", "abc", "a b c", "ba c", "acb", "東京", "京東", "한국", "하국", "क", "कि", "1", "11"]
    rows = [tuple(words_of(text).hashes.tolist()) for text in texts]
    assert len(set(rows)) == len(texts)
    many = [f"{left}{right}" for left in string.ascii_lowercase for right in string.ascii_lowercase]
    assert len(set(words_of(" ".join(many)).hashes.tolist())) == 26 * 26


def test_words_do_not_depend_on_the_pieces_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{filler(3, 400)} éa\u0301 東京 {filler(4, 30)}", filler(5, 100), "x" * 70, ""]
    whole = [words_of(text) for text in texts]
    monkeypatch.setattr(word_hashes, "PIECE", 64)
    for text, expected in zip(texts[:2], whole, strict=False):
        for ours, theirs in zip(words_of(text), expected, strict=True):
            assert np.array_equal(ours, theirs)
    groups = [*word_hashes.grouped_words(["ab", *texts[:1], *["c d"] * 40])]
    assert sum(len(group.starts) for group in groups) == 42
    assert len(groups) > 3


def test_documents_are_dropped_counted_and_listed(tmp_path: Path, corpus: Path, evaluation: Path) -> None:
    report = build(corpus, tmp_path / "out", options_of(evaluation))
    texts = texts_of(corpus)
    assert decoded(tmp_path / "out") == [text for number, text in enumerate(texts) if number not in (7, 20, 40)]
    assert report.removed == {"overlap": 3}
    overlap, size = report.overlap, len(evaluation.read_bytes())
    assert (overlap["checked"], overlap["documents"], overlap["dropped"], overlap["parts"]) == (60, 3, 3, 0)
    assert overlap["checked_bytes"] == sum(map(len, texts))
    assert overlap["removed_bytes"] == sum(len(texts[number]) for number in (7, 20, 40))
    (file,) = overlap["files"]
    assert (file["path"], file["bytes"], file["documents"]) == (str(evaluation), size, 3)
    assert (file["items"], file["whole"], file["unchecked"]) == (3, 1, 1)
    assert overlap["unchecked"] == [f"{evaluation}:3"]
    rows = listed(tmp_path / "out")
    assert [(row["document"], row["evaluation"]) for row in rows] == [
        (f"{corpus}:8", f"{evaluation}:1"),
        (f"{corpus}:21", f"{evaluation}:2"),
        (f"{corpus}:41", f"{evaluation}:1"),
    ]
    first = words_in(QUESTION)[12][1]
    assert rows[0]["text"] == QUESTION.upper().replace(",", " --")[: first + 2]
    assert (rows[1]["text"], rows[0]["matches"], rows[1]["matches"]) == (SHORT.rstrip("?"), 8, 1)
    assert rows[2]["text"] == QUESTION[:first]
    verify(tmp_path / "out")
    told = "\n".join(describe_overlap(overlap))
    assert_names(told, evaluation, 3, 60, 13, 8)
    shown = describe(tmp_path / "out")
    assert [value for name, value in shown.items() if name.startswith("overlap")][1:] == told.splitlines()[1:]


def test_the_same_for_any_units_shards_and_restarts(
    tmp_path: Path, corpus: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(evaluation)
    whole = build(corpus, tmp_path / "whole", options)
    expected = contents(tmp_path / "whole")
    build(corpus, tmp_path / "other", replace(options, unit_bytes=None))
    assert contents(tmp_path / "other") == expected
    shards = [str(tmp_path / f"shard{number}") for number in range(3)]
    for number, prefix in enumerate(shards):
        build(corpus, Path(prefix), replace(options, shard=(number, 3)))
    merged = merge_datasets(shards, tmp_path / "merged")
    # Two shards share the file, which the merge lists for each.
    assert [contents(tmp_path / "merged")[place] for place in (0, 1, 3)] == [expected[place] for place in (0, 1, 3)]
    assert (merged.overlap, merged.removed) == (whole.overlap, whole.removed)

    stopped = tmp_path / "stopped"
    add = builder_module._Counts.add
    counted: list[object] = []

    def add_until(self: Any, *given: Any) -> None:
        add(self, *given)
        counted.append(given)
        if len(counted) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(builder_module._Counts, "add", add_until)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, stopped, options)
    again = build_files([corpus], ByteTokenizer(), stopped, options)
    assert again.resumed > 0
    assert contents(stopped) == expected
    assert build_files([corpus], ByteTokenizer(), stopped, options).was_there


def test_a_changed_set_is_noticed(tmp_path: Path, corpus: Path, evaluation: Path) -> None:
    options, prefix = options_of(evaluation), tmp_path / "out"
    build(corpus, prefix, options)
    wanted = Wanted(ByteTokenizer(), inputs=[str(corpus)])
    assert ensure_dataset(prefix, wanted, "auto") is None
    sidecar = read_sidecar(prefix)
    assert sidecar is not None
    words = rebuild_command(prefix, sidecar, wanted).split()
    assert words[words.index("--exclude-overlap") + 1] == str(evaluation)
    evaluation.write_text(evaluation.read_text() + json.dumps({"question": texts_of(corpus)[2]}) + "\n")
    with pytest.raises(DataError) as error:
        build(corpus, prefix, options)
    assert_names(error.value, f"{prefix}.bin", "--overwrite")
    rebuilt = ensure_dataset(prefix, wanted, "auto")
    assert rebuilt is not None
    assert rebuilt.reports[0].removed == {"overlap": 4}
    build(corpus, prefix, BuildOptions(), overwrite=True)
    assert not overlaps_path(prefix).exists(), "of an older dataset"


def write_set(folder: Path, kind: str) -> tuple[Path, str]:
    """An evaluation set that has the question second, and the name of that item."""
    path = folder / f"set{kind}"
    texts = [filler(900), QUESTION]
    if kind == ".parquet":
        table = pyarrow.table({"id": [1, 2], "choices": [[texts[0]], ["no", QUESTION]]})
        pyarrow.parquet.write_table(table, path)
        return path, f"{path}:1"
    if kind == "":
        build_files([write_lines(folder / "held.jsonl", texts)], ByteTokenizer(), path)
        return path, f"{path}[1]"
    if kind == ".jsonl":
        return write_lines(path, [{"ctx": texts[0]}, {"id": 7, "doc": {"endings": ["no", QUESTION]}}]), f"{path}:2"
    path.write_text(json.dumps(texts, indent=1) if kind == ".json" else f"{texts[0]}\n\n{QUESTION}\n")
    return path, {".json": f"{path}[1]", ".txt": f"{path}:3", ".md": str(path)}[kind]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt", ".md", ".parquet", ""])
def test_every_kind_of_set(tmp_path: Path, corpus: Path, kind: str) -> None:
    path, name = write_set(tmp_path, kind)
    report = build(corpus, tmp_path / "out", options_of(path))
    assert report.removed == {"overlap": 2}
    assert {row["evaluation"] for row in listed(tmp_path / "out")} == {name}


def test_only_the_chosen_keys_are_compared(tmp_path: Path, corpus: Path) -> None:
    records = [{"question": QUESTION, "source": texts_of(corpus)[50]}]
    path = write_lines(tmp_path / "exam.jsonl", records)
    assert build(corpus, tmp_path / "all", options_of(path)).removed == {"overlap": 3}
    assert build(corpus, tmp_path / "one", options_of(path, keys=("question",))).removed == {"overlap": 2}


def test_cut_keeps_the_parts_around(tmp_path: Path, evaluation: Path) -> None:
    before, after = filler(1, 80), filler(2, 90)
    both = f"{before} {QUESTION} {after}"
    texts = [filler(0), both, f"{filler(3, 8)} {QUESTION} {after}", QUESTION, both]
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    report = build(corpus, tmp_path / "out", options_of(evaluation, action="cut"))
    documents = decoded(tmp_path / "out")
    assert documents[0] == texts[0]
    assert len(documents) == 6
    assert documents[1:3] == documents[4:]
    for part, whole in ((documents[1], before), (documents[2], after), (documents[3], after)):
        assert len(whole) - CUT_MARGIN - 12 < len(part) <= len(whole) - CUT_MARGIN + 8
        assert f" {part} " in f" {whole} ", "whole words"
    assert before.startswith(documents[1])
    assert after.endswith(documents[2])
    overlap = report.overlap
    assert (overlap["documents"], overlap["dropped"], overlap["parts"]) == (4, 1, 5)
    assert overlap["removed_bytes"] == sum(map(len, texts)) - sum(map(len, documents))
    assert report.removed == {"overlap": 1}
    assert report.text_bytes == sum(map(len, documents))
    # The parts are documents like others: filters see them, and each has its place.
    filtered = replace(options_of(evaluation, action="cut"), filters=Filters(min_characters=len(documents[1]) + 1))
    assert build(corpus, tmp_path / "long", filtered).removed == {"min_characters": 2, "overlap": 1}


def test_a_document_in_too_many_parts_is_left_out() -> None:
    def cut(times: int) -> list[str]:
        text, spans = "", []
        for number in range(times):
            text += filler(number, 200)
            spans.append((len(text), len(text) + 5))
            text += "match"
        rows = np.array(spans, dtype=np.int64)
        return without_overlaps(text + filler(99, 200), Overlaps(rows[:, 0], rows[:, 1], np.zeros(times, np.int64)))

    assert len(cut(MOST_PARTS - 1)) == MOST_PARTS
    assert cut(MOST_PARTS) == []


def test_with_a_split_and_without_duplicates(tmp_path: Path, corpus: Path, evaluation: Path) -> None:
    doubled = write_lines(tmp_path / "doubled.jsonl", [{"text": text} for text in texts_of(corpus) * 2])
    options = replace(options_of(evaluation), dedup="exact", split=(80, 20))
    reports = build_files([doubled], ByteTokenizer(), tmp_path / "out", options).reports
    assert [report.removed for report in reports] == [{"overlap": 6, "exact": 57}] * 2
    assert sum(report.documents for report in reports) == 57
    assert listed(tmp_path / "out-train") == listed(tmp_path / "out-validation")


def test_conversations(tmp_path: Path, evaluation: Path) -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": "72"}] for text in ("Hi", QUESTION)]
    path = write_lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    options = replace(options_of(evaluation), read=ReadOptions(messages_key="messages"), chat=template)
    report = build(path, tmp_path / "out", options)
    assert (report.documents, report.removed) == (1, {"overlap": 1})
    assert listed(tmp_path / "out")[0]["document"] == f"{path}:2"
    with pytest.raises(DataError) as error:
        replace(options, overlap=OverlapOptions((str(evaluation),), action="cut"))
    assert_names(error.value, "--overlap-action", "--messages-key")


def test_a_merge_with_what_was_not_compared_is_reported(
    tmp_path: Path, corpus: Path, evaluation: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(corpus, tmp_path / "clean", options_of(evaluation))
    build(corpus, tmp_path / "plain", BuildOptions())
    merged = merge_datasets([tmp_path / "clean", tmp_path / "plain"], tmp_path / "merged")
    assert merged.overlap == {}
    assert not overlaps_path(tmp_path / "merged").exists()
    assert_names(caplog.messages[0], tmp_path / "plain", "--exclude-overlap")


def test_what_cannot_be_compared_is_refused_before_any_work(tmp_path: Path, corpus: Path, evaluation: Path) -> None:
    def refused(options: BuildOptions, *names: object) -> None:
        for check in (check_build, build_files):
            with pytest.raises((DataError, ConfigError)) as error:
                check([corpus], ByteTokenizer(), tmp_path / "out", options)
            assert_names(error.value, *names)
            assert "\n" not in str(error.value)
        assert not [*tmp_path.glob("out*")]

    refused(options_of(tmp_path / "no.jsonl"), "--exclude-overlap", tmp_path / "no.jsonl")
    refused(options_of("-"), "--exclude-overlap", "-")
    short = write_lines(tmp_path / "short.jsonl", ["one two three", "four"])
    refused(options_of(evaluation, short), "--exclude-overlap", short, 8)
    refused(options_of(short, tokens=4), short, 4)
    (tmp_path / "broken.jsonl").write_text('{"question": "no end\n')
    refused(options_of(tmp_path / "broken.jsonl"), "--exclude-overlap", f"{tmp_path / 'broken.jsonl'}:1")
    refused(options_of(evaluation, keys=("answer",)), f"{evaluation}:3", "'answer'", "--overlap-key")
    pyarrow.parquet.write_table(pyarrow.table({"q": [QUESTION]}), tmp_path / "set.parquet")
    refused(options_of(tmp_path / "set.parquet", keys=("answer",)), "'answer'", "--overlap-key")
    refused(options_of(corpus), corpus, "--exclude-overlap")
    with pytest.raises(DataError) as error:
        OverlapOptions((str(evaluation),), tokens=0)
    assert_names(error.value, "--overlap-tokens", 0)
    build_files([corpus], ByteTokenizer(), tmp_path / "held")
    with pytest.raises(ConfigError) as refusal:
        build(tmp_path / "short.jsonl", tmp_path / "held", options_of(tmp_path / "held"), overwrite=True)
    assert_names(refusal.value, tmp_path / "held.bin")
