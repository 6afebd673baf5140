"""The parity matrix: which models, layouts, ZeRO stages and precisions are trained, and how far they may differ.

Every row trains the same job as one rank does: the same documents, seeds and global batches. What is compared, and by
which tolerance, is in `Tolerance`; docs/parallelism.md says why.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.engine.deepspeed_patches import allow_cpu_fp16_for_tests
from megalm.parity.miniature_training import validation_losses
from megalm.parity.state_comparison import TOLERANCES, Outcome, Tolerance, some_choices
from megalm.planning.engine_checks import ALLOW_CPU_FP16
from tests.distributed.training import VOCAB, Case, Trace, snapshot, start, steps

STEPS = 3  # the first is without moments, the third averages over two earlier ones; `make parity` trains more
SEQUENCES = {"fp32": 8, "bf16": 16, "fp16": 16}  # a step; what is rounded more needs more of them to average out
# Adam moves a weight by a whole step however small its gradient is, down to about epsilon. At the usual 1e-8 it would
# make steps of gradients that are rounding alone; gradients here are about 1e-4.
EPSILON = 1e-6
CLIPPING = 0.5  # below every gradient norm of the first steps, so that a wrong norm makes wrong weights as well
AVERAGED = "train.ema_decay=0.6"
# A row with moments in fewer bytes is compared with one rank whose moments are fp32: what differs is their rounding.
STATES_TOLERANCES = {
    "bf16": Tolerance(loss=2e-5, norm=1e-4, weights=5e-3, moments=2e-2, logits=5e-3),
    "8bit": Tolerance(loss=1e-4, norm=2e-3, weights=5e-2, moments=2e-1, logits=5e-2),
}

# Sizes that show mistakes: a vocabulary that nothing divides, fewer key/value heads than heads, an MLP that is no
# multiple of the hidden size.
_SMALL = ("model.intermediate_size=88", "model.num_attention_heads=4", "train.loss_chunk_tokens=40")
_GPT2 = (*_SMALL, "model.style=gpt2", "model.qk_norm=false", "data.document_mask=true")
_LLAMA = (*_SMALL, "model.style=llama")
_EXPERTS = (
    "model.num_experts=4",
    "model.moe_intermediate_size=24",
    "model.num_shared_experts=1",
    "model.num_dense_layers=1",
    "model.router_scores=sigmoid",
    "model.expert_bias=true",
    "train.expert_bias_rate=0.01",
    "train.expert_capacity_factor=1",
    "train.router_aux_loss=0.1",
    "train.router_z_loss=0.01",
)
MODELS: dict[str, tuple[str, ...]] = {
    "gpt2 tied": (*_GPT2, "model.tie_word_embeddings=true"),
    # As GPT-NeoX and OLMo 2: norms after the layers, which both read the block's input; and a layer with experts.
    "composed MQA untied": (
        *_GPT2,
        "model.num_key_value_heads=1",  # held by both ranks of a tensor group
        "model.tie_word_embeddings=false",
        "model.norm_placement=post",
        "model.parallel_residual=true",
        "model.qk_norm=whole",
        "model.position_embedding_type=rope",
        "model.embedding_scale=50",  # the embeddings of 0.02 are small beside a normed layer
        "model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 12}",
        "model.partial_rotary_factor=0.5",
        "model.no_rope_layers=[0]",
        "model.hidden_act=relu2",
        "model.qkv_bias=false",
        "model.attention_scale=0.5",
        "model.mlp_bias=false",
        *_EXPERTS,
        "train.z_loss=1e-3",
        "train.checkpoint_activations_every=1",
    ),
    # As Gemma: norms on both sides, windows, soft caps; and the sinks of gpt-oss.
    "composed MQA tied": (
        *_LLAMA,
        "model.num_key_value_heads=1",
        "model.tie_word_embeddings=true",
        "model.norm_placement=both",
        "model.norm_zero_centered=true",
        "model.hidden_act=gelu_pytorch_tanh",
        "model.embedding_scale=5.6",
        "model.mup_base_width=16",  # half of the width: groups of its own, beside those below
        "model.sliding_window=7",
        "model.full_attention_layers=2",
        "model.rope_local_theta=500",
        "model.attn_logit_softcapping=2",
        "model.final_logit_softcapping=3",
        "model.attention_sinks=true",
        "model.qkv_bias=true",
        "train.checkpoint_activations_every=1",
        # On both stages of a pipeline, because the weight is tied.
        "train.parameter_groups=[{match: embedding.*, learning_rate_scale: 0.1, weight_decay: 0}]",
    ),
    "llama GQA untied": (
        *_LLAMA,
        "model.num_key_value_heads=2",
        "model.tie_word_embeddings=false",
        "data.document_mask=true",
    ),
}


# A token that low precision sends elsewhere drops another one.
NO_CAPACITY = ("train.expert_capacity_factor=null",)


@dataclass(frozen=True)
class Layout:
    ranks: int
    overrides: tuple[str, ...] = ()
    few: tuple[int, ...] = ()  # the ZeRO stages of its only rows: each axis has rows of all models by itself
    of_experts: str = ""  # the precision of its only row, of the model with experts
    blocks: int = 2

    @property
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages that are legal with it."""
        return (0, 1) if _PP in self.overrides else (0, 1, 2, 3)


