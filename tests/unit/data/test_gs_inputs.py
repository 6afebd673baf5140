"""Text at an address of Google's storage, against an emulator of its server; the code of `s3://` serves it too."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megalm.data.builder.builder import build_files
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import DataError
from megalm.utils.remote_files import open_filesystem, put_file
from tests.conftest import require
from tests.messages import assert_names

pytestmark = pytest.mark.slow
PARTS = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    missing = [name for name in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(name) is None]
    require("gs", not missing, f"no {', '.join(missing)}; pip install gcsfs gcp-storage-emulator")
    emulator = importlib.import_module("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="text")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
        patch.setenv("NO_GCE_CHECK", "true")  # no credentials are looked for outside
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    server.stop()


def test_the_dataset_is_that_of_the_same_files_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, count in (("a.jsonl", 3000), ("b.jsonl", 20)):
        lines = (json.dumps({"text": f"line {number} of {name}"}) + "\n" for number in range(count))
        (tmp_path / "raw" / name).write_text("".join(lines))
        fsspec.filesystem("gs").put_file(str(tmp_path / "raw" / name), f"text/raw/{name}")
    built = []
    for number, place in enumerate((str(tmp_path / "raw"), "gs://text/raw", "gs://text/raw/*.jsonl")):
        prefix = tmp_path / str(number)
        build_files([place], load_tokenizer("bytes"), prefix)
        built.append([Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".sources")])
    assert built[0] == built[1] == built[2]


@pytest.mark.parametrize("address", ["gs://text/none.jsonl", "gs://text/raw/*.csv", "gs://no-such-bucket/a.jsonl"])
def test_a_wrong_address_is_one_line(address: str) -> None:
    with pytest.raises(DataError) as error:
        find_inputs([address], ReadReport())
    assert_names(error.value, address)
    assert "\n" not in str(error.value)


def test_every_byte_of_a_copy_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(6 * PARTS + 7))
    filesystem, place = open_filesystem("gs://text/copies/file")
    sent: list[int] = []
    put_file(filesystem, tmp_path / "file", place, PARTS, sent.append)
    assert sum(sent) == filesystem.info(place)["size"] == 6 * PARTS + 7
    assert len(sent) > 1, "a file above 5 MB goes in parts"
