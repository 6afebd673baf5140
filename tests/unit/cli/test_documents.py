"""The commands of the documents that need nothing but a JSON run as they are written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megalm.cli.main import main

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_NOT_ALONE = ("...", "my.yaml", "--after", "KEY=VALUE", "[", "FOLDER")  # placeholders, and files that a run makes


def plans() -> list[str]:
    """Every `megalm plan` of code blocks and of code within sentences."""
    found: list[str] = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        found += re.findall(r"^(megalm plan .*)$", text, re.MULTILINE)
        found += [" ".join(words.split()) for words in re.findall(r"`(megalm plan [^`]*)`", text)]
    return [command for command in found if not any(word in command for word in _NOT_ALONE)]


@pytest.mark.parametrize("command", plans())
def test_a_plan_of_the_documents(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = (ROOT / "docs/slurm.md").read_text()
    ((old, new, source),) = re.findall(r"^sed 's/(.*)/(.*)/' (\S+) > my\.json$", slurm, re.MULTILINE)
    (tmp_path / "my.json").write_text((ROOT / source).read_text().replace(old, new))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command, comments=True)[1:])
    assert left.value.code in (0, None)


def test_there_are_plans_for_a_cluster() -> None:
    assert any("--ranks 32" in command and "my.json" in command for command in plans())
