"""Readers: every kind of file, packed or not, and every kind of damage named with file and line."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from megalm.data.readers.document_reader import Document, LossPolicy, OnError, iter_documents, read_documents
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.readers.records import ReadOptions
from megalm.errors import DataError
from tests.messages import assert_names

TEXTS = ["first\nwith a line", "", "café 😀", "last"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def json_lines() -> bytes:
    return b"\xef\xbb\xbf" + b"\n".join(json.dumps({"id": 1, "text": text}).encode() for text in TEXTS) + b"\n\n"


def json_array() -> bytes:
    return json.dumps([TEXTS[0], *({"text": text} for text in TEXTS[1:])]).encode()


def parquet_table() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"n": range(4), "text": TEXTS}), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def plain_text() -> bytes:
    return "one document,\r\nas it is café".encode()


KINDS = {
    ".jsonl": (json_lines, TEXTS),
    ".json": (json_array, TEXTS),
    ".parquet": (parquet_table, TEXTS),
    ".txt": (plain_text, ["one document,\r\nas it is café"]),
    ".md": (plain_text, ["one document,\r\nas it is café"]),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_kind(tmp_path: Path, kind: str, packing: str) -> None:
    content, texts = KINDS[kind]
    path = tmp_path / f"data.v1{kind}{packing}"
    path.write_bytes(PACK[packing](content()))
    report = ReadReport()
    documents = list(iter_documents([path], on_error="skip", report=report))
    filled = [text for text in texts if text]
    assert [document.text for document in documents] == filled
    assert (report.documents, report.losses.empty) == (len(filled), len(texts) - len(filled))
    assert (report.losses.skipped, report.losses.lost_files, report.messages) == (0, 0, [])
    assert report.losses.input_bytes == path.stat().st_size
    assert all(document.source.startswith(str(path)) for document in documents)
    assert len({document.source for document in documents}) == len(filled)
    if report.losses.empty:
        policy = LossPolicy(empty_documents="fail")
        with pytest.raises(DataError) as error:
            list(read_documents(find_inputs([path], report), policy, report))
        assert_names(error.value, path, "--empty-documents skip")


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_cut_short_is_never_taken_for_whole(tmp_path: Path, packing: str) -> None:
    lines = b"".join(json.dumps({"text": f"{number} {number**9}"}).encode() + b"\n" for number in range(6_000))
    packed = PACK[packing](lines)
    path = tmp_path / f"data.jsonl{packing}"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=rf"data\.jsonl{packing}:\d+"):
        list(iter_documents([path]))
    report = ReadReport()
    documents = list(iter_documents([path], on_error="skip", report=report))
    assert report.documents == len(documents) < 6_000
    assert (report.losses.lost_files, report.losses.skipped, len(report.messages)) == (1, 0, 1)
    path.write_bytes(packed)
    assert len(list(iter_documents([path]))) == 6_000


def test_what_comes_before_a_cut_is_kept(tmp_path: Path) -> None:
    """All of it, also where it is less than is read at once."""
    lines = b"".join(json.dumps({"text": f"{number} {number**9}"}).encode() + b"\n" for number in range(500))
    packed = PACK[".gz"](lines)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    there = zlib.decompressobj(wbits=31).decompress(path.read_bytes()).count(b"\n")
    assert there > 100
    assert len(list(iter_documents([path], on_error="skip"))) == there


PACKED = [packing for packing in PACK if packing]
PADDING = {".gz": b"\0" * 7, ".bz2": b"", ".xz": b"\0" * 8, ".zst": b""}


@pytest.mark.parametrize("packing", PACKED)
def test_all_streams_of_a_packed_file_are_read(tmp_path: Path, packing: str) -> None:
    streams = [PACK[packing](f'{{"text": "{number}"}}\n'.encode()) + PADDING[packing] for number in range(4)]
    path = tmp_path / f"streams.jsonl{packing}"
    path.write_bytes(b"".join(streams))
    assert [document.text for document in iter_documents([path])] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("damage", ["magic", "rubbish", "cut"])
@pytest.mark.parametrize("packing", PACKED)
def test_damage_behind_a_whole_stream_is_reported(tmp_path: Path, packing: str, damage: str) -> None:
    first, second = (PACK[packing](f'{{"text": "{number}"}}\n'.encode()) for number in range(2))
    behind = {"magic": bytes([second[0] ^ 1]) + second[1:], "rubbish": b"rubbish", "cut": second[:-1]}[damage]
    path = tmp_path / f"streams.jsonl{packing}"
    path.write_bytes(first + behind)
    report = ReadReport()
    assert next(iter(iter_documents([path], on_error="skip", report=report))).text == "0"
    with pytest.raises(DataError, match=rf"streams\.jsonl{packing}:\d+"):
        list(iter_documents([path]))


@pytest.mark.parametrize("zeros", [1, 6, 4, 12])
def test_padding_of_xz_comes_in_fours(tmp_path: Path, zeros: int) -> None:
    path = tmp_path / "padded.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "0"}\n') + b"\0" * zeros)
    if zeros % 4:
        with pytest.raises(DataError, match=rf"\({zeros} bytes"):
            list(iter_documents([path]))
    else:
        assert [document.text for document in iter_documents([path])] == ["0"]


def test_a_long_window_of_zstd_is_read(tmp_path: Path) -> None:
    """`zstd --ultra --long=31` packs with a window of 2 GiB; by default a reader allows 128 MiB."""
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    stream = zstd.ZstdCompressor(options=options)  # a stream: of known size it would choose a small window
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(stream.compress(b'{"text": "0"}\n') + stream.flush())
    assert [document.text for document in iter_documents([path])] == ["0"]


@pytest.mark.parametrize(
    ("content", "place", "names"),
    [
        (b'{"text": "a"}\n{"text": "b"', "x.jsonl:2", ["JSON"]),
        (b'{"text": "a"}\n\n[1]\n', "x.jsonl:3", ["list"]),
        (b'{"content": "a", "id": 2}', "x.jsonl:1", ["'text'", "'content'", "'id'"]),
        (b'{"text": "\xff"}', "x.jsonl:1", ["JSON"]),
        (b'{"text": "\\ud800"}', "x.jsonl:1", ["JSON"]),
        (b'{\n"text": "a"}\n', "x.json", ["--input-kind .jsonl"]),
        (b'[{"text": "a"},\n{"text": "b"}]', "x.jsonl:1", ["--input-kind .json"]),
        (b'{"text": "a"', "x.json", ["--input-kind .jsonl"]),
        (b'["a", {"text": "b"', "x.json[1]", []),
        (b'["a"] "b"', "x.json[1]", []),
        (b"", "x.json", [".jsonl"]),
        (b'["a", 3]', "x.json[1]", ["int"]),
        (b"abc\xff", "x.txt", ["UTF-8", "3"]),
        (b"PAR1 not really", "x.parquet", []),
    ],
)
def test_broken_input_is_named(tmp_path: Path, content: bytes, place: str, names: list[str]) -> None:
    (tmp_path / re.split(r"[:\[]", place)[0]).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(iter_documents([tmp_path]))
    assert_names(error.value, tmp_path / place, "--on-error skip", *names)
    assert "\n" not in str(error.value)
    report = ReadReport()
    documents = list(iter_documents([tmp_path], on_error="skip", report=report))
    losses, lines = report.losses, content.count(b"},")
    assert losses.skipped + losses.lost_files == 1 + lines
    assert losses.lost_files == (place in ("x.json", "x.json[1]", "x.parquet") and content != b'["a", 3]')
    assert len(report.messages) == 1 + lines
    assert all(document.text in ("a", "b") for document in documents)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"text": ""}\n\n{"text": null}\n"a"'),
        ("x.json", b'["", "a", {"text": null}]'),
        ("x.txt", b""),
        ("x.txt.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_empty_documents_are_left_out_and_counted(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    report = ReadReport()
    documents = list(iter_documents([tmp_path], report=report))
    assert [document.text for document in documents] == ["a"] * (b"a" in content)
    assert report.losses.empty == (2 if documents else 1)
    assert (report.losses.lines(), report.messages) == ([], [])


def test_parquet_without_the_column_or_text(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet_table())
    with pytest.raises(DataError) as error:
        list(iter_documents([tmp_path], options=ReadOptions("body")))
    assert_names(error.value, "x.parquet", "'body'", "n", "text")
    with pytest.raises(DataError) as error:
        list(iter_documents([tmp_path], options=ReadOptions("n")))
    assert_names(error.value, "x.parquet:0", "'n'", "int")


def test_a_table_damaged_in_the_middle(tmp_path: Path) -> None:
    """What was read before the damage is kept, and the share of rows behind it is the share of bytes that are lost."""
    path = tmp_path / "x.parquet"
    rows = [f"{number} {number**9}" * 20 for number in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    report = ReadReport()
    documents = list(iter_documents([path], on_error="skip", report=report))
    assert [document.text for document in documents] == rows[: len(documents)]
    losses = report.losses
    assert 800 <= len(documents) <= 1100
    assert (losses.skipped, losses.lost_files, losses.input_bytes) == (0, 1, len(content))
    assert losses.lost_bytes == pytest.approx(len(content) * (1 - len(documents) / 2000), abs=1)


def test_skipping_goes_on_behind_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\nbroken\n{"text": "b"}\n')
    report = ReadReport()
    documents = list(iter_documents([path], on_error="skip", report=report))
    assert documents == [Document("a", f"{path}:1"), Document("b", f"{path}:3")]
    (message,) = report.messages
    assert_names(message, f"{path}:2", "JSON")


def test_folders_and_globs_are_sorted_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.md", "a/picture.png", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    report = ReadReport()
    assert [document.text for document in iter_documents([tmp_path], report=report)] == ["a/c.md", "a/z.txt", "b.txt"]
    assert report.ignored_files == 2
    report = ReadReport()
    found = iter_documents([str(tmp_path / "*.txt"), str(tmp_path / "[ab]*")], report=report)
    assert [document.text for document in found] == ["b.txt", "b.txt"]
    assert [line.split(": ")[0] for line in report.ignored] == [str(tmp_path / "a")]
    found = iter_documents([str(tmp_path / "**" / "*.txt")])
    assert [document.text for document in found] == ["a/z.txt", "b.txt"]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.txt.gz"])
def test_a_fault_of_the_machine_is_no_damage_of_the_file(tmp_path: Path, name: str, on_error: OnError) -> None:
    """What is left out for it would be there on another day. Reading this process's memory at 0 is a real EIO."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError) as error:
        list(iter_documents([tmp_path / name], on_error=on_error))
    assert_names(error.value, tmp_path / name, os.strerror(errno.EIO))


