"""Export and import on a disk that is too small, or becomes so: a line that says what is missing, and nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.cli.main import main
from megalm.errors import DataError
from megalm.huggingface.export_model import export_checkpoint, plan_export
from megalm.huggingface.import_model import import_model
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.utils.atomic_files import temporary_name
from tests.huggingface_models import SECTIONS, random_model, save_model

pytestmark = pytest.mark.e2e

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its export, of 5.7 MiB each."""
    folder = tmp_path_factory.mktemp("models")
    shape, model = random_model(SECTIONS["llama"], vocab_size=22_500)
    save_model(folder / "run/checkpoints", shape, model)
    export(folder / "run", folder / "out", lambda: None)
    return folder


@pytest.fixture
def disk(mounted_disk: Callable[[str], Path]) -> Path:
    """With 8 MiB: room for one of the two."""
    return mounted_disk("8m")


def export(run: Path, target: Path, tell: Callable[[], None]) -> None:
    reader = CheckpointReader(run / "checkpoints/step-00000007")
    export_checkpoint(plan_export(reader, target, torch.float32, None), 1 << 40, "it", tell)


def import_(folder: Path, target: Path, tell: Callable[[], None]) -> None:
    import_model(HuggingFaceFolder(folder), target, None, tell)


@pytest.mark.parametrize(("command", "source"), [("export", "run"), ("import", "out")])
def test_too_small_a_disk_is_refused_before_it_is_begun(
    command: str, source: str, models: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "other").write_bytes(bytes(4 * MEBIBYTE))
    with pytest.raises(SystemExit) as left:
        main([command, str(models / source), str(disk / "new/model")])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert str(disk / "new/model") in line
    assert "4.0 MiB free" in line
    assert [path.name for path in disk.iterdir()] == ["other"]


@pytest.mark.parametrize(("work", "source"), [(export, "run"), (import_, "out")])
def test_a_disk_that_becomes_full(work: Callable[..., None], source: str, models: Path, disk: Path) -> None:
    """Somebody else fills it when the first tensor is written."""
    other = disk / "other"

    def fill() -> None:
        if not other.exists():
            other.write_bytes(bytes(shutil.disk_usage(disk).free - MEBIBYTE))

    with pytest.raises(DataError, match=r"model.* [5-7]\.\d MiB"):
        work(models / source, disk / "model", fill)
    assert [path.name for path in disk.iterdir()] == ["other"]
    other.unlink()
    work(models / source, disk / "model", lambda: None)  # now there is room


def test_what_a_killed_process_left_goes_first(models: Path, disk: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    name = temporary_name(disk / "model").name
    left = disk / name.replace(f"-{os.getpid()}.", f"-{int(killed.stdout)}.")
    alive = disk / name.replace(f"-{os.getpid()}.", "-1.")
    others = disk / name.replace("model", "models")
    for folder in (left, alive, others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(MEBIBYTE // 8 if folder != left else 5 * MEBIBYTE))
    export(models / "run", disk / "model", lambda: None)
    assert sorted(path.name for path in disk.iterdir()) == sorted([alive.name, others.name, "model"])