_TP, _PP = "parallel.tensor=2", "parallel.pipeline=2"
_PP4, _V2 = "parallel.pipeline=4", "parallel.virtual_stages=2"
_CP, _RING = "parallel.context=2", "parallel.context_method=ring"
_EP = "parallel.expert=2"
_SP = (_TP, "parallel.sequence=true")
# In two chunks of one sample each, in the layouts that test_collective_faults.py breaks; in the others in one message.
_OVERLAP = "parallel.overlap_tensor_communication=true"
LAYOUTS = {
    "dp2": Layout(2),
    "tp2": Layout(2, (_TP, _OVERLAP)),
    "sp2": Layout(2, (*_SP, _OVERLAP)),
    "pp2": Layout(2, (_PP,)),
    "cp2": Layout(2, (_CP,)),
    "ring2": Layout(2, (_CP, _RING)),
    "tp2 x dp2": Layout(4, (_TP,)),
    "sp2 x dp2": Layout(4, _SP),
    "pp2 x dp2": Layout(4, (_PP,)),
    "tp2 x pp2": Layout(4, (_TP, _PP, _OVERLAP)),
    "sp2 x pp2": Layout(4, (*_SP, _PP)),
    "pp2v2": Layout(2, (_PP, _V2), few=(1,), blocks=4),
    "pp4v2": Layout(4, (_PP4, _V2), few=(1, 0), blocks=9),
    "pp2v2 x dp2": Layout(4, (_PP, _V2), few=(0, 1), blocks=4),
    "tp2 x pp2v2": Layout(4, (_TP, _PP, _V2), few=(1, 0), blocks=4),
    "sp2 x pp2zb": Layout(4, (*_SP, _PP, _V2, "parallel.pipeline_schedule=zb_v"), few=(0, 1), blocks=5),
    "cp2 x pp2v2": Layout(4, (_CP, _PP, _V2), few=(1, 0), blocks=4),
    "cp4": Layout(4, ("parallel.context=4",), few=(0, 2)),
    "cp2 x dp2": Layout(4, (_CP,), few=(3, 1)),
    "sp2 x cp2": Layout(4, (*_SP, _CP), few=(2, 3)),
    "cp2 x pp2": Layout(4, (_CP, _PP), few=(0, 1)),
    "ring4": Layout(4, ("parallel.context=4", _RING), few=(3, 0)),
    "ring2 x dp2": Layout(4, (_CP, _RING), few=(2, 3)),
    "tp2 x ring2": Layout(4, (_TP, _CP, _RING), few=(1, 2)),
    "ring2 x pp2": Layout(4, (_CP, _RING, _PP), few=(1, 0)),
    "ep2": Layout(2, (_EP,), few=(1,), of_experts="bf16"),  # test_collective_faults.py has it in fp32
    "tp2 x ep2": Layout(4, (_TP, _EP), few=(3,), of_experts="fp32"),
    "ep4": Layout(4, ("parallel.expert=4",), few=(2,), of_experts="fp32"),
    "ep2 x dp2": Layout(4, (_EP,), few=(1,), of_experts="fp32"),
    "ep2 x pp2": Layout(4, (_EP, _PP), few=(0,), of_experts="fp32"),  # no experts in the first stage
    "ep2 x pp2v2": Layout(4, (_EP, _PP, _V2), few=(1,), of_experts="fp32", blocks=4),
    "cp2 x ep4": Layout(4, (_CP, "parallel.expert=4"), few=(3,), of_experts="fp32"),
    "tp2 x pp2 x dp2": Layout(8, (_TP, _PP)),
}


