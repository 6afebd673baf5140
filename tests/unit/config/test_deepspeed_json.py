from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_cases import BASE, Write, read_refused

from megalm.config.deepspeed.json_reader import read_deepspeed_json, shipped_deepspeed_jsons
from megalm.config.deepspeed.json_schema import DeepSpeedSettings, ZeroSection
from megalm.config.deepspeed.translate import OLDER
from megalm.config.deepspeed.unsupported_keys import UNSUPPORTED
from megalm.config.validation import leaf_fields
from tests.messages import assert_names

SHIPPED = {path.stem: path for path in shipped_deepspeed_jsons()}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_jsons_keep_the_house_rules(name: str) -> None:
    raw = json.loads(SHIPPED[name].read_text())
    settings = read_deepspeed_json(SHIPPED[name]).settings
    assert settings.train_batch_size == 16
    assert settings.train_micro_batch_size_per_gpu == "auto"
    assert "gradient_accumulation_steps" not in raw
    assert "scheduler" not in raw
    assert settings.gradient_clipping == 1.0
    assert settings.optimizer is not None
    params = settings.optimizer.params
    assert settings.optimizer.type == ("Muon" if name == "muon" else "AdamW")
    assert (params.lr, params.betas, params.eps) == (None, (0.9, 0.95), 1e-8)
    assert params.weight_decay == 0.1


def test_the_shipped_jsons_are_what_their_names_say() -> None:
    def zero(name: str) -> ZeroSection:
        return read_deepspeed_json(SHIPPED[name]).settings.zero_optimization

    assert {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fp16", "bf16", "fp32"} <= set(SHIPPED)
    for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
        assert zero(name).stage == int(name[4])
        offload = zero(name).offload_optimizer
        assert (offload is not None and offload.device == "cpu") == ("offload" in name)
        assert (zero(name).offload_param is not None) == (name == "zero3_offload")
    for name, fp16, bf16 in (("fp16", True, False), ("bf16", False, True), ("fp32", False, False)):
        settings = read_deepspeed_json(SHIPPED[name]).settings
        assert (settings.fp16.enabled, settings.bf16.enabled) == (fp16, bf16)
    assert read_deepspeed_json(SHIPPED["fp16"]).settings.fp16.loss_scale == 0  # dynamic


def test_deepspeed_knows_every_supported_zero_key_and_default() -> None:
    """Against DeepSpeed's own models: a renamed key or a changed default would be wrong in silence."""
    theirs = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    for name, field in ZeroSection.model_fields.items():
        assert name in theirs.model_fields
        assert field.alias == theirs.model_fields[name].alias
        default = theirs.model_fields[name].default
        if name not in ("stage", "model_persistence_threshold"):
            assert field.default == default, name


def test_deepspeed_knows_every_supported_precision_key_and_default() -> None:
    theirs = pytest.importorskip("deepspeed.runtime.precision_config")
    settings = DeepSpeedSettings.model_fields
    for name, model in (("fp16", theirs.DeepSpeedFP16Config), ("bf16", theirs.DeepSpeedBF16Config)):
        for key, field in type(settings[name].default).model_fields.items():
            assert field.default == model.model_fields[key].default, key


def test_every_zero_key_of_deepspeed_is_in_a_table() -> None:
    theirs = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    known = {f"zero_optimization.{name}" for name in ZeroSection.model_fields} | {*UNSUPPORTED, *OLDER}
    assert {f"zero_optimization.{name}" for name in theirs.model_fields} <= known


def test_stage_3_keys_go_by_both_spellings(write_json: Write) -> None:
    for key in ("stage3_max_live_parameters", "max_live_parameters"):
        config = read_deepspeed_json(write_json(zero_optimization={"stage": 3, key: 5e8}))
        assert config.settings.zero_optimization.max_live_parameters == 500_000_000
        assert config.to_dict()["zero_optimization"] == {"stage": 3, "stage3_max_live_parameters": 500_000_000}
    twice = {"stage": 3, "stage3_max_live_parameters": 1, "max_live_parameters": 2}
    assert_names(
        read_refused(write_json(zero_optimization=twice)), *(f"zero_optimization.{name}" for name in list(twice)[1:])
    )


def test_explicit_keys_only(write_json: Write) -> None:
    config = read_deepspeed_json(write_json(optimizer=None))
    assert config.to_dict() == {key: value for key, value in BASE.items() if key != "optimizer"}
    assert "zero_optimization.stage" in config.explicit_keys
    assert "optimizer.type" not in config.explicit_keys


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"bf61": {"enabled": True}}, ["bf61", "bf16"]),
        ({"gradient_cliping": 1}, ["gradient_cliping", "gradient_clipping"]),
        ({"zero_optimization": {"stge": 1}}, ["zero_optimization.stge", "stage"]),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_params": 1}},
            ["zero_optimization.stage3_max_live_params", "stage3_max_live_parameters"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            ["zero_optimization.offload_optimizer.devise", "device"],
        ),
        ({"stage": 2}, ["stage", "zero_optimization.stage"]),
        ({"xyzzy": 2}, ["xyzzy"]),
        ({"fp16": {"enabled": 2}}, ["fp16.enabled=2", '"auto"']),
        ({"train_batch_size": 0}, ["train_batch_size=0", 0]),
        ({"train_batch_size": "16"}, ['train_batch_size="16"']),
        ({"train_batch_size": 16.5}, ["train_batch_size=16.5"]),
        ({"gradient_clipping": -1}, ["gradient_clipping=-1", 0]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4", 0, 1, 2, 3]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage=true", 0, 1, 2, 3]),
        ({"zero_optimization": 2}, ["zero_optimization=2", "stage"]),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            ['zero_optimization.offload_param.device="gpu"', '"none"', '"cpu"', '"nvme"'],
        ),
        ({"communication_data_type": "fp8"}, ['communication_data_type="fp8"', '"fp32"', '"bf16"', '"fp16"']),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ["optimizer.type"]),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, ["optimizer.params.betas=[0.9]", 2]),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}}, ["optimizer.params.betas=[0.9, 1.0]"]),
    ],
)
def test_unknown_keys_and_bad_values(write_json: Write, changes: dict[str, Any], names: list[object]) -> None:
    path = write_json(**changes)
    assert_names(read_refused(path), path, *names)


