"""The recipes: each documented number in its place, its JSON found, its GPUs large enough, its claims judged."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from config_cases import CPU, refused, section_of

from megalm.cli.plan import planned
from megalm.cli.plan_text import plan_text
from megalm.config.deepspeed.json_reader import DS_CONFIGS_FOLDER, DeviceFacts, read_deepspeed_json
from megalm.config.loading import ConfigLayers, config_to_yaml, load_run_config, preset_paths
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields
from megalm.planning.recipe_claims import EXPECTED, HOLDS, NO_VERDICT, Judgement, judge
from megalm.planning.resolve import resolve
from megalm.planning.run_plan import Plan
from megalm.runs.run_settings import read_settings
from tests.messages import assert_names

RECIPES = sorted(name for name, path in preset_paths().items() if path.parent.name == "recipes")


@functools.cache
def plan_of(name: str, *overrides: str) -> Plan:
    """As `megalm plan --config NAME` does it, on GPUs of 24 GiB where the document names none."""
    files = read_settings(name, overrides, None, resume=False, ranks=1)
    documented = files.loaded.config.documented
    device = DeviceFacts("cuda", True, int((documented.device_memory_gib or 24) * 2**30), name=documented.device)
    return planned(files, documented.devices or 1, device, 8)


def judged(name: str, *overrides: str) -> dict[tuple[str, object], Judgement]:
    """By kind of claim, and the value or both its ends."""
    plan = plan_of(name, *overrides)
    keys = [(claim.claim, claim.value) for claim in plan.resolved.config.documented.claims]
    return dict(zip(keys, judge(plan), strict=True))


@dataclass(frozen=True)
class Documented:
    """The numbers of a document that training follows."""

    shape: tuple[int, int, int, int]  # layers, hidden, heads, vocabulary
    length: int
    batch: tuple[int, int, int, int]  # sequences a step = micro-batch x accumulation x GPUs
    rates: dict[int, float]  # of steps
    settings: dict[str, Any]


GPT2_SMALL = (12, 768, 12)
DOCUMENTED = {
    "rtx5090-896x12": Documented(
        (12, 896, 14, 50_257),
        1024,
        (64, 4, 16, 1),
        {1: 3e-7, 2000: 6e-4},
        {
            "model.intermediate_size": 3584,
            "train.steps": 500_000,
            "guard.stop_above": 7,
            "guard.after_step": 1000,
            "schedule.warmup_steps": 2000,
        },
    ),
    "rtx5090-1280x16": Documented((16, 1280, 20, 50_257), 512, (64, 4, 16, 1), {2000: 6e-4}, {}),
    "gpt2-diagnostic": Documented(
        (*GPT2_SMALL, 50_257), 256, (8, 8, 1, 1), {}, {"schedule.kind": "cosine", "checkpoint.interval_steps": 500}
    ),
    "gpt2-diagnostic-resume": Documented(
        (*GPT2_SMALL, 50_257),
        128,
        (32, 32, 1, 1),
        {1: 1e-5, 1501: 1e-5, 3500: 1e-5},
        {"train.steps": 3500, "checkpoint.interval_steps": 500, "evaluate.interval_steps": 500},
    ),
    "h100-1k": Documented(
        (*GPT2_SMALL, 50_257), 1024, (1, 1, 1, 1), {1: 1e-5, 100: 1e-3, 1000: 1e-3}, {"train.steps": 1000}
    ),
    "h100-10k": Documented(
        (*GPT2_SMALL, 50_257), 1024, (1, 1, 1, 1), {100: 1e-3, 10_000: 1e-4}, {"schedule.kind": "cosine"}
    ),
    "a100x4-300m": Documented(
        (24, 1024, 16, 50_257),
        2048,
        (512, 32, 4, 4),
        {2000: 6e-4, 100_000: 6e-5},
        {
            "model.dropout": 0.1,
            "schedule.kind": "cosine",
            "schedule.warmup_steps": 2000,
            "train.steps": 100_000,
            "train.log_interval_steps": 100,
            "evaluate.interval_steps": 1000,
            "checkpoint.interval_steps": 10_000,
            "checkpoint.best": True,
            "data.split": "95,5",
        },
    ),
    "slm-117m": Documented(
        (*GPT2_SMALL, 30_000),
        512,
        (36, 18, 1, 2),
        {1000: 3e-4, 60_000: 3e-5},
        {
            "train.steps": 60_000,
            "evaluate.interval_steps": 500,
            "checkpoint.interval_steps": 500,
            "checkpoint.keep_last": 5,
        },
    ),
    "medium-354m": Documented(
        (24, 1024, 16, 30_000), 1024, (16, 2, 4, 2), {1000: 3e-5, 60_000: 0.0}, {"checkpoint.interval_steps": 250}
    ),
}


def test_every_recipe_is_looked_at() -> None:
    assert sorted(DOCUMENTED) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_document_says(name: str) -> None:
    plan, document = plan_of(name), DOCUMENTED[name]
    run, shape = plan.resolved, plan.shape
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads, shape.vocab_size) == document.shape
    assert run.config.data.sequence_length == document.length
    batch = run.batch
    assert (batch.global_batch, batch.micro_batch, batch.accumulation, batch.data_parallel) == document.batch
    rates = dict(plan.learning_rates)
    found = {step: rates.get(step, rates[run.config.train.steps]) for step in document.rates}
    assert found == pytest.approx(document.rates)
    for key, value in document.settings.items():
        section, field = key.split(".")
        assert getattr(getattr(run.config, section), field) == value, key
    assert plan.memory.total <= run.device.memory_bytes, "it runs on the documented GPUs"
    assert not [notice for notice in run.notices if "schedule." in notice], "nothing is shortened"


@pytest.mark.parametrize(("name", "precision"), [("rtx5090-896x12", "bf16"), ("a100x4-300m", "fp16")])
def test_precision_and_optimizer_are_those_of_the_document(name: str, precision: str) -> None:
    run = plan_of(name).resolved
    assert run.precision == precision
    assert run.deepspeed["gradient_clipping"] == 1.0
    assert (run.optimizer.kind, run.optimizer.weight_decay) == ("adamw", 0.1)
    if precision == "fp16":
        assert (run.optimizer.betas, run.optimizer.epsilon) == ((0.9, 0.95), 1e-8)
        assert run.deepspeed["fp16"]["loss_scale"] == 0, "scaled dynamically"


@pytest.mark.parametrize("path", sorted(DS_CONFIGS_FOLDER.glob("recipes/*.json")), ids=lambda path: path.stem)
def test_a_recipe_s_json_keeps_the_house_rules(path: Path) -> None:
    raw, settings = json.loads(path.read_text()), read_deepspeed_json(path).settings
    assert isinstance(settings.train_batch_size, int)
    assert isinstance(settings.train_micro_batch_size_per_gpu, int), "documented, and no choice of the device"
    assert "gradient_accumulation_steps" not in raw
    assert "scheduler" not in raw
    assert settings.optimizer is not None
    assert settings.optimizer.params.lr is None
    named = {load_run_config(name, []).config.deepspeed_config for name in RECIPES}
    assert f"ds_configs/recipes/{path.name}" in named


def test_a_recipe_brings_its_json_and_refuses_another_batch() -> None:
    files = read_settings("a100x4-300m", (), None, resume=False, ranks=1)
    assert Path(files.deepspeed.path).name == "a100x4-300m.json"
    other = read_deepspeed_json(DS_CONFIGS_FOLDER / "fp32.json")
    message = refused(resolve, files.loaded, other, 1, CPU, data_needed=False)
    names = ("train_batch_size=16", "a100x4-300m", "ds_configs/recipes/a100x4-300m.json", "train_batch_size=512")
    assert_names(message, *names, "--deepspeed_config")
    own = read_settings("a100x4-300m", ("deepspeed_config=null",), None, resume=False, ranks=1)
    assert Path(own.deepspeed.path).name == "zero2.json"
    settings = read_settings("a100x4-300m", (), str(DS_CONFIGS_FOLDER / "fp32.json"), resume=False, ranks=1)
    assert Path(settings.deepspeed.path).name == "fp32.json"


@pytest.mark.parametrize("name", ["quickstart", *RECIPES])
def test_a_preset_has_the_batch_of_its_json(name: str) -> None:
    """For another JSON without a batch: `batch.global_sequences` is the same number."""
    files = read_settings(name, (), None, resume=False, ranks=1)
    assert files.loaded.config.batch.global_sequences == files.deepspeed.settings.train_batch_size


def test_the_default_json_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in ((None, "zero2.json"), ("h100-1k", "h100.json")):
        assert Path(read_settings(name, (), None, resume=False, ranks=1).deepspeed.path).name == file


def test_a_run_that_goes_on_takes_the_json_of_a_recipe_that_is_named_now(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(load_run_config("gpt2-diagnostic", ["train.steps=9"]).config))
    (folder / "deepspeed.json").write_text((DS_CONFIGS_FOLDER / "fp32.json").read_text())
    words = (f"run.root={tmp_path}", "run.name=mine")

    def path(config: str | None) -> str:
        return str(read_settings(config, words, None, resume=True, ranks=1).deepspeed.path)

    assert path(None) == path("gpt2-diagnostic") == str(folder / "deepspeed.json")
    assert Path(path("gpt2-diagnostic-resume")).name == "gpt2-diagnostic-resume.json"


def test_a_recipe_without_data_is_planned_and_not_run() -> None:
    files = read_settings("slm-117m", (), None, resume=False, ranks=1)
    what_to_give = ("data.train=PREFIX", "data.tokenizer=FILE", "30,000")
    assert_names(refused(resolve, files.loaded, files.deepspeed, 1, CPU), *what_to_give)
    assert_names(section_of(plan_text(plan_of("slm-117m"), 8), "Data"), *what_to_give)
    assert_names(refused(plan_of, "slm-117m", "data.train=x"), "data.train=x", "data.tokenizer")


def test_what_only_describes_is_no_setting(tmp_path: Path) -> None:
    loaded = load_run_config("a100x4-300m", [])
    assert loaded.config.documented.claims
    text = config_to_yaml(loaded.config)
    assert "documented:" not in text
    kept = tmp_path / "config.yaml"
    kept.write_text(text)
    assert load_run_config(str(kept), []).config == loaded.config
    assert "documented." not in plan_text(plan_of("a100x4-300m"), 8).split("\n\n")[1]
    assert all(key.startswith("documented.") for key in leaf_fields(RunConfig) if "claims" in key)
    assert "documented" not in refused(load_run_config, None, ["hours=3"])


@pytest.mark.parametrize("preset", ["", "preset: a100x4-300m\n"])
def test_a_persons_own_account_of_a_document_goes_on_with_the_run(tmp_path: Path, preset: str) -> None:
    mine, kept = tmp_path / "mine.yaml", tmp_path / "config.yaml"
    claims = "[{claim: training_loss, step: 9, value: 5.5}, {claim: hours, value: [2, 3]}]"
    mine.write_text(f"{preset}documented: {{device: A100, claims: {claims}}}\n")
    loaded = load_run_config(str(mine), [])
    kept.write_text(config_to_yaml(loaded.config))
    assert [claim.step for claim in loaded.config.documented.claims] == [9, None]
    assert ConfigLayers(None, []).resumed_run(kept).config.documented == loaded.config.documented


@pytest.mark.parametrize("preset", [None, *RECIPES])
def test_a_configuration_knows_what_is_its_presets(tmp_path: Path, preset: str | None) -> None:
    """So that its YAML is written without reading the preset again."""
    own = tmp_path / "config.yaml"
    own.write_text(config_to_yaml(load_run_config(preset, []).config))
    written = tmp_path / "mine.yaml"
    written.write_text("preset: gpt2-diagnostic\ndocumented: {device: A100}\n")
    for given in (ConfigLayers(preset, []), ConfigLayers("gpt2-diagnostic", []), ConfigLayers(str(written), [])):
        for loaded in (given.new_run(), given.resumed_run(own)):
            assert config_to_yaml(loaded.config, loaded.documented_by_preset) == config_to_yaml(loaded.config)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "value", "computed", "verdict"),
    [
        ("rtx5090-896x12", "parameters", 550e6, ["161,694,848"], ["12 x 896", "50,257", "161.7", 550]),
        ("rtx5090-896x12", "tokens", 32.8e9, ["500,000 x 64 x 1,024", "32.8"], HOLDS),
        ("rtx5090-896x12", "tokens_per_step", 65_536, ["64 x 1,024"], HOLDS),
        ("rtx5090-896x12", "weights_gb", 2.2, ["0.323"], ["0.323", "2.2"]),
        ("rtx5090-896x12", "tokens_per_second", (2000, 2500), ["32.8", "3,641-4,551"], NO_VERDICT),
        ("rtx5090-896x12", "training_loss", (5.5, 6), ["65.5"], EXPECTED),
        ("rtx5090-1280x16", "parameters", 1.2e9, ["379,825,920"], ["16 x 1280", "50,257", "379.8", "1.2"]),
        ("a100x4-300m", "parameters", 300_124_416, ["302.3"], ["355.9", "300.1"]),
        ("a100x4-300m", "embedding_parameters", 51_463_168, ["50,257 x 1,024", "51,463,168"], HOLDS),
        ("a100x4-300m", "tokens", 12.8e9, ["104.9"], ["104.9", "12.8", "49,300", "72.2"]),
        ("a100x4-300m", "tokens_per_second", 49_300, ["7.2-8.4%", "4 x A100", 6], NO_VERDICT),
        ("a100x4-300m", "hours", 72.23, [591], ["104.9", "49,300", 591, "72.2"]),
        ("a100x4-300m", "training_loss", 10.82, ["50,257", "10.82"], HOLDS),
        ("a100x4-300m", "training_loss", 9.23, ["50,257", "10.82"], ["9.23", "10,199"]),
        ("a100x4-300m", "perplexity", 18.62, ["e^2.923", "18.6"], HOLDS),
        ("h100-1k", "samples", 990_362, ["990,362", "1,023"], HOLDS),
        ("h100-1k", "samples", 968, [968, 1], HOLDS),
        ("slm-117m", "parameters", 117e6, ["108,489,216"], ["12 x 768", "30,000", "108.5", 117]),
        ("slm-117m", "epochs", 3, ["2.18"], ["1.11", "2.18", 508, 3]),
        ("slm-117m", "hours", (7, 8), [170], ["60,000", "10.2", 170, "7-8"]),
        ("medium-354m", "parameters", 354e6, ["334,080,000"], ["24 x 1024", "30,000", "334.1", 354]),
        ("medium-354m", "hours", (28, 32), [411], ["60,000", "24.66", 411, "28-32"]),
    ],
)
def test_verdicts(name: str, kind: str, value: object, computed: list[object], verdict: str | list[object]) -> None:
    judgement = judged(name)[kind, value]
    assert_names(judgement.computed, *computed)
    if isinstance(verdict, list):
        assert judgement.refuted
        assert_names(judgement.verdict, *verdict)
    else:
        assert judgement.verdict == verdict


def test_mfu_without_a_device_is_neither_right_nor_wrong() -> None:
    judgement = judged("slm-117m")["mfu", 0.075]
    assert_names(judgement.computed, "8.15")
    assert judgement.verdict not in (HOLDS, EXPECTED)
    assert not judgement.refuted


def claims(*items: str) -> str:
    return f"documented.claims=[{', '.join(f'{{{claim}}}' for claim in items)}]"


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("rtx5090-896x12", "claim: parameters, value: 164e6", "claim: parameters, value: 166e6"),
        ("rtx5090-896x12", "claim: parameters, value: [150e6, 170e6]", "claim: parameters, value: [200e6, 300e6]"),
        ("rtx5090-896x12", "claim: tokens, value: 33e9", "claim: tokens, value: 34e9"),
        ("rtx5090-896x12", "claim: weights_gb, value: 0.33", "claim: weights_gb, value: 0.4"),
        ("rtx5090-896x12", "claim: gradients_gb, value: 0.65", "claim: gradients_gb, value: 0.5"),
        ("rtx5090-896x12", "claim: optimizer_gb, value: 1.9", "claim: optimizer_gb, value: 1.3"),
        ("rtx5090-896x12", "claim: activations_gb, value: [1, 2]", "claim: activations_gb, value: [2, 3]"),
        ("a100x4-300m", "claim: training_loss, step: 0, value: 11.3", "claim: training_loss, step: 0, value: 11.4"),
        ("a100x4-300m", "claim: embedding_parameters, value: 51463168", "claim: embedding_parameters, value: 51e6"),
        ("slm-117m", "claim: tokens_per_step, value: 18432", "claim: tokens_per_step, value: 18000"),
    ],
)
def test_a_verdict_follows_from_the_claim(name: str, right: str, wrong: str) -> None:
    assert [it.verdict for it in judged(name, claims(right)).values()] == [HOLDS]
    assert [it.refuted for it in judged(name, claims(wrong)).values()] == [True]


def test_a_verdict_follows_from_the_run() -> None:
    assert judged("slm-117m")["epochs", 3].refuted
    assert judged("slm-117m", "train.steps=82700")["epochs", 3].verdict == HOLDS
    assert judged("slm-117m", "model.vocab_size=41000")["parameters", 117e6].verdict == HOLDS
    assert judged("a100x4-300m", "train.steps=12207")["tokens", 12.8e9].verdict == HOLDS
    *_, changed, _ = plan_text(plan_of("slm-117m", "train.steps=82700"), 8).split("\n\n")
    *_, unchanged, _ = plan_text(plan_of("slm-117m"), 8).split("\n\n")  # the notices come last
    assert_names(changed, "train.steps", 508)
    assert "train.steps" not in unchanged
    assert_names(unchanged, "2.18", 508)


@pytest.mark.parametrize(
    ("claim", "missing"),
    [
        ("claim: samples, value: 968", "claim: data_tokens, value: 5e5"),
        ("claim: epochs, value: 3", "claim: data_tokens, value: 5e8"),
        ("claim: hours, value: 3", "claim: step_seconds, value: 1"),
        ("claim: mfu, value: 0.4", "claim: step_seconds, value: 1"),
        ("claim: perplexity, value: 30", "claim: validation_loss, value: 3.4"),
    ],
)
def test_a_claim_that_leans_on_another_has_no_verdict_without_it(claim: str, missing: str) -> None:
    (alone,) = judged("slm-117m", claims(claim)).values()
    assert (alone.verdict, re.findall(r"\d", alone.computed)) == (NO_VERDICT, [])
    leaning, _ = judged("slm-117m", claims(claim, missing)).values()
    assert leaning.verdict != NO_VERDICT
    assert re.findall(r"\d", leaning.computed)


def test_mfu_is_of_the_device_s_data_sheet() -> None:
    """355.9 M parameters at 49,300 tokens/s on four A100s: the speed of a step of 21.27 s."""
    speed, device = "claim: step_seconds, value: 21.27", "documented.device=A100"
    plan = plan_of("a100x4-300m")
    share = plan.flops_per_token * plan.resolved.stages.at(1).tokens / 21.27 / (4 * 312e12)
    assert 0.09 < share < 0.1
    verdicts = judged("a100x4-300m", claims(speed, f"claim: mfu, value: {share * 1.05}"), device)
    assert [it.verdict for it in verdicts.values()] == ["-", HOLDS]
    verdicts = judged("a100x4-300m", claims(speed, f"claim: mfu, value: {share * 1.2}"), device)
    wrong = list(verdicts.values())[1]
    assert wrong.refuted
    assert_names(wrong.verdict, "21.27", "9.6%", "11%")


def test_the_ends_of_a_range_may_come_in_any_order() -> None:
    verdicts = [
        list(judged("slm-117m", claims("claim: step_seconds, value: 10.2", f"claim: hours, value: {ends}")).values())
        for ends in ("[150, 180]", "[180, 150]")
    ]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][1].verdict == HOLDS


@pytest.mark.parametrize(
    "kind", ["training_loss", "validation_loss", "perplexity", "tokens_per_second", "hours", "mfu"]
)
def test_a_number_beyond_all_measure_is_judged_too(kind: str) -> None:
    assert judged("slm-117m", claims(f"claim: {kind}, value: 1e30", "claim: validation_loss, value: 1e30"))
    assert judged("a100x4-300m", claims(f"claim: {kind}, value: 1e-30", "claim: training_loss, step: 0, value: 1e30"))


@pytest.mark.parametrize(
    "bad",
    [
        "claim: losses, value: 3",
        "claim: tokens, value: many",
        "value: 3",
        "claim: tokens_per_second, value: 0",
        "claim: hours, value: [0, 8]",
        "claim: hours, value: -1",
        "claim: hours, value: .inf",
        "claim: hours, value: [1, .inf]",
    ],
)
def test_a_claim_that_is_none_is_refused(bad: str) -> None:
    assert "documented.claims=" in refused(load_run_config, "slm-117m", [claims(bad)])
