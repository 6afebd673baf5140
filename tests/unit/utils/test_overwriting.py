"""No command writes over a file that it reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.utils.atomic_files import refuse_overwriting_inputs
from tests.messages import assert_names


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "col" / "my.json"
    path.parent.mkdir()
    path.write_text("{}")
    return path


def _named(way: str, file: Path) -> Path:
    """Another path of the same file."""
    other = file.parent.parent / "other.json"
    if way == "symbolic link":
        other.symlink_to(file)
    elif way == "hard link":
        os.link(file, other)
    elif way == "folder behind a link":
        (file.parent.parent / "linked").symlink_to(file.parent)
        other = file.parent.parent / "linked" / file.name
    elif way == "dots":
        other = file.parent / ".." / file.parent.name / file.name
    else:
        other = file
    return other


WAYS = ("same path", "symbolic link", "hard link", "folder behind a link", "dots")


@pytest.mark.parametrize("way", WAYS)
def test_an_output_that_is_an_input_is_refused(tokenizer: Path, way: str) -> None:
    output = _named(way, tokenizer)
    with pytest.raises(ConfigError) as error:
        refuse_overwriting_inputs([tokenizer.with_name("my.bin"), output], [str(tokenizer)])
    assert_names(error.value, output, tokenizer)


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_stands_for_the_files_in_it(tokenizer: Path, way: str) -> None:
    with pytest.raises(ConfigError):
        refuse_overwriting_inputs([_named(way, tokenizer)], [tokenizer.parent])


def test_other_files_are_no_reason_to_refuse(tokenizer: Path) -> None:
    copy = tokenizer.with_name("copy.json")
    copy.write_bytes(tokenizer.read_bytes())
    outputs = [copy, tokenizer.with_name("new.json"), tokenizer.with_name("my.bin")]
    refuse_overwriting_inputs(outputs, [tokenizer, "bytes", "-", "missing/*.txt", "a\0b"])