@pytest.mark.parametrize("kind", ["Lamb", "Lion", "OneBitAdam", "ZeroOneAdam", "SGD", "Adagrad"])
def test_other_optimizers(write_json: Write, kind: str) -> None:
    message = read_refused(write_json(optimizer={"type": kind, "params": {"max_coeff": 1, "momentum": 0.9}}))
    assert_names(message, f'optimizer.type="{kind}"', '"AdamW"', '"Adam"', '"Muon"')


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_known_but_not_supported(write_json: Write, path: str) -> None:
    rule = UNSUPPORTED[path]
    change = _nested(path, {"enabled": True, "something": 1})
    if path.startswith("optimizer."):
        change["optimizer"]["type"] = "AdamW"
    file = write_json(**change)
    if rule.inert:
        (notice,) = (notice for notice in read_deepspeed_json(file).notices if path in notice)
        assert rule.why in notice
    else:
        message = read_refused(file)
        assert_names(message, path)
        assert rule.why in message
        assert rule.instead in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tensorboard": {"enabled": False, "output_path": "x"}}, "tensorboard"),
        ({"autotuning": {"enabled": False}}, "autotuning"),
        ({"wandb": None}, "wandb"),
        ({"prescale_gradients": False}, "prescale_gradients"),
        ({"gradient_predivide_factor": 1}, "gradient_predivide_factor"),
        (
            {"zero_optimization": {"stage": 2, "zero_quantized_gradients": False}},
            "zero_optimization.zero_quantized_gradients",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "ratio": 1.0}}},
            "zero_optimization.offload_optimizer.ratio",
        ),
    ],
)
def test_a_value_without_effect_is_ignored_and_reported(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BASE | change))
    config = read_deepspeed_json(path)
    (notice,) = config.notices
    assert_names(notice, path, key)
    assert set(config.to_dict()) == set(BASE)


def test_one_is_not_true(write_json: Write) -> None:
    """0 == False in Python: a value of another type is not the harmless one."""
    zero = {"stage": 2, "zero_quantized_weights": 0}
    assert_names(read_refused(write_json(zero_optimization=zero)), "zero_optimization.zero_quantized_weights=0")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"train_batch_size": 16,\n  "bf16": {"enabled" true}}', ["line 2", "column 22"]),
        ('{"fp16": {}, "fp16": {}}', ["'fp16'"]),
        ('{"bf16": {"enabled": true, "enabled": false}}', ["'enabled'"]),
        ('{"gradient_clipping": NaN}', ["NaN"]),
        ('{"gradient_clipping": 1e999}', ["gradient_clipping=Infinity"]),
        ("[1]", []),
    ],
)
def test_a_file_that_is_not_such_a_json(tmp_path: Path, text: str, names: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert_names(read_refused(path), path, *names)


def test_a_missing_file_lists_the_shipped_ones(tmp_path: Path) -> None:
    message = read_refused(tmp_path / "zero_2.json")
    assert_names(message, "zero_2.json", "'zero2.json'", *(path.name for path in SHIPPED.values()))


def test_no_key_is_both_supported_and_refused() -> None:
    assert not set(leaf_fields(DeepSpeedSettings)) & {*UNSUPPORTED, *OLDER}