def test_standard_input_of_any_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("plain text")
    with (tmp_path / "in").open() as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert list(iter_documents(["-"], stdin_kind=".txt")) == [Document("plain text", "-")]


def test_links_of_a_folder_are_followed_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    folder, outside = tmp_path / "raw", tmp_path / "outside"
    texts = ("raw/in.txt", "raw/sub/too.txt", "raw/.cache/hidden.txt", "outside/other.txt", "outside/deep/last.txt")
    for name in (*texts, "raw/picture.png", "raw/my.building/part.json", "elsewhere/up.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (folder / "more").symlink_to(outside)  # a folder elsewhere, read once
    (folder / "once more").symlink_to(outside)
    (folder / "again").symlink_to(folder / "sub")  # its files are read as it is
    (outside / "deep" / "round").symlink_to(outside)
    (outside / "back").symlink_to(tmp_path)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "ring.txt").symlink_to(folder / "ring.txt")
    for name in ("my.model", "my.model.json"):  # a tokenizer and what is said of it
        (folder / name).write_text(name)
    report = ReadReport()
    found = [document.text for document in iter_documents([folder], report=report)]
    assert sorted(found) == sorted(
        ["raw/in.txt", "raw/sub/too.txt", "outside/other.txt", "outside/deep/last.txt", "elsewhere/up.txt"]
    )
    names = [line.split(": ")[0] for line in report.ignored]
    left_out = [".cache/hidden.txt", "gone.txt", "my.building/part.json", "my.model", "my.model.json", "picture.png"]
    assert names == [str(folder / name) for name in (*left_out, "ring.txt")]
    assert report.ignored_files == len(names)


