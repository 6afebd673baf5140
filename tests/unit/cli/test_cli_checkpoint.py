"""`megalm checkpoint`: what the manifests say, and what is wrong with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.cli.show import duration, size, table


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint", *words])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def save(run_dir: Path, step: int, **fields: object) -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "rank-0.safetensors").write_bytes(b"x" * 2048)
    manifest = {"format": 1, "step": step, "tokens": step * 10, "created": "2026-11-20T12:00:00", "status": "good"}
    files = {"rank-0.safetensors": {"bytes": 2048, "sha256": "00"}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files} | fields))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save(tmp_path, 500, validation_loss=3.25)
    save(tmp_path, 1000, validation_loss=3.0)
    save(tmp_path, 1500, validation_loss=2.0, status="bad")
    save(tmp_path, 10000, validation_loss=None)
    (tmp_path / "checkpoints" / "latest").write_text("step-00010000\n")
    (tmp_path / "checkpoints" / "step-00020000.tmp").mkdir()
    return tmp_path


def test_list_is_in_order_and_marks_latest_and_best(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000700").mkdir()
    code, out, _ = run(capsys, "list", str(run_dir))
    lines = [line.split() for line in out.splitlines()[2:]]
    assert code == 0
    assert [line[0] for line in lines] == [f"step-{step:08d}" for step in (500, 700, 1000, 1500, 10000)]
    assert lines[0][1:] == ["500", "5000", "2026-11-20T12:00:00", "2.0", "KiB", "3.2500", "good"]
    assert lines[1][-1] == "incomplete"
    assert lines[2][-1] == "best"  # 1500 has the lower loss and is bad
    assert lines[3][-1] == "bad"
    assert lines[4][-1] == "latest"


def test_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", str(tmp_path))
    assert (code, out) == (0, f"{tmp_path}: no checkpoints yet\n")


def test_list_tolerates_absent_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text("{}")
    code, out, _ = run(capsys, "list", str(tmp_path))
    assert code == 0
    assert out.splitlines()[2].startswith("step-00000001")


def test_show_takes_a_checkpoint_or_the_latest_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", str(run_dir / "checkpoints" / "step-00000500"))
    assert code == 0
    assert "validation_loss  3.25" in out
    assert "rank-0.safetensors  2.0 KiB  ok" in out
    _, out, _ = run(capsys, "show", str(run_dir))
    assert "step-00010000" in out


def test_show_finds_files_that_are_gone_or_cut(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "checkpoints" / "step-00000500"
    (folder / "rank-0.safetensors").write_bytes(b"x" * 100)
    code, _, error = run(capsys, "show", str(folder))
    assert code == 2
    assert "rank-0.safetensors is 100 bytes instead of 2048" in error
    (folder / "rank-0.safetensors").unlink()
    assert "rank-0.safetensors is missing" in run(capsys, "show", str(folder))[2]


@pytest.mark.parametrize("content", ["{cut", "[]"])
def test_an_unreadable_manifest_is_named(run_dir: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "checkpoints" / "step-00000500"
    (folder / "manifest.json").write_text(content)
    for words in (("list", str(run_dir)), ("show", str(folder))):
        code, _, error = run(capsys, *words)
        assert code == 2
        assert "manifest.json" in error


def test_tables_align_and_units_are_said() -> None:
    text = table(["name", "count"], [["a", 5], ["long name", 1000], ["none", None]])
    assert text.splitlines() == [
        "name       count",
        "---------  -----",
        "a              5",
        "long name   1000",
        "none           -",
    ]
    assert [size(0), size(1536), size(2**50)] == ["0 B", "1.5 KiB", "1024.0 TiB"]
    assert [duration(3), duration(200), duration(7500)] == ["3 s", "3 min 20 s", "2 h 05 min"]