@dataclass(frozen=True)
class Row:
    """One line of the matrix."""

    layout: str
    model: str
    zero: int
    precision: str = "fp32"
    offloaded: bool = False
    muon: bool = False
    states: str = "fp32"
    hpz: bool = False
    job: tuple[str, ...] = ()  # further settings, of one rank too

    @property
    def name(self) -> str:
        return f"{self.layout}, ZeRO {self.zero}, {self.model}, {self.numbers}"

    @property
    def numbers(self) -> str:
        if self.states != "fp32":
            return f"{self.precision}, {self.states} states"
        if self.hpz:
            return f"{self.precision}, hpZ"
        return self.precision + (", offloaded" if self.offloaded else "") + (", Muon" if self.muon else "")

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.precision] if self.states == "fp32" else STATES_TOLERANCES[self.states]

    def case(self) -> Case:
        states = () if self.states == "fp32" else (f"train.optimizer_state={self.states}",)
        return self._case(
            (*LAYOUTS[self.layout].overrides, *states), {"stage": self.zero, **self._offload(), **self._second_copy()}
        )

    @property
    def reference(self) -> str:
        job = "".join(f", {word}" for word in self.job)
        job += f", {self._blocks} blocks" if self._blocks > 2 else ""
        return f"{self.model}{job}, {self.precision}{', Muon' * self.muon}"

    @property
    def _blocks(self) -> int:
        return LAYOUTS[self.layout].blocks

    def reference_case(self) -> Case:
        """The same job on one rank with fp32 states, under ZeRO 1; test_zero_parity.py compares the other stages."""
        return self._case((), {"stage": 1})

    def _offload(self) -> dict[str, Any]:
        names = ("offload_optimizer", "offload_param") if self.zero == 3 else ("offload_optimizer",)
        return {name: {"device": "cpu"} for name in names} if self.offloaded else {}

    def _second_copy(self) -> dict[str, Any]:
        return {"zero_hpz_partition_size": 2} if self.hpz else {}

    def _case(self, overrides: tuple[str, ...], zero: dict[str, Any]) -> Case:
        optimizer = {"params": {"betas": [0.9, 0.95], "eps": EPSILON, "weight_decay": 0.1}}
        return Case(
            "zero1.json",
            self.precision,
            (*MODELS[self.model], f"model.num_hidden_layers={self._blocks}", *self.job, AVERAGED, *overrides),
            {
                "train_batch_size": SEQUENCES[self.precision],
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": CLIPPING,
                "optimizer": {**optimizer, "type": "Muon" if self.muon else "AdamW"},
                "zero_optimization": {**zero, "stage3_param_persistence_threshold": 0},
            },
        )


# Low precision rounds each product and the layouts round different ones: a part of the matrix shows that it trains.
_FEW_MODELS = ("gpt2 tied", "llama GQA untied")
# With more blocks the biases of GPT-2, which begin at zero, are more of rounding than a tensor group's rows allow.
_DEEP_MODELS = ("composed MQA tied", "llama GQA untied")
_OF_EXPERTS = "composed MQA untied"
_HPZ = ("dp2",)  # ZeRO 3 alone has it; test_zero_parity.py has two groups of two ranks
_MORE = ("tp2", "sp2", "pp2", "cp2")  # fp16, and offload, which by data alone has its own test
# And the largest; test_muon.py has further ones, and torch's Muon.
_MUON = ("sp2 x dp2", "sp2 x cp2", "tp2 x pp2v2", "ep2 x dp2")
# Optimizer states in fewer bytes, where two axes meet; test_optimizer_state_kinds.py has each axis alone.
_STATES = {"tp2 x dp2": "8bit", "sp2 x dp2": "bf16", "pp2 x dp2": "8bit", "tp2 x pp2": "bf16", "sp2 x pp2": "8bit"}
_STATES |= {"pp2v2 x dp2": "8bit"}