def test_a_snapshot_of_a_hub_cache(tmp_path: Path) -> None:
    """snapshots/REVISION/NAME links to ../../blobs/HASH."""
    snapshot = tmp_path / "datasets--us--ours" / "snapshots" / "abc123"
    (snapshot / "data").mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for name, content in (("data/x.jsonl.gz", gzip.compress(b'{"text": "a"}\n')), ("y.parquet", parquet_table())):
        (blobs / name[-6:]).write_bytes(content)
        (snapshot / name).symlink_to(Path("../" * name.count("/")) / "../../blobs" / name[-6:])
    assert [document.text for document in iter_documents([snapshot])] == ["a", *filter(None, TEXTS)]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    "first",
    [b'{"text": "a"}', b'  \n{"text": "a", "score": NaN}', b'\xef\xbb\xbf{"text": "a"}\r', b'"a"', b'{"text": "%s"}'],
)
def test_lines_under_the_name_of_an_array(tmp_path: Path, packing: str, first: bytes) -> None:
    """As C4 and Dolma come: data.json.gz with an object a line, of any size."""
    if b"%s" in first:
        first %= b"a" * 100_000
    path = tmp_path / f"c4.json{packing}"
    path.write_bytes(PACK[packing](first + b'\n{"text": "b"}\n'))
    (file,) = find_inputs([path], ReadReport())
    assert file.kind == ".jsonl"
    assert [document.text[0] for document in iter_documents([path])] == ["a", "b"]


