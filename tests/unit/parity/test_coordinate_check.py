"""The coordinate check passes under the maximal-update parametrisation, and names what a missing scaling makes grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.cli.main import main
from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.errors import EXIT_DONE, EXIT_FAILED
from megalm.model.model_config import ModelConfig
from megalm.model.transformer import LanguageModel
from megalm.parity import coordinate_check
from megalm.parity.coordinate_check import LENGTH, CoordinateCheck, check_coordinates, shape_at, slope
from megalm.parity.miniature import VOCABULARY
from megalm.parity.miniature_training import SyntheticSamples
from megalm.planning.resolve import OptimizerFacts, ResolvedRun, resolve
from megalm.runs.run_settings import read_settings
from tests.messages import assert_names

WIDTHS = (32, 64, 128, 256)
MUP = "model.mup_base_width=128"


def run_of(*overrides: str, json: str = "zero1.json") -> ResolvedRun:
    files = read_settings(None, overrides, json, resume=False, ranks=1)
    device = DeviceFacts("cpu", bf16=True, memory_bytes=4 << 30)
    return resolve(files.loaded, files.deepspeed, 1, device, VOCABULARY, data_needed=False)


def check(*overrides: str, json: str = "zero1.json") -> CoordinateCheck:
    return check_coordinates(run_of(*overrides, json=json), SyntheticSamples(LENGTH, False), VOCABULARY, WIDTHS)


def failures(found: CoordinateCheck) -> set[str]:
    return {it.name for it in found.failures}


@pytest.mark.parametrize(
    ("overrides", "json"),
    [
        ((), "zero1.json"),
        (("model.style=gpt2", "model.num_key_value_heads=2", "schedule.peak_learning_rate=1e-3"), "zero1.json"),
        (("model.qk_norm=true", "model.tie_word_embeddings=false"), "muon.json"),
    ],
    ids=["llama", "gpt2", "muon"],
)
def test_nothing_depends_on_the_width(overrides: tuple[str, ...], json: str) -> None:
    assert not failures(check(MUP, *overrides, json=json))


def test_all_grows_under_standard_parametrisation() -> None:
    grows = {it.name for it in check().failures if it.slope > 0.3}
    assert grows >= {"attention, change", "mlp, change", "residual stream, change", "scores, change", "logits, change"}


def without_rates(patch: pytest.MonkeyPatch) -> None:
    whole = OptimizerFacts.rate_scales
    patch.setattr(OptimizerFacts, "rate_scales", lambda facts, peak, multiplier: whole(facts, peak))


def without_initial_weights(patch: pytest.MonkeyPatch) -> None:
    whole = coordinate_check.initialize
    patch.setattr(
        coordinate_check,
        "initialize",
        lambda model, shape, seed: whole(model, replace(shape, mup_base_width=None), seed),
    )


def without_logits(patch: pytest.MonkeyPatch) -> None:
    def built(shape: ModelConfig) -> LanguageModel:
        model = LanguageModel(shape)
        model.head.width_multiplier = 1.0
        return model

    patch.setattr(coordinate_check, "LanguageModel", built)


def without_scores(patch: pytest.MonkeyPatch) -> None:
    def shape(*arguments: Any) -> ModelConfig:
        return replace(shape_at(*arguments), attention_scale=None)

    patch.setattr(coordinate_check, "shape_at", shape)


@pytest.mark.parametrize(
    ("leave_out", "named"),
    [
        (without_rates, {"attention, change", "mlp, change"}),
        (without_initial_weights, {"attention, initial", "mlp, initial"}),
        (without_logits, {"logits, initial", "logits, change"}),
        (without_scores, {"scores, initial"}),
    ],
)
def test_a_scaling_left_out_is_seen(
    leave_out: Callable[[pytest.MonkeyPatch], None], named: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch)
    assert failures(check(MUP)) >= named


def test_a_slope_is_the_exponent() -> None:
    assert slope((2, 4, 8), [3 * width**-0.5 for width in (2, 4, 8)]) == pytest.approx(-0.5)
    assert slope((2, 4), (0.0, 0.0)) == 0, "what is frozen"
    assert slope((2, 4), (1.0, float("nan"))) != slope((2, 4), (1.0, float("nan")))


def test_the_model_in_small_keeps_the_choices() -> None:
    choices = ("model.partial_rotary_factor=0.4", "model.num_attention_heads=16", "model.num_key_value_heads=4")
    sizes = ("model.hidden_size=1280", "model.intermediate_size=1920", "model.num_hidden_layers=24")
    run = run_of(*sizes, *choices, "model.mup_base_width=320", "model.sliding_window=30")
    for width in WIDTHS:
        shape = shape_at(run, width, WIDTHS[0], VOCABULARY)
        assert (shape.num_key_value_heads, shape.intermediate_size, shape.sliding_window) == (1, 1.5 * width, 30)
        assert shape.width_multiplier == width / WIDTHS[0]
        assert shape.rotary_dim % 2 == 0 < shape.rotary_dim < shape.head_dim


def test_the_command_says_it_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coordinate_check, "WIDTHS", WIDTHS)
    monkeypatch.chdir(tmp_path)

    def ends(*words: str) -> tuple[int | str | None, str]:
        with pytest.raises(SystemExit) as left:
            main(["plan", "--coordinate-check", "--deepspeed_config", "zero1.json", *words])
        return left.value.code, capsys.readouterr().out

    code, text = ends(MUP)
    assert code == EXIT_DONE
    assert "NO" not in text.split()
    assert (tmp_path / "coordinate-check.png").stat().st_size > 10_000
    code, text = ends("--plot", "own.svg")
    assert code == EXIT_FAILED
    assert_names(text, "model.mup_base_width")
    assert (tmp_path / "own.svg").exists()
