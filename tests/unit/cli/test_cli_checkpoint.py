"""`megalm checkpoint`: what the manifests say, what is wrong with a checkpoint, and what becomes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalm.checkpoint import manifest
from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import read_manifest
from megalm.cli.main import main
from megalm.errors import ConfigError
from megalm.inference.inference_model import InferenceModel
from megalm.runs.run_folder import RunFolder, refuse_existing_run
from tests.checkpoint_files import SHAPES, save, whole
from tests.messages import assert_names

RANK_FILE = "rank-00000.safetensors"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint", *map(str, words)])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, 500, validation_loss=3.25)
    save(checkpoints, 1000, validation_loss=3.0)
    save(checkpoints, 1500, validation_loss=2.0, status="bad", status_reason="loss of 9")
    save(checkpoints, 10000)
    (checkpoints / "step-00020000.tmp").mkdir()
    return tmp_path


def test_list_is_in_order_and_marks_latest_and_best(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(run_dir, 700).mkdir()
    code, out, _ = run(capsys, "list", run_dir)
    lines = [line.split() for line in out.splitlines()[2:]]
    assert code == 0
    assert [line[0] for line in lines] == [f"step-{step:08d}" for step in (500, 700, 1000, 1500, 10000)]
    assert lines[0][1:4] == ["500", "5000", "2026-11-20T12:00:00"]
    assert lines[0][5:] == ["KiB", "3.2500", "-", "good"]
    assert not {"good", "best", "latest"} & set(lines[1]), "it has no manifest"
    assert lines[2][-1] == "best"  # 1500 has the lower loss and is bad
    assert lines[3][-4:] == ["bad", "loss", "of", "9"]
    assert lines[4][-1] == "latest"
    (run_dir / "checkpoints" / "best").write_text("step-00000500\n")
    assert run(capsys, "list", run_dir)[1].splitlines()[2].split()[-1] == "best"


def test_list_compares_losses_over_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With evaluate.max_samples the last checkpoint alone is judged on everything."""
    for step, loss in ((10, 3.1), (20, 3.0)):
        save(tmp_path / "checkpoints", step, validation_loss=loss, validation_tokens=1000)
    save(tmp_path / "checkpoints", 30, validation_loss=2.9, validation_tokens=64_000)
    lines = [line.split() for line in run(capsys, "list", tmp_path)[1].splitlines()[2:]]
    assert [line[6:8] for line in lines] == [["3.1000", "1,000"], ["3.0000", "1,000"], ["2.9000", "64,000"]]
    assert [line[8:] for line in lines] == [["good"], ["good", "best"], ["good", "latest"]]


@pytest.mark.parametrize("loss", [2.9, math.nan])
def test_list_calls_none_the_best_where_no_two_can_be_compared(
    loss: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "checkpoints", 10, validation_loss=loss, validation_tokens=1000)
    save(tmp_path / "checkpoints", 20, validation_loss=3.0, validation_tokens=64_000)
    save(tmp_path / "checkpoints", 30, validation_loss=2.0, validation_tokens=128)
    lines = [line.split() for line in run(capsys, "list", tmp_path)[1].splitlines()[2:]]
    assert [line[8:] for line in lines] == [["good"], ["good"], ["good", "latest"]]


def test_list_does_not_call_best_what_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, loss in ((10, math.nan), (20, 3.0), (30, 3.5)):
        save(tmp_path / "checkpoints", step, validation_loss=loss, validation_tokens=1000)
    lines = [line.split() for line in run(capsys, "list", tmp_path)[1].splitlines()[2:]]
    assert [line[6] for line in lines] == ["nan", "3.0000", "3.5000"]
    assert [line[8:] for line in lines] == [["good"], ["good", "best"], ["good", "latest"]]


def test_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", tmp_path)
    assert (code, out.count("\n")) == (0, 1)
    assert_names(out, tmp_path)


@pytest.mark.parametrize("content", ["{cut", "[]", "{}"])
def test_list_shows_the_others_beside_a_damaged_one(
    run_dir: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder(run_dir, 500) / "manifest.json").write_text(content)
    (folder(run_dir, 1000) / RANK_FILE).unlink()
    code, out, error = run(capsys, "list", run_dir)
    assert code == 2
    assert not any("good" in line.split() for line in out.splitlines()[2:4]), out
    assert "latest" in out
    assert_names(error, 2, folder(run_dir, 500))


def test_show_takes_a_checkpoint_or_the_newest_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", folder(run_dir, 500))
    assert code == 0
    assert "validation_loss  3.25" in out
    assert f"{RANK_FILE}  1.4 KiB  ok" in out, out
    _, out, _ = run(capsys, "show", run_dir)
    assert "step-00010000" in out


