"""Text at an address of the Hugging Face Hub, against a stand-in of its server; the code of `s3://` serves it too."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megalm.data.builder.builder import build_files
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import ConfigError, DataError
from megalm.utils import remote_files
from megalm.utils.remote_files import open_remote_file
from tests.conftest import require
from tests.hub_server import Hub, hub_server
from tests.messages import assert_names

DATA = "hf://datasets/owner/text/data"


def _lines(name: str, count: int) -> bytes:
    return b"".join(json.dumps({"text": f"line {number} of {name}"}).encode() + b"\n" for number in range(count))


@pytest.fixture(name="hub")
def _hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    require("hf", importlib.util.find_spec("huggingface_hub"), "no huggingface_hub; pip install -e '.[hf]'")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    monkeypatch.setattr(remote_files, "_LONGEST_PAUSE_SECONDS", 0.1)
    with hub_server() as hub:
        files = {"README.md": b"# text\n", "data/a.jsonl": _lines("a", 3000), "data/more/b.jsonl": _lines("b", 20)}
        hub.repositories["owner/text", "main"] = files
        hub.repositories["owner/text", "v1.0"] = {"data/a.jsonl": _lines("a", 10)}
        hub.repositories["owner/gated", "main"] = files
        hub.gated.add("owner/gated")
        # HF_ENDPOINT is read at import.
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.endpoint, "token": False})
        yield hub


def test_the_dataset_is_that_of_the_same_files_on_a_disk(hub: Hub, tmp_path: Path) -> None:
    for path, content in hub.repositories["owner/text", "main"].items():
        (tmp_path / "raw" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / path).write_bytes(content)
    hub.cut = 2  # connections that end early are no fault
    built = []
    for number, place in enumerate((f"{tmp_path}/raw/data", DATA, "hf://datasets/owner/text/**/?.jsonl")):
        prefix = tmp_path / str(number)
        build_files([place], load_tokenizer("bytes"), prefix)
        built.append([Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".sources")])
    assert hub.cut == 0
    assert built[0] == built[1] == built[2]
    (old,) = find_inputs(["hf://datasets/owner/text@v1.0/data/a.jsonl"], ReadReport())
    with open_remote_file(old.path) as file:
        assert file.read() == _lines("a", 10)


def test_no_byte_is_asked_for_twice(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 1 << 14)
    with open_remote_file(f"{DATA}/a.jsonl") as file:
        assert len(file.read()) == hub.sent


def test_a_file_that_changes_is_seen_whatever_was_listed(hub: Hub) -> None:
    files = hub.repositories["owner/text", "main"]
    found, _ = find_inputs([DATA], ReadReport())
    assert not found.has_changed()
    raw = found.open_raw()
    files["data/a.jsonl"] = files["data/a.jsonl"].replace(b"line", b"lane")
    files["data/c.jsonl"] = _lines("c", 1)
    with pytest.raises(DataError) as error:
        raw.read()
    assert_names(error.value, f"{DATA}/a.jsonl")
    assert found.has_changed()
    assert len(find_inputs([DATA], ReadReport())) == 3


@pytest.mark.parametrize(
    ("address", "kind", "names"),
    [
        (f"{DATA}/none.jsonl", DataError, [f"{DATA}/none.jsonl"]),
        (f"{DATA}/*.csv", DataError, [f"{DATA}/*.csv"]),
        ("hf://datasets/owner/none/a.jsonl", DataError, ["hf://datasets/owner/none/a.jsonl"]),
        ("hf://datasets/owner/text@v2/a.jsonl", DataError, ["hf://datasets/owner/text@v2/a.jsonl"]),
        ("hf://datasets/owner", ConfigError, ["hf://datasets/owner", "hf://datasets/OWNER/NAME/FILE"]),
        ("hf://gpt2", ConfigError, ["hf://gpt2", "hf://datasets/OWNER/NAME/FILE"]),
        ("hf://hf_secret@datasets/owner/text", ConfigError, ["HF_TOKEN"]),
    ],
)
def test_a_wrong_address_is_one_line(hub: Hub, address: str, kind: type[Exception], names: list[str]) -> None:
    with pytest.raises(kind) as error:
        find_inputs([address], ReadReport())
    assert_names(error.value, *names)
    assert "hf_secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_file_is_one_line_at_once(hub: Hub) -> None:
    (file,) = find_inputs(["hf://datasets/owner/gated/data/a.jsonl"], ReadReport())
    with pytest.raises(DataError) as error:
        file.open_raw().read()
    assert_names(error.value, file.path)