def test_no_lines_by_the_look_of_them(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"[\n", b' [{"text": "a"}]', b'{"a": 1,\n"b": 2}', b'"a', b"3\n", b"\0\n")):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        assert find_inputs([path], ReadReport())[0].kind == ".json"
    path.write_bytes(b'{"text": "' + b"a" * (5 << 20))  # longer than is looked at
    assert find_inputs([path], ReadReport())[0].kind == ".jsonl"


def test_an_explicit_kind_holds_whatever_the_names(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    for name, content in (("part-0", lines), ("part-1.gz", gzip.compress(lines)), ("x.txt", lines), ("y.json", lines)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".crc").write_bytes(b"rubbish")
    files = find_inputs([tmp_path], ReadReport(), input_kind=".jsonl")
    policy = LossPolicy()
    assert [document.text for document in read_documents(files, policy, ReadReport())] == ["a", "b"] * 4
    with pytest.raises(DataError) as error:
        find_inputs([tmp_path / "part-0"], ReadReport())
    assert_names(error.value, tmp_path / "part-0", "--input-kind .jsonl")
    (file,) = find_inputs([tmp_path / "y.json"], ReadReport(), input_kind=".json")
    with pytest.raises(DataError, match=r"y\.json"):
        list(read_documents([file], policy, ReadReport()))


def test_a_large_file_of_another_layout_is_not_called_too_long(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{\n"text": "' + b"a" * 5000 + b'"}')
    with pytest.raises(DataError) as error:
        list(iter_documents([path], options=ReadOptions(largest_bytes=100)))
    assert_names(error.value, path, "--input-kind .jsonl")
    assert "--max-document-mb" not in str(error.value)


def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    for name in ("x.txt", "y.jsonl.zst"):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as error:
            list(iter_documents([tmp_path / name], on_error="skip"))
        assert_names(error.value, tmp_path / name, "git lfs pull")


@pytest.mark.parametrize(
    "other", ["NaN", "-Infinity", '"\\ud83d"', "1e999", "1" * 400, '{"deep": [NaN]}', "null", "[[1]]"]
)
def test_what_python_writes_in_another_field(tmp_path: Path, other: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"score": {other}, "text": "a"}}\n')
    (tmp_path / "y.json").write_text(f'[{{"score": {other}, "text": "a"}}, "b"]')
    assert [document.text for document in iter_documents([tmp_path])] == ["a", "a", "b"]


def test_columns_that_are_null(tmp_path: Path) -> None:
    rows = [("Title", "body"), (None, "body"), ("", "body"), ("Title", None), (None, None), (None, "")]
    keys = ("title", "text")
    lines = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    table = pyarrow.table([pyarrow.array(column, pyarrow.string()) for column in zip(*rows, strict=True)], names=keys)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    report = ReadReport()
    found = [document.text for document in iter_documents([tmp_path], report=report, options=ReadOptions(columns=keys))]
    assert found == ["Title\n\nbody", "body", "\n\nbody", "Title"] * 2
    assert report.losses.empty == 4


def test_text_beside_a_dataset_of_its_name_is_an_input(tmp_path: Path) -> None:
    """raw.json, raw.bin and raw.idx, as Megatron's tools leave them; a dataset's own description is none."""
    for name, content in (("raw.json", '{"text": "a"}\n'), ("raw.idx", ""), ("my.idx", "")):
        (tmp_path / name).write_text(content)
    (tmp_path / "my.json").write_text('{\n  "bin_sha256": "0"\n}')
    for damaged in ("", "{", "\0" * 9):
        (tmp_path / "my.json").write_text(damaged)
        assert [document.text for document in iter_documents([tmp_path])] == ["a"]


def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:  # as for anybody but root
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError) as error:
        list(iter_documents([tmp_path]))
    assert_names(error.value, tmp_path / "closed", os.strerror(errno.EACCES))


def test_paths_that_match_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    for name in ("", "*.txt", "x.csv"):
        with pytest.raises(DataError) as error:
            list(iter_documents([tmp_path / name], on_error="skip"))
        assert_names(error.value, tmp_path / name, ".jsonl", ".parquet")
    with pytest.raises(DataError):  # of a variable that is not set: not the current folder
        list(iter_documents([""]))
