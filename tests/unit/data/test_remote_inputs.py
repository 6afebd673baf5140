"""Text at an address of a real S3 server: the dataset that the same files make from a disk, over a bad network too."""

from __future__ import annotations

import gzip
import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from megalm.data.builder import workers as workers_module
from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.builder import build_files
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.readers.input_files import ReadReport, find_inputs, sha256_of
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import ConfigError, DataError
from megalm.utils import remote_files
from megalm.utils.remote_files import open_remote_file
from tests import s3_server
from tests.messages import assert_names

TEXT = "s3://text/raw"


def _lines(seed: int, count: int) -> bytes:
    words = random.Random(seed)
    texts = (" ".join(words.choices(("one", "two", "three", "four"), k=40)) for _ in range(count))
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several kinds, large enough for several units and blocks."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "a.jsonl").write_bytes(_lines(1, 3000))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_lines(2, 2000)))
    (folder / "c.jsonl.zst").write_bytes(zstd.compress(_lines(3, 2000)))
    table = pyarrow.table({"text": [f"row {number} of a table" for number in range(4000)]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=1000)
    (folder / "e.json").write_bytes(_lines(4, 10))
    (folder / "notes.pdf").write_bytes(b"no text")
    return folder


@pytest.fixture(scope="module")
def port(local: Path) -> Iterator[int]:
    with s3_server.s3_server() as port, pytest.MonkeyPatch.context() as patch:
        s3_server.use(patch, port)
        s3_server.make_bucket("text")
        for path in local.iterdir():
            s3_server.put(f"text/raw/{path.name}", path.read_bytes())
        yield port


@pytest.fixture(autouse=True)
def _server(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use(monkeypatch, port)
    monkeypatch.setattr(remote_files, "_LONGEST_PAUSE_SECONDS", 0.1)


OPTIONS = BuildOptions(unit_bytes=150_000)


def _build(paths: list[str], prefix: Path, workers: int = 1) -> dict[str, bytes]:
    build_files(paths, load_tokenizer("bytes"), prefix, OPTIONS, workers=workers)
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".sources")}


@pytest.mark.parametrize("named", ["folder", "glob"])
def test_the_dataset_is_that_of_the_same_files_on_a_disk(local: Path, tmp_path: Path, named: str) -> None:
    here = {"folder": str(local), "glob": f"{local}/*.jsonl*"}[named]
    there = {"folder": TEXT, "glob": f"{TEXT}/*.jsonl*"}[named]
    expected = _build([here], tmp_path / "local")
    assert _build([there], tmp_path / "remote") == expected
    sidecars = [read_sidecar(tmp_path / name) for name in ("local", "remote")]
    assert sidecars[0] is not None
    assert sidecars[1] is not None
    of_local, of_remote = (
        {entry["path"].rpartition("/")[2]: (entry["bytes"], entry["sha256"]) for entry in sidecar["inputs"]}
        for sidecar in sidecars
    )
    assert of_remote == of_local, "size and SHA-256 of each input are recorded"
    assert all(entry["tag"] for entry in sidecars[1]["inputs"])
    assert not any("tag" in entry for entry in sidecars[0]["inputs"])
    assert s3_server.files_holding(tmp_path, "a-secret-access-key") == []


@pytest.mark.slow
def test_workers_read_by_themselves(local: Path, tmp_path: Path) -> None:
    assert _build([TEXT], tmp_path / "remote", workers=2) == _build([str(local)], tmp_path / "local")


def test_a_dropped_connection_goes_on_where_it_was(
    local: Path, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 1 << 16)
    with s3_server.bad_network(port) as network:
        s3_server.use(monkeypatch, network.port)
        with open_remote_file(f"{TEXT}/a.jsonl") as file:
            first = file.read(200_000)
            network.cut_after, network.cuts = 20_000, 8
            content = first + file.read()
        assert network.cut == 8
    assert content == (local / "a.jsonl").read_bytes()


