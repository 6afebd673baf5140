"""Training loops of the same model, one step at a time: megalm's engine, a bare PyTorch loop, and other trainers.

Each loop is a function of the step's number, counted from 1. It returns when the device has finished the step.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_runs import ZERO1, engine_steps, keys_of, random_batches, resolved_run, write_random_tokens
from benchmarks.nanogpt import NanoGPT, Shape, nanogpt_optimizer
from megalm.engine.device import wait_for
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.optimizer.build_optimizer import parameter_groups
from megalm.model.layer_factory import LayerFactory
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.modules import DropoutClock
from megalm.model.recomputation import Recomputation
from megalm.model.transformer import LanguageModel, ParameterInit
from megalm.planning.memory_fit import loss_chunk_tokens
from megalm.planning.resolve import ResolvedRun

Step = Callable[[int], None]


@dataclass(frozen=True)
class Bench(Shape):
    """A model and its batch; `chunk` is train.loss_chunk_tokens."""

    chunk: int
    recompute: int = 0


SHAPES = {
    "tiny": Bench(2, 32, 2, 256, 64, 4, 64),
    "quickstart": Bench(4, 256, 4, 8192, 256, 16, 256),
    "34m": Bench(8, 512, 8, 16384, 512, 8, 256),
    "124m": Bench(12, 768, 12, 50304, 1024, 16, 4096),
    "354m": Bench(24, 1024, 16, 50304, 1024, 16, 4096),
    "1.3b": Bench(24, 2048, 16, 50304, 2048, 8, 4096),
}


@dataclass(frozen=True)
class Setting:
    """What the loops have in common: a bench on a device, with its random tokens in `folder`."""

    bench: Bench
    device: torch.device
    comm: DistributedCommunicator
    folder: Path
    style: str = "gpt2"
    json: Path = ZERO1

    def write_tokens(self) -> None:
        write_random_tokens(self.prefix, self.bench.vocabulary, self.bench.sequence)

    @property
    def prefix(self) -> Path:
        return self.folder / "data"

    @property
    def shape(self) -> ModelConfig:
        return build_model_config(self.resolve(False).config.model, self.bench.vocabulary, self.bench.sequence)

    def resolve(self, compiled: bool) -> ResolvedRun:
        """megalm's run of the bench."""
        bench = self.bench
        keys = {
            **keys_of(bench, self.style),
            "model.qk_norm": False,
            "train.loss_chunk_tokens": bench.chunk,
            "train.checkpoint_activations_every": bench.recompute,
            "compile": compiled,
        }
        batch = {"train_batch_size": bench.batch}
        return resolved_run(self.folder / "deepspeed.json", batch, keys, bench.vocabulary, self.json)


def engine_step(setting: Setting, compiled: bool) -> Step:
    """The whole of `train_step`: reading the batch, forward, backward, reduction, clipping, update."""
    run, vocabulary = setting.resolve(compiled), setting.bench.vocabulary
    _, train = engine_steps(run, vocabulary, setting.device, setting.comm, setting.prefix)

    def step(number: int) -> None:
        train(number)
        wait_for(setting.device)

    return step


def bare_step(setting: Setting, compiled: bool) -> Step:
    """The same model without DeepSpeed: bf16 weights, AdamW on them, clipping. What nothing costs less than."""
    run, shape, device = setting.resolve(compiled), setting.shape, setting.device
    clock, train = DropoutClock(0), setting.resolve(compiled).config.train
    model = LanguageModel(
        shape,
        LayerFactory(clock, compiled),
        clock,
        loss_chunk_tokens(run.config, shape, run.device),
        ParameterInit(device, torch.bfloat16 if run.precision == "bf16" else torch.float32),
        Recomputation(every=train.checkpoint_activations_every),
    )
    with torch.no_grad():  # on the device, which draws the weights of a large model faster than a CPU
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=shape.initializer_range)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(parameter_groups(model, run, 1.0), lr=1e-4, betas=(0.9, 0.95), fused=True)
    loader = random_batches(run, setting.prefix, 0)

    def step(number: int) -> None:
        batch = loader.batch((number - 1) * run.batch.global_batch)
        total = 0.0
        for micro in batch.micro_batches:
            loss, _ = model(torch.from_numpy(micro.tokens).to(device), torch.from_numpy(micro.labels).to(device))
            (loss / batch.target_count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)

    return step


def nanogpt_step(setting: Setting, compiled: bool) -> Step:
    """nanoGPT's way: fp32 weights under autocast, whole logits, the whole model compiled as one graph."""
    model = NanoGPT(setting.bench).to(setting.device)
    forward = torch.compile(model) if compiled else model
    return _foreign_step(setting, nanogpt_optimizer(model, 1e-4), forward)


def transformers_step(setting: Setting, compiled: bool) -> Step:
    """GPT-2 of the package transformers, its attention by torch's kernels, trained as nanoGPT trains."""
    from transformers import GPT2Config, GPT2LMHeadModel

    bench = setting.bench
    config = GPT2Config(
        vocab_size=bench.vocabulary,
        n_positions=bench.sequence,
        n_embd=bench.hidden,
        n_layer=bench.layers,
        n_head=bench.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).to(setting.device)
    forward = torch.compile(model) if compiled else model
    # It shifts the labels itself: the targets differ by one token, the work does not.
    return _foreign_step(
        setting, nanogpt_optimizer(model, 1e-4), lambda tokens, labels: forward(tokens, labels=labels).loss
    )


def _foreign_step(
    setting: Setting, optimizer: torch.optim.Optimizer, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    """A step of a trainer that knows no global batch: the mean loss of each micro-batch, as many of them as megalm."""
    run, device = setting.resolve(False), setting.device
    micro, count = run.batch.micro_batch, run.batch.accumulation
    random = np.random.default_rng(0)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(number: int) -> None:
        for _ in range(count):
            tokens = random.integers(0, setting.bench.vocabulary, (micro, setting.bench.sequence + 1))
            whole = torch.from_numpy(tokens).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                loss = loss_of(whole[:, :-1].contiguous(), whole[:, 1:].contiguous()) / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        wait_for(device)

    return step


LOOPS: dict[str, Callable[[Setting, bool], Step]] = {
    "megalm": engine_step,
    "bare PyTorch": bare_step,
    "nanoGPT's way": nanogpt_step,
    "transformers": transformers_step,
}


def missing_package(loop: str) -> str | None:
    """The package that a loop needs and this machine lacks."""
    return loop if loop == "transformers" and importlib.util.find_spec(loop) is None else None


def free_memory() -> None:
    """Release what dropped loops held."""
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
