"""`megalm export` and `import` as a person types them, mistakes too. Models are in tests/unit/huggingface."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from megalm.checkpoint.manifest import read_manifest, set_status, write_manifest
from megalm.cli.main import main
from megalm.config.schema import ModelSection
from tests.huggingface_models import SECTIONS, SIZES, random_model, save_model
from tests.messages import assert_names


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, error = capsys.readouterr()
    return left.value.code or 0, out, error  # type: ignore[return-value]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shape, model = random_model(SECTIONS["gpt2"])
    return save_model(tmp_path / "run" / "checkpoints", shape, model)


def test_there_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capsys, "export", tmp_path / "run", tmp_path / "out", "--max-shard-size", "0.05MB")
    assert (code, error) == (0, "")
    assert_names(out, tmp_path / "out", checkpoint, "gpt2", "fp32")
    assert_names(out, "README.md")  # a licence is to be chosen
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    parts = [name for name in names if name.startswith("model-")]
    assert len(parts) > 2
    kept = ["README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert sorted([*kept, "tokenizer_config.json", *parts]) == names
    code, out, error = run(capsys, "import", tmp_path / "out", tmp_path / "back")
    assert (code, error) == (0, "")
    back = tmp_path / "back"
    assert f"--config {back / 'model.yaml'} run.name=NAME --resume {back / 'checkpoints/step-00000000'}" in out
    code, out, _ = run(capsys, "checkpoint", "diff", checkpoint, back)
    assert code == 0
    table = out.strip().split("\n\n")[-1].splitlines()
    assert re.split(r" {2,}", table[0])[1:] == ["master"]
    assert {float(line.split()[-1]) for line in table[2:]} == {0.0}


def test_a_dry_run_lists_what_an_export_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for words in (("--max-shard-size", "0.05MB"), ("--to", "gguf")):
        code, told, error = run(capsys, "export", checkpoint, out, *words, "--dry-run")
        assert (code, error) == (0, "")
        assert not out.exists()
        assert run(capsys, "export", checkpoint, out, *words)[0] == 0
        listed = {line.split()[0] for line in told.splitlines()[2:]} - {"total", "model.safetensors.index.json"}
        assert listed == {path.name for path in out.iterdir()} - {"model.safetensors.index.json"}
        shutil.rmtree(out)


def test_commands_that_are_shown_can_be_typed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "export", checkpoint, tmp_path / "out")
    folder = tmp_path / "two words, größer"
    code, out, _ = run(capsys, "import", tmp_path / "out", folder)
    assert code == 0
    generate, build, train = (shlex.split(line)[2:] for line in out.splitlines()[-3:])
    assert generate == ["megalm", "generate", str(folder), "--prompt", "Once"]
    assert build[build.index("--tokenizer") + 1] == str(folder / "tokenizer.json")
    assert train[train.index("--config") + 1] == str(folder / "model.yaml")
    assert train[train.index("--resume") + 1] == str(folder / "checkpoints/step-00000000")


def test_what_is_imported_can_be_planned_at_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its window has 40 tokens, fewer than samples have by default."""
    run(capsys, "export", checkpoint, tmp_path / "out")
    run(capsys, "import", tmp_path / "out", tmp_path / "back")
    code, out, error = run(capsys, "plan", "--config", tmp_path / "back/model.yaml")
    assert (code, error) == (0, "")
    assert "data.sequence_length" in out