def test_show_reports_what_the_learning_rate_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"kind": "cosine", "peak_learning_rate": 1e-3, "final_learning_rate": 1e-4, "decay_steps": 1}
    first = {"first_step": 1, "offset_steps": 0, **facts, "kind": "constant", "warmup_steps": 100, "steps": 1000}
    second = {"first_step": 1001, "offset_steps": 1000, **facts, "warmup_steps": 0, "steps": 9000}
    save(tmp_path / "checkpoints", 2000, schedule={"segments": [first, second]})
    _, out, _ = run(capsys, "show", tmp_path)
    before, after = (line for line in out.splitlines() if line.startswith("learning rate"))
    assert_names(before, 1, "constant", "0.001", 100)
    assert_names(after, "1,001", "cosine", "0.001", "0.0001", "10,000")


def test_show_finds_files_that_are_gone_or_cut(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder(run_dir, 500) / RANK_FILE
    file.write_bytes(b"x" * 100)
    code, _, error = run(capsys, "show", folder(run_dir, 500))
    assert code == 2
    assert_names(error, RANK_FILE, 100)
    file.unlink()
    code, _, error = run(capsys, "show", folder(run_dir, 500))
    assert code == 2
    assert_names(error, RANK_FILE)


def test_verify_hashes_everything(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", run_dir)
    assert code == 0
    whole = {line.partition(": ")[0]: line.partition(": ")[2] for line in out.splitlines()}
    assert list(whole) == [str(folder(run_dir, step)) for step in (500, 1000, 1500, 10000)]
    assert len(set(whole.values())) == 1
    file = folder(run_dir, 1000) / RANK_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, error = run(capsys, "verify", run_dir)
    assert code == 2
    damaged = {line.partition(": ")[0]: line.partition(": ")[2] for line in out.splitlines()}
    assert [path for path in whole if damaged[path] != whole[path]] == [str(folder(run_dir, 1000))]
    assert_names(error, 1, 4, file, "SHA-256")
    assert run(capsys, "verify", folder(run_dir, 1000))[0] == 2
    assert run(capsys, "verify", folder(run_dir, 500))[0] == 0


def test_a_name_under_runs_is_a_place_too(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "show", "mine")
    assert (code, "step-00010000" in out) == (0, True)
    assert all(len(line) <= 100 for line in out.splitlines()), out
    assert_names(run(capsys, "show", "mina")[2], "mina", "'mine'")


def test_mark_bad_and_good_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = folder(run_dir, 10000)
    assert run(capsys, "mark-bad", newest, "--reason", "a spike")[0] == 0
    assert (read_manifest(newest).status, read_manifest(newest).status_reason) == ("bad", "a spike")
    assert "step-00001000" in run(capsys, "show", run_dir)[1]  # what --resume auto would take now
    assert run(capsys, "mark-bad", newest, "--good", "--reason", "it was the plot")[0] == 0
    assert read_manifest(newest).status == "good"
    assert run(capsys, "mark-bad", newest)[0] == 2  # no reason
    assert run(capsys, "mark-bad", newest.parent / "latest", "--reason", "a spike")[0] == 0
    assert run(capsys, "mark-bad", newest, "--good")[0] == 0  # what messages advise
    assert (read_manifest(newest).status, read_manifest(newest).status_reason) == ("good", None)
    assert run(capsys, "mark-bad", run_dir, "--reason", "x")[0] == 2


def test_diff(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (500, 10000):
        (folder(run_dir, step) / "config.yaml").write_text(f"train: {{steps: {step}, seed: 1}}\n")
    code, out, _ = run(capsys, "diff", folder(run_dir, 500), run_dir)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["step", "500", "10000"] in lines
    assert ["config.train.steps", "500", "10000"] in lines
    assert "seed" not in out
    assert ["layers.0", "9.5e+05", "9.5e+05", "9.5e+05"] in lines
    code, out, _ = run(capsys, "diff", run_dir, run_dir)
    assert not {"step", "config.train.steps"} & set(out.split())
    assert out.splitlines()[-1].split() == ["norm", "0", "0", "0"]


def test_prune_reports_first_and_deletes_then(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("prune", run_dir, "--keep-last", 1, "--keep-every", 500)
    _, out, _ = run(capsys, *words, "--dry-run")
    assert out.count("\n") == 1
    assert_names(out, folder(run_dir, 1500))  # bad; the others are multiples of 500
    assert folder(run_dir, 1500).exists()
    _, deleted, _ = run(capsys, *words)
    assert deleted.count("\n") == 1
    assert_names(deleted, folder(run_dir, 1500))
    assert deleted != out
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == [
        f"step-{step}" for step in ("00000500", "00001000", "00010000", "00020000.tmp")
    ]
    assert "step-" not in run(capsys, *words)[1]
    assert run(capsys, "prune", run_dir, "--keep-last", 0)[0] == 2


def test_convert(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "weights.safetensors"
    assert run(capsys, "convert", run_dir, target, "--dtype", "bf16")[0] == 0
    assert {name: tuple(tensor.shape) for name, tensor in load_file(target).items()} == SHAPES
    for wrong, named in ((target, target), (tmp_path / "a" / "b", tmp_path / "a")):
        code, _, error = run(capsys, "convert", run_dir, wrong)
        assert code == 2
        assert_names(error, named)
    (folder(run_dir, 500) / RANK_FILE).write_bytes(b"x")
    assert run(capsys, "convert", folder(run_dir, 500), tmp_path / "c")[0] == 2
    assert not (tmp_path / "c").exists()


def test_a_manifest_of_another_format_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder(run_dir, 500) / "manifest.json").write_text(json.dumps({"format": 7}))
    code, _, error = run(capsys, "show", folder(run_dir, 500))
    assert code == 2
    assert_names(error, folder(run_dir, 500) / "manifest.json", "format 7")


@pytest.mark.parametrize(
    "words", [["verify"], ["diff", "."], ["convert", "w.safetensors"]], ids=["verify", "diff", "convert"]
)
def test_what_takes_long_reports_how_far_it_is(
    words: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalm.utils.progress.LINE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(manifest, "HASH_BLOCK_BYTES", 100)
    monkeypatch.chdir(run_dir)
    command, *others = words
    code, _, said = run(capsys, command, ".", *others)
    assert code == 0
    count = len(SHAPES)
    blocks = manifest.hashed_blocks(manifest.read_manifest(run_dir / "checkpoints" / "step-00010000"))
    if command != "verify":
        assert_names(said, f"{count - 1}/{count}")
    hashed = f"step-00010000 {blocks - 1:,}/{blocks:,}"
    assert (hashed in said) == (command != "diff")


def test_average_is_the_mean_of_the_weights(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config := run_dir / "config.yaml").write_text("run: {name: mine}\n")
    save(run_dir / "checkpoints", 2000, copies=(config,), run="mine")
    elsewhere = save(run_dir / "other" / "checkpoints", 3)
    output = run_dir / "average"
    code, out, _ = run(capsys, "average", run_dir, 500, 2000, elsewhere, "--output", output)
    path = output / "checkpoints" / "step-00002000"
    assert code == 0
    assert_names(out, path, "--extend-strategy weights")
    reader = CheckpointReader(path)
    assert reader.verify() == ""
    assert reader.holds_weights_only
    assert reader.manifest.step == 2000
    assert reader.manifest.averaged_from == ("?/step-00000003", "?/step-00000500", "mine/step-00002000")
    assert (path / "config.yaml").read_text() == config.read_text()
    for name, shape in SHAPES.items():
        mean = sum(whole(step, name, "master").double() for step in (3, 500, 2000)) / 3
        assert torch.equal(reader.read_parameter(name, shape).view(-1), torch.as_tensor(mean).float())


def test_an_average_is_of_good_checkpoints_of_one_model(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir / "checkpoints", 3000, fingerprints={"tokenizer": "f" * 64})
    output = run_dir / "average"
    for steps, names in (
        ([500], ["two"]),
        ([500, 1000, "step-00000500"], ["two"]),
        ([500, 1500], ["step-00001500", "loss of 9"]),
        ([500, 700], ["700", "step-00000500"]),
        ([500, 3000], ["step-00000500", "step-00003000", "tokenizer"]),
    ):
        code, _, error = run(capsys, "average", run_dir, *steps, "--output", output)
        assert code == 2
        assert_names(error, *names)
    assert not output.exists()
    output.mkdir()
    (output / "mine").write_text("")
    assert_names(run(capsys, "average", run_dir, 500, 1000, "--output", output)[2], output, "not empty")


def test_an_average_is_a_model_and_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).resolve().parents[2] / "fixtures" / "run-0.1.0" / "small"
    assert run(capsys, "average", source, 4, "latest", "--output", tmp_path / "mean")[0] == 0
    path = folder(tmp_path / "mean", 9)
    first, last = (CheckpointReader(folder(source, step)).model() for step in (4, 9))
    weights = InferenceModel(path).network.state_dict()
    for name, values in first.items():
        torch.testing.assert_close(weights[name].cpu(), (values + last[name]) / 2, rtol=0, atol=1e-7)
    with pytest.raises(ConfigError) as refused:
        refuse_existing_run(RunFolder(tmp_path / "mean"), resume=True)
    assert_names(str(refused.value), path, "--extend-strategy weights")