def test_a_build_over_a_bad_network_is_the_same(
    local: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server.bad_network(port) as network:
        s3_server.use(monkeypatch, network.port)
        network.cut_after, network.cuts = 3_000, 12
        found = _build([TEXT], tmp_path / "remote")
        assert network.cut == 12
    assert found == _build([str(local)], tmp_path / "local")


def test_a_killed_build_resumes_unless_an_object_changed(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "s3://text/changing"
    for name in ("a.jsonl", "d.parquet"):
        s3_server.put(f"text/changing/{name}", (local / name).read_bytes())
    prefix, made = tmp_path / "remote", list[str]()
    do = workers_module._do

    def killed(unit: workers_module.Unit, *more: object) -> object:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(unit.name)
        return do(unit, *more)  # type: ignore[arg-type]

    def interrupt() -> None:
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(workers_module, "_do", killed)
            with pytest.raises(KeyboardInterrupt):
                _build([place], prefix)

    interrupt()
    assert build_files([place], load_tokenizer("bytes"), prefix, OPTIONS).resumed > 0
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    interrupt()
    s3_server.put("text/changing/a.jsonl", (local / "a.jsonl").read_bytes().replace(b"one", b"won"))
    assert build_files([place], load_tokenizer("bytes"), prefix, OPTIONS).resumed == 0
    assert b"won" in Path(f"{prefix}.bin").read_bytes().replace(b"\0", b"")


def test_an_object_that_changes_meanwhile_is_refused() -> None:
    s3_server.put("text/one/a.jsonl", _lines(5, 10))
    (file,) = find_inputs(["s3://text/one/a.jsonl"], ReadReport())
    assert not file.has_changed()
    with file.open_raw() as raw:
        s3_server.put("text/one/a.jsonl", _lines(6, 10))
        with pytest.raises(DataError) as error:
            raw.read()
    assert_names(error.value, "s3://text/one/a.jsonl")
    assert file.has_changed()


def test_what_a_folder_leaves_out_is_counted_and_a_json_of_lines_is_seen(local: Path) -> None:
    report = ReadReport()
    files = find_inputs([f"{TEXT}/"], report)
    assert [(Path(file.path).name, file.kind, file.packing) for file in files] == [
        ("a.jsonl", ".jsonl", ""),
        ("b.jsonl.gz", ".jsonl", ".gz"),
        ("c.jsonl.zst", ".jsonl", ".zst"),
        ("d.parquet", ".parquet", ""),
        ("e.json", ".jsonl", ""),
    ]
    assert report.ignored_files == 1
    assert sha256_of(files[2].path) == sha256_of(local / "c.jsonl.zst")


@pytest.mark.parametrize(
    ("address", "kind", "names"),
    [
        ("s3://text/none.jsonl", DataError, ["s3://text/none.jsonl"]),
        ("s3://text/raw/*.csv", DataError, ["s3://text/raw/*.csv"]),
        ("s3://no-such-bucket/a.jsonl", DataError, ["s3://no-such-bucket/a.jsonl"]),
        ("s3://text/raw/notes.pdf", DataError, ["s3://text/raw/notes.pdf"]),
        ("s3://", ConfigError, ["s3://BUCKET/FOLDER"]),
        ("ftp://host/a.jsonl", ConfigError, ["s3://", "gs://", "hf://"]),
        ("s3://user:pass@text/a.jsonl", ConfigError, ["AWS_ACCESS_KEY_ID"]),
    ],
)
def test_a_wrong_address_is_one_line(address: str, kind: type[Exception], names: list[str]) -> None:
    with pytest.raises(kind) as error:
        find_inputs([address], ReadReport())
    assert_names(error.value, *names)
    assert "pass" not in str(error.value)
    assert "\n" not in str(error.value)


def test_without_credentials_or_a_server_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "START_PATIENCE_SECONDS", 0.1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3_server.forget_client()
    with pytest.raises(DataError, match="credentials"):
        find_inputs([TEXT], ReadReport())
    s3_server.use(monkeypatch, 9)
    with pytest.raises(DataError) as error:
        find_inputs([TEXT], ReadReport())
    assert_names(error.value, TEXT)
    assert "\n" not in str(error.value)