def test_a_bad_checkpoint_is_asked_for_twice(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_status(checkpoint, "bad", "spoilt by a spike")
    code, _, error = run(capsys, "export", checkpoint, tmp_path / "out")
    assert code == 2
    assert_names(error, checkpoint, "bad", "(spoilt by a spike)", "--accept-bad")
    assert run(capsys, "export", tmp_path / "run", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, "export", checkpoint, tmp_path / "out", "--accept-bad")
    assert code == 0
    assert_names(out, "bad", "(spoilt by a spike)")
    assert_names((tmp_path / "out/README.md").read_text(), "bad: spoilt by a spike")


def test_a_damaged_file_is_found_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    code, _, error = run(capsys, "export", checkpoint, tmp_path / "out")
    assert code == 2
    assert_names(error, file, "SHA-256")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_targets_that_are_not_free(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for words in (("export", checkpoint, full), ("import", tmp_path, full)):
        code, _, error = run(capsys, *words)
        assert code == 2
        assert_names(error, full)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    (full / "notes.txt").unlink()
    assert run(capsys, "export", checkpoint, full)[0] == 0  # an empty folder will do


def test_a_folder_without_a_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for words in (("export", checkpoint, "."), ("import", checkpoint, ".")):
        code, _, error = run(capsys, *words)
        assert code == 2
        assert " . " in error
        assert not list(Path.cwd().iterdir())


def test_a_model_without_their_form_is_refused_before_its_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, model = random_model(ModelSection(style="gpt2", qk_norm=True, **SIZES))
    checkpoint = save_model(tmp_path / "run" / "checkpoints", shape, model)
    (checkpoint / "rank-00000.safetensors").write_bytes(bytes((checkpoint / "rank-00000.safetensors").stat().st_size))
    code, _, error = run(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert code == 2
    assert_names(error, "model.qk_norm=true", "gpt2", "megalm checkpoint convert")


def test_another_tokenizer_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "export", checkpoint, tmp_path / "out")[0] == 0
    other = tmp_path / "out/tokenizer.json"
    code, _, error = run(capsys, "export", checkpoint, tmp_path / "two", "--tokenizer", other)
    assert code == 2
    assert_names(error, other, checkpoint)
    write_manifest(checkpoint, read_manifest(checkpoint).amended(tokenizer=str(tmp_path / "gone.model")))
    code, _, error = run(capsys, "export", checkpoint, tmp_path / "two")
    assert code == 2
    assert_names(error, tmp_path / "gone.model", checkpoint, "--tokenizer")


def test_a_tokenizer_that_is_damaged(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "export", checkpoint, tmp_path / "out")
    (tmp_path / "out/tokenizer_config.json").write_text("[]")
    code, _, error = run(capsys, "import", tmp_path / "out", tmp_path / "back")
    assert code == 2
    assert_names(error, tmp_path / "out/tokenizer_config.json")
    (tmp_path / "out/sentencepiece.model").touch()
    code, _, error = run(capsys, "import", tmp_path / "out", tmp_path / "back")
    assert code == 2
    assert_names(error, tmp_path / "out/sentencepiece.model")


def test_keys_of_a_configuration(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "export", checkpoint, tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "my_own": 3}))
    code, _, error = run(capsys, "import", tmp_path / "out", tmp_path / "back")
    assert code == 2
    assert_names(error, "my_own=3")
    assert run(capsys, "import", tmp_path / "out", tmp_path / "back", "--ignore-key", "my_own")[0] == 0
    code, _, error = run(capsys, "import", tmp_path / "out", tmp_path / "more", "--ignore-key", "my_won")
    assert code == 2
    assert_names(error, "--ignore-key", "my_won", "config.json")


@pytest.mark.parametrize("command", ["import", "export", "generate", "evaluate"])
def test_an_adapter_is_no_model(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    more = {"generate": ["--prompt", "Once"], "evaluate": []}.get(command, [tmp_path / "back"])
    code, _, error = run(capsys, command, tmp_path / "adapter", *more)
    assert code == 2
    assert_names(error, "adapter_config.json", "merge_and_unload")


def test_a_hugging_face_folder_is_generated_from_and_evaluated_as_it_is(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "export", checkpoint, tmp_path / "out")
    (tmp_path / "text.txt").write_text("a text of some words")
    words = ("--prompt", "ab", "--samples", 2, "--max-new-tokens", 5, "--top-p", 0.9, "--seed", 3, "--json")
    found = {}
    for place in (checkpoint, tmp_path / "out"):
        code, out, error = run(capsys, "generate", place, *words)
        assert code == 0, error
        found[place] = [json.loads(line) for line in out.splitlines()]
        assert [(row["prompt"], row["sample"]) for row in found[place]] == [("ab", 0), ("ab", 1)]
        assert all((row["tokens"] == 5) == (row["finish"] == "length") for row in found[place])
        code, out, error = run(capsys, "evaluate", place, "--text", tmp_path / "text.txt", "--json")
        assert code == 0, error
        found[place].append({"loss": json.loads(out)["loss"]})
    first, second = found.values()
    assert [row.get("text") for row in first] == [row.get("text") for row in second]
    assert first[0]["text"] != first[1]["text"]
    assert second[-1]["loss"] == pytest.approx(first[-1]["loss"], abs=1e-6)
    (tmp_path / "out/model.safetensors").unlink()
    code, _, error = run(capsys, "generate", tmp_path / "out", "--prompt", "a")
    assert code == 2
    assert_names(error, "model.safetensors")
