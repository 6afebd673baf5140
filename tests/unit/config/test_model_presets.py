"""The presets of public models: parameters to the last one, a plan, an export, and one step in miniature."""

from __future__ import annotations

import math

import pytest
import torch
from config_cases import CPU

from megalm.cli.plan import planned
from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.config.loading import load_run_config, preset_paths
from megalm.huggingface.config_json import family_of
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.parity.miniature import ParityCase, make_case
from megalm.parity.miniature_training import SyntheticSamples
from megalm.planning.run_plan import Plan
from megalm.runs.run_settings import read_settings
from tests.ranks import run_ranks

# The published numbers: of the tensors in each repository's model.safetensors (GPT-2, Llama, Qwen3, OLMo 2), and of the
# table in Pythia's README. Each follows from config.json: embeddings, layers x (attention + MLP + norms), last norm,
# and a head where it is not tied.
PUBLISHED = {
    "gpt2-124m": (124_439_808, "gpt2"),
    "gpt2-355m": (354_823_168, "gpt2"),
    "gpt2-774m": (774_030_080, "gpt2"),
    "gpt2-1.5b": (1_557_611_200, "gpt2"),
    "llama-160m": (162_417_408, "llama"),
    "llama-1b": (1_235_814_400, "llama"),
    "llama-8b": (8_030_261_248, "llama"),
    "llama-70b": (70_553_706_496, "llama"),
    "qwen3-0.6b": (596_049_920, "qwen3"),
    "qwen3-1.7b": (1_720_574_976, "qwen3"),
    "qwen3-4b": (4_022_468_096, "qwen3"),
    "qwen3-8b": (8_190_735_360, "qwen3"),
    "pythia-70m": (70_426_624, "gpt_neox"),
    "pythia-160m": (162_322_944, "gpt_neox"),
    "pythia-410m": (405_334_016, "gpt_neox"),
    "pythia-1b": (1_011_781_632, "gpt_neox"),
    "pythia-1.4b": (1_414_647_808, "gpt_neox"),
    "pythia-2.8b": (2_775_208_960, "gpt_neox"),
    "pythia-6.9b": (6_857_302_016, "gpt_neox"),
    "olmo2-1b": (1_484_916_736, "olmo2"),
    "mixtral-8x7b": (46_702_792_704, "mixtral"),
    "qwen3-30b-a3b": (30_532_122_624, "qwen3_moe"),
    "olmoe-1b-7b": (6_919_161_856, "olmoe"),
}
H200 = DeviceFacts("cuda", True, 141 * 2**30, name="H200")


def plan_of(name: str) -> Plan:
    """As `megalm plan --config NAME` does it on 16 large GPUs."""
    return planned(read_settings(name, (), "zero3.json", resume=False, ranks=16), 16, H200, 8)


def test_every_preset_of_a_model_is_looked_at() -> None:
    assert set(PUBLISHED) == {name for name, path in preset_paths().items() if path.parent.name == "models"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name: str) -> None:
    plan, (parameters, family) = plan_of(name), PUBLISHED[name]
    run = plan.resolved
    assert plan.shape.parameter_count() == parameters
    assert family_of(plan.shape).name == family
    assert run.config.data.sequence_length <= plan.shape.max_position_embeddings
    assert run.config.train.steps * run.batch.global_batch * run.config.data.sequence_length >= 20 * parameters
    assert run.config.schedule.warmup_steps < run.config.train.steps
    assert not [notice for notice in run.notices if "warmup" in notice], "nothing is shortened"
    assert plan.memory.total > 0


def miniatures() -> dict[str, ParityCase]:
    """The first preset of each set of choices."""
    found: dict[ModelConfig, tuple[str, ParityCase]] = {}
    for name in PUBLISHED:
        case = make_case(read_settings(name, (), "zero1.json", resume=False, ranks=1), 1, CPU, fp32=True)
        found.setdefault(case.shape, (name, case))
    return dict(found.values())


def _one_step(comm: object, device: torch.device, cases: dict[str, ParityCase]) -> dict[str, float]:
    """The loss of each miniature's first step."""
    from megalm.data.sampling.batch_loader import BatchLoader
    from megalm.engine.build import build_engine
    from megalm.train.datasets import batch_layout

    losses = {}
    for name, case in cases.items():
        run = case.reference
        samples = SyntheticSamples(run.config.data.sample_length, run.config.data.masks_documents)
        loader = BatchLoader(samples, batch_layout(run, 0))
        engine = build_engine(run, case.shape, device, comm)  # type: ignore[arg-type]
        stage = run.stages.at(1)
        batch = loader.batch(run.stages.samples(0), [(stage.samples, stage.parts)])
        losses[name] = engine.train_step(batch, 1, 1e-3).loss
    return losses


@pytest.mark.distributed
def test_each_kind_of_preset_trains_a_step_in_miniature() -> None:
    cases = miniatures()
    shapes = {name: case.shape for name, case in cases.items()}
    assert shapes.keys() >= {"gpt2-124m", "llama-160m", "llama-1b", "llama-8b", "qwen3-0.6b", "qwen3-8b", "pythia-70m"}
    own = {name: build_model_config(load_run_config(name, []).config.model, 1, 1) for name in cases}
    for choice in ("parallel_residual", "qk_norm", "norm_placement", "partial_rotary_factor", "hidden_act"):
        assert all(getattr(shape, choice) == getattr(own[name], choice) for name, shape in shapes.items()), choice
    (losses,) = run_ranks(1, _one_step, cases)
    uniform = math.log(next(iter(shapes.values())).vocab_size)
    assert losses == pytest.approx(dict.fromkeys(cases, uniform), rel=0.1)
