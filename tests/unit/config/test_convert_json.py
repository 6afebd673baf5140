"""`megalm config convert`: whatever people have becomes two files that a run takes, and no key goes without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from census_shapes import SHAPES, Shape, adamw, plain
from config_cases import GPU, refused

from megalm.cli.main import main
from megalm.config.deepspeed.json_reader import parse_deepspeed_json, read_deepspeed_json
from megalm.config.deepspeed.translate import translate
from megalm.config.loading import load_run_config
from megalm.cost_model.gpu_specs import data_sheet_peak, gpu_by_name, known_gpus
from megalm.planning.convert_json import CHANGES_TRAINING, Converted, convert
from megalm.planning.resolve import ResolvedRun, resolve
from tests.messages import assert_names


def converted(shape: Shape, folder: Path, ranks: int | None = None) -> tuple[Converted, ResolvedRun]:
    path = folder / "theirs.json"
    path.write_text(json.dumps(shape.json))
    made = convert(path, ranks or shape.ranks, GPU, "quickstart")
    json_file, yaml_file = made.write(folder / "mine", path)
    loaded = load_run_config(str(yaml_file), [])
    return made, resolve(loaded, read_deepspeed_json(json_file), ranks or shape.ranks, GPU)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_accepted_and_accounted_for(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    made, run = converted(shape, tmp_path)
    assert not any(
        run.deepspeed_source.outcomes[at].action == "refused" for at in range(len(run.deepspeed_source.outcomes))
    )
    rows = {row.key: row for row in made.rows}
    translation = translate(shape.json)
    assert {outcome.key for outcome in translation.outcomes} <= rows.keys()
    for outcome in translation.outcomes:
        if outcome.action == "refused" and not outcome.is_ignored:
            assert rows[outcome.key].became == CHANGES_TRAINING, outcome.key
    kept = {key for key, row in rows.items() if row.became == "kept"}
    honoured = {outcome.key for outcome in translation.outcomes if outcome.action == "supported"}
    assert kept <= honoured
    for key in honoured - kept:
        assert rows[key].why, key


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.refused])
def test_what_trains_as_it_is_trains_the_same_after(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(shape.json))
    made, after = converted(shape, tmp_path)
    length = [f"train.steps={made.run['train.steps']}"] if "train.steps" in made.run else []
    before = resolve(load_run_config(None, length), read_deepspeed_json(path), shape.ranks, GPU)
    assert after.deepspeed == before.deepspeed
    assert (after.schedule, after.optimizer) == (before.schedule, before.optimizer)


def test_the_global_batch_is_kept_on_other_ranks(tmp_path: Path) -> None:
    made, run = converted(SHAPES["on-the-wrong-ranks"], tmp_path)
    assert run.batch.global_batch == 64
    assert "gradient_accumulation_steps" not in made.deepspeed
    assert made.deepspeed["train_micro_batch_size_per_gpu"] == 4
    made, run = converted(SHAPES["no-divisor"], tmp_path)
    assert (run.batch.global_batch, made.deepspeed["train_micro_batch_size_per_gpu"]) == (16, "auto")
    (tmp_path / "theirs.json").write_text(json.dumps(plain(train_batch_size=6)))
    assert_names(refused(convert, tmp_path / "theirs.json", 4, GPU, "quickstart"), "train_batch_size=6", 4)


def test_what_replaces_a_section_is_in_the_run_file(tmp_path: Path) -> None:
    made, run = converted(SHAPES["recomputation"], tmp_path)
    assert run.config.train.checkpoint_activations_every == 1
    assert made.run["train.checkpoint_activations_every"] == 1
    made, run = converted(SHAPES["monitors"], tmp_path)
    assert made.run["tracking.mlflow"] is True
    made, run = converted(SHAPES["warmup-decay-numbers"], tmp_path)
    assert "scheduler" not in made.deepspeed
    schedule = run.config.schedule
    assert (run.config.train.steps, schedule.kind, schedule.warmup_steps) == (10000, "linear", 1000)
    off = Shape(plain(activation_checkpointing={"partition_activations": False, "number_checkpoints": None}))
    assert "train.checkpoint_activations_every" not in converted(off, tmp_path)[0].run


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs.json"
    content = plain(optimizer={"type": "Lamb", "params": {"lr": 0.01}}, train_batch_size=8)
    theirs.write_text("// theirs\n" + json.dumps(content))
    words = ["config", "convert", str(theirs), "--write", str(tmp_path / "mine")]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    shown = capsys.readouterr()
    assert_names(shown.out, "optimizer", CHANGES_TRAINING, "train_batch_size", 8, tmp_path / "mine" / "run.yaml")
    assert_names(shown.err, "optimizer")
    assert parse_deepspeed_json(tmp_path / "mine" / "deepspeed.json")["train_batch_size"] == 8
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert_names(capsys.readouterr().err, tmp_path / "mine" / "deepspeed.json")


def test_its_own_input_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "deepspeed.json"
    theirs.write_text(json.dumps(plain(optimizer=adamw())))
    before = theirs.read_bytes()
    for folder in (tmp_path, tmp_path / "link"):
        (tmp_path / "link").exists() or (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(SystemExit) as left:
            main(["config", "convert", str(theirs), "--write", str(folder)])
        assert left.value.code == 2
        assert_names(capsys.readouterr().err, folder / "deepspeed.json")
    assert theirs.read_bytes() == before
    assert not (tmp_path / "run.yaml").exists()


def test_gpus_by_name() -> None:
    gib = 2**30
    assert gpu_by_name("a100").memory_bytes == gpu_by_name("A100-80GB").memory_bytes == 80 * gib
    assert gpu_by_name("A100-40GB").memory_bytes == 40 * gib
    assert gpu_by_name("RTX 5090") == gpu_by_name("rtx-5090")
    assert (gpu_by_name("V100").bf16, gpu_by_name("V100-16GB").memory_bytes) == (False, 16 * gib)
    assert gpu_by_name("NVIDIA GH200 480GB").memory_bytes == gpu_by_name("gh200").memory_bytes == 96 * gib
    assert gpu_by_name("A6000") == gpu_by_name("NVIDIA RTX A6000")
    assert gpu_by_name("GeForce RTX 3090").memory_bytes == 24 * gib
    assert_names(refused(gpu_by_name, "A1000"), "--gpu A1000", "A100", "H100", "B200", "L40S", "RTX 3090")


def test_each_gpu_of_a_plan_has_a_speed() -> None:
    for gpu in known_gpus():
        facts = gpu_by_name(gpu)
        for name in (facts.name, f"{facts.name} 16GB", f"NVIDIA {gpu}"):
            assert data_sheet_peak(name or "", low_precision=True) is not None, name
