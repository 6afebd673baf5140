"""What `megalm parity` keeps of a configuration, what it shrinks, and what it refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from megalm.config.deepspeed.json_reader import DS_CONFIGS_FOLDER, DeviceFacts
from megalm.config.loading import preset_paths
from megalm.errors import ConfigError
from megalm.parity.miniature import ParityCase, make_case
from megalm.runs.run_settings import read_settings
from tests.messages import assert_names

GPU = DeviceFacts("cuda", bf16=True, memory_bytes=2**40, float8=True)


def case(*overrides: str, json: str | Path = "zero1.json", ranks: int = 1, config: str | None = None) -> ParityCase:
    return make_case(read_settings(config, overrides, str(json), resume=False, ranks=ranks), ranks, GPU)


def written(path: Path, **content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_degrees_shrink_to_two_and_features_stay() -> None:
    found = case(
        "parallel.tensor=8",
        "parallel.pipeline=4",
        "parallel.context=4",
        "parallel.context_method=ring",
        "parallel.sequence=true",
        "model.num_hidden_layers=8",
        "model.hidden_size=1024",
        "model.mup_base_width=256",
        "model.num_attention_heads=16",
        "model.num_key_value_heads=8",
        "model.intermediate_size=4096",
        "model.tie_word_embeddings=true",
        "train.checkpoint_activations_every=2",
        "data.document_mask=true",
        ranks=256,
    )
    run, config = found.run, found.run.config
    topology = run.topology
    assert (topology.data, topology.context, topology.tensor, topology.pipeline) == (2, 2, 2, 2)
    assert config.parallel.sequence
    assert config.parallel.context_method == "ring"
    assert (found.reference.topology.world_size, found.reference.config.parallel.context_method) == (1, "all_to_all")
    assert config.model.tie_word_embeddings
    assert config.train.checkpoint_activations_every == 2
    assert config.data.document_mask
    assert 1 < found.shape.num_key_value_heads < found.shape.num_attention_heads
    assert run.batch.accumulation > 1
    changes = {change.key: (change.own, change.miniature) for change in found.changes}
    assert changes["parallel.tensor"] == (8, 2)
    assert changes["parallel.pipeline"] == (4, 2)
    assert changes["parallel.context"] == (4, 2)
    assert changes["model.hidden_size"] == (1024, 32)
    assert changes["model.mup_base_width"] == (256, 8)
    assert "train.checkpoint_activations_every" not in changes


def test_a_miniature_has_layers_with_experts_and_without() -> None:
    sizes = ("num_experts=64", "num_experts_per_token=6", "num_dense_layers=9", "num_shared_experts=2", "moe_layers=2")
    found = case(*(f"model.{size}" for size in sizes), "model.num_hidden_layers=16", "compile=false", ranks=2)
    shape = found.shape
    assert (shape.num_experts, shape.num_experts_per_token, shape.num_shared_experts) == (4, 2, 2)
    assert (shape.num_hidden_layers, shape.moe_layers, shape.moe_intermediate_size) == (4, (3,), 48)
    changes = {change.key: (change.own, change.miniature) for change in found.changes}
    assert changes["model.num_experts"] == (64, 4)


def test_the_fewest_ranks_have_all_degrees() -> None:
    words = ("parallel.tensor=2", "parallel.context=2", "parallel.expert=4", "model.num_experts=4", "compile=false")
    assert read_settings(None, words, "zero1.json", resume=False, ranks=8).loaded.config.parallel.fewest_ranks == 8
    assert case(*words, ranks=8).run.topology.expert == 2
    with pytest.raises(ConfigError) as error:
        case(*words, ranks=4)
    assert_names(error.value, "parallel.expert=4")


def test_choices_of_layers_still_have_an_effect() -> None:
    choices = "model.sliding_window=9", "model.full_attention_layers=[0, 1, 2, 3]"
    shape = case("model.num_hidden_layers=8", *choices).shape
    assert len({shape.window(layer) for layer in range(shape.num_hidden_layers)}) == 2


def test_the_reference_is_the_same_job_undivided() -> None:
    found = case("parallel.tensor=2", "train.checkpoint_activations_every=1", json="zero3.json", ranks=4)
    run, reference = found.run, found.reference
    assert reference.topology.world_size == 1
    assert reference.batch.global_batch == run.batch.global_batch
    assert (run.zero_stage, reference.zero_stage) == (3, 1)
    assert (run.config.train.checkpoint_activations_every, reference.config.train.checkpoint_activations_every) == (
        1,
        0,
    )
    assert reference.optimizer == run.optimizer
    assert reference.precision == run.precision == "bf16"
    assert reference.deepspeed["gradient_clipping"] == run.deepspeed["gradient_clipping"] > 0
    assert run.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize("name", [path.name for path in sorted(DS_CONFIGS_FOLDER.glob("*.json"))])
def test_every_shipped_json_has_a_miniature(name: str) -> None:
    found = case(json=name, ranks=2)
    pickle.loads(pickle.dumps(found))
    settings = found.run.deepspeed_source.settings
    original = json.loads((DS_CONFIGS_FOLDER / name).read_text())["zero_optimization"]
    assert found.run.zero_stage == original["stage"]
    assert (settings.zero_optimization.offload_optimizer is None) == ("offload_optimizer" not in original)
    assert any("nvme" in line for line in found.not_shown) == ("nvme" in name)


@pytest.mark.parametrize("name", list(preset_paths()))
def test_every_preset_has_a_miniature(name: str) -> None:
    """From its own JSON, without its data."""
    files = read_settings(name, (), None, resume=False, ranks=1)
    found = make_case(files, files.loaded.config.documented.devices or 1, GPU)
    assert found.shape.hidden_size == 32
    assert found.run.precision == found.reference.precision


def test_a_batch_that_grows_does_so_in_a_miniature() -> None:
    found = case("schedule.batch=[{from_step: 500, sequences: 32}, {from_step: 1000, sequences: 64}]", ranks=2)
    assert [stage.first_step for stage in found.run.stages.stages] == [1, 2, 3]
    assert found.reference.stages == found.run.stages
    assert "schedule.batch" in {change.key for change in found.changes}
    assert not case(ranks=2).run.stages.grow


def test_no_data_is_needed() -> None:
    found = case("data.train=nowhere/at/all", "data.tokenizer=nowhere.json", "data.sequence_length=4096")
    assert found.run.config.data.train is None
    assert "data.sequence_length" in {change.key for change in found.changes}


@pytest.mark.parametrize(
    ("overrides", "ranks", "word"),
    [
        (("compile=true",), 1, "compile"),
        (("precision.float8=true", "model.hidden_size=256", "model.intermediate_size=512"), 1, "float8"),
        (("parallel.balance=time", "parallel.pipeline=2"), 2, "balance"),
        (("model.dropout=0.1",), 1, "dropout"),
        ((), 16, "ranks"),
        (("model.num_experts=4", "train.expert_capacity_factor=1"), 1, "train.expert_capacity_factor"),
    ],
)
def test_what_a_cpu_cannot_show_is_named(overrides: tuple[str, ...], ranks: int, word: str) -> None:
    assert any(word in line for line in case(*overrides, ranks=ranks).not_shown)
    if word != "compile":  # by default on a GPU that compiles
        assert not any(word in line for line in case().not_shown)


def test_fp32_on_demand() -> None:
    files = read_settings(None, (), "bf16.json", resume=False, ranks=1)
    found = make_case(files, 1, GPU, fp32=True)
    assert found.run.precision == found.reference.precision == "fp32"
    assert ("precision", "bf16", "fp32") in [(each.key, each.own, each.miniature) for each in found.changes]


def test_no_gpu_is_promised() -> None:
    assert any("NCCL" in line for line in case().not_shown)


def test_clipping_stays_off(tmp_path: Path) -> None:
    path = written(tmp_path / "own.json", train_batch_size=8, gradient_clipping=0, zero_optimization={"stage": 0})
    found = case("parallel.pipeline=2", json=path, ranks=2)
    assert found.run.deepspeed["gradient_clipping"] == found.reference.deepspeed["gradient_clipping"] == 0


def test_gradients_go_as_in_the_run() -> None:
    for way, whole in (("step", True), ("micro_batch", False)):
        assert case(f"train.reduce_gradients={way}", json="zero2.json").run.whole_gradients == whole


def test_a_run_that_would_be_refused_has_no_miniature() -> None:
    with pytest.raises(ConfigError) as error:
        case("parallel.pipeline=2", json="zero3.json", ranks=2)
    assert_names(error.value, "parallel.pipeline", "zero_optimization.stage")