def rows(layout: str) -> list[Row]:
    stages = LAYOUTS[layout].stages
    if LAYOUTS[layout].ranks > 4:  # shows that three axes meet; each two of them have their own layouts
        return [*(Row(layout, model, 1) for model in _FEW_MODELS), Row(layout, "llama GQA untied", 1, muon=True)]
    if precision := LAYOUTS[layout].of_experts:
        job = NO_CAPACITY if precision == "bf16" else ()
        found = [Row(layout, _OF_EXPERTS, zero, precision, job=job) for zero in LAYOUTS[layout].few]
        return [*found, Row(layout, _OF_EXPERTS, 1, muon=True)] if layout in _MUON else found
    if few := LAYOUTS[layout].few:
        deep = LAYOUTS[layout].blocks > 2
        found = [Row(layout, *row) for row in zip(_DEEP_MODELS if deep else _FEW_MODELS, few, strict=False)]
        if deep and len(found) > 1:
            found += [Row(layout, "llama GQA untied" if _TP in LAYOUTS[layout].overrides else "gpt2 tied", 1, "bf16")]
        if layout in _MUON:
            found += [Row(layout, "llama GQA untied", 1, muon=True)]
        if layout in _STATES:
            found += [Row(layout, "llama GQA untied", 1, states=_STATES[layout])]
        return found
    found = [Row(layout, model, zero) for model in MODELS for zero in stages]
    low = [zero for zero in stages if zero > 0]
    found += [Row(layout, model, zero, "bf16") for model in _FEW_MODELS for zero in low]
    if layout in _MUON:
        found += [Row(layout, "llama GQA untied", zero, muon=True) for zero in stages]
    if layout in _MORE:
        found += [Row(layout, "llama GQA untied", zero, "fp16") for zero in low]
        if len(low) > 1:  # a pipeline keeps its states on the device
            found += [Row(layout, "llama GQA untied", zero, offloaded=True) for zero in low]
    if layout in _HPZ:
        found += [Row(layout, "llama GQA untied", 3, hpz=True)]
    if layout in _STATES:
        found += [Row(layout, "llama GQA untied", zero, states=_STATES[layout]) for zero in stages]
    return found


# Trained by `make parity` alone: the layouts beside them meet the same axes.
SELDOM = (
    *("cp4", "ring4", "ring2 x dp2", "ring2 x pp2", "ep4", "ep2 x dp2", "ep2 x pp2", "ep2 x pp2v2", "cp2 x ep4"),
    *("pp4v2", "pp2v2 x dp2", "tp2 x pp2v2", "sp2 x pp2zb", "cp2 x pp2v2"),
)


def latin_square(layout: str) -> list[Row]:
    """The rows of a layout that are trained on every change; the rest of the matrix takes `make parity`.

    Each model once, at a ZeRO stage that moves on with model and layout: all pairs of layout, model and stage are met.
    Of each other precision, of offload and of states in fewer bytes, one row.
    """
    if layout in SELDOM:
        return []
    alike = [name for name, other in LAYOUTS.items() if other.stages == LAYOUTS[layout].stages]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows(layout):
        groups.setdefault((row.numbers, row.model if row.numbers == "fp32" else ""), []).append(row)
    shifts = {group: list(MODELS).index(group[1]) if group[1] else 0 for group in groups}
    return [group[(alike.index(layout) + shifts[key]) % len(group)] for key, group in groups.items()]


def train(comm: Any, device: torch.device, case: Case, prefix: Path, folder: Path, step_count: int = STEPS) -> Outcome:
    """Train a row's steps, validate on the next batch, and ask for the next token of some texts."""
    engine, run, loader = start(comm, device, case, prefix, folder)
    initial = Trace([], [], snapshot(engine))
    trained = steps(engine, run, loader, 1, step_count)
    batch = loader.batch(run.stages.samples(step_count))
    validation = validation_losses(engine, run, batch)
    if len(validation) > 1:  # the weights are the trained ones again, in the optimizer and in the model
        assert all(
            key == other and np.array_equal(before, after)
            for (key, before), (other, after) in zip(trained.fragments, snapshot(engine), strict=True)
        )
        assert engine.evaluate(batch.micro_batches) == validation[0] != validation[1]
    texts = np.random.default_rng(3).integers(0, VOCAB, (2, 24))
    logits = engine.next_token_logits(texts, np.array([3, 23]))
    choices = engine.row_losses(some_choices(VOCAB, 23))
    loader.close()
    return Outcome(initial, trained, validation, logits, choices)


def train_rows(
    comm: Any,
    device: torch.device,
    cases: Mapping[str, Case],
    prefix: Path,
    folder: Path,
    step_count: int = STEPS,
) -> dict[str, Outcome]:
    os.environ[ALLOW_CPU_FP16] = "1"
    allow_cpu_fp16_for_tests()
    return {name: train(comm, device, case, prefix, folder, step_count) for name, case in cases.items()}
