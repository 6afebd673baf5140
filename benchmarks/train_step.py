"""Times the training step: megalm's engine, a bare PyTorch loop of the same model, and the machine's own peak.

    python benchmarks/train_step.py [--shape quickstart|34m|124m|354m|1.3b] [--steps 12] [--no-compile] [--json ds.json]

All parts are timed in turn within one run, so that they meet the same machine; the medians of single steps are printed.
The engine's step is the whole of `train_step`: reading the batch, forward, backward, reduction, clipping, update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megalm.engine.deepspeed_patches import (  # noqa: E402
    limit_openmp_spin,
    silence,
)

limit_openmp_spin()
silence()

import torch  # noqa: E402

from benchmarks.random_data import random_batches, write_random_tokens  # noqa: E402
from megalm.config.deepspeed.json_reader import read_deepspeed_json  # noqa: E402
from megalm.config.loading import load_run_config  # noqa: E402
from megalm.engine.base_engine import parameter_groups  # noqa: E402
from megalm.engine.build import build_engine  # noqa: E402
from megalm.engine.device import claim_device, device_facts, device_name, measured_peak, peak_flops, rank_facts  # noqa: E402
from megalm.engine.distributed import start_distributed  # noqa: E402
from megalm.model.layer_factory import LayerFactory  # noqa: E402
from megalm.model.model_config import (  # noqa: E402
    ModelConfig,
    build_model_config,
    flops_per_token,
)
from megalm.model.modules import DropoutClock  # noqa: E402
from megalm.model.transformer import LanguageModel, initialize  # noqa: E402
from megalm.planning.resolve import loss_chunk_tokens, resolve  # noqa: E402
from megalm.train.lifecycle.shutdown import exit_process  # noqa: E402


@dataclass(frozen=True)
class Bench:
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int
    chunk: int


SHAPES = {
    "quickstart": Bench(4, 256, 4, 8192, 256, 16, 256),
    "34m": Bench(8, 512, 8, 16384, 512, 8, 256),
    "124m": Bench(12, 768, 12, 50304, 1024, 16, 4096),
    "354m": Bench(24, 1024, 16, 50304, 1024, 16, 4096),
    "1.3b": Bench(24, 2048, 16, 50304, 2048, 8, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--style", choices=["llama", "gpt2"], default="gpt2")
    parser.add_argument("--json", default=str(ROOT / "ds_configs" / "zero1.json"))
    arguments = parser.parse_args()
    bench = SHAPES[arguments.shape]
    ranks = rank_facts()
    device = claim_device(ranks)
    comm = start_distributed(ranks, device)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        write_random_tokens(prefix, bench.vocabulary, bench.sequence)
        variants = [False] if arguments.no_compile else [False, True]
        work: dict[str, Callable[[int], None]] = {}
        for compiled in variants:
            run = _resolve(bench, arguments.style, arguments.json, compiled, Path(folder))
            shape = build_model_config(run.config.model, bench.vocabulary, bench.sequence)
            name = "compiled" if compiled else "eager"
            work[f"engine, {name}"] = _engine_step(run, shape, device, comm, prefix)
            if comm.size == 1:
                work[f"bare loop, {name}"] = _bare_step(run, shape, device, compiled, prefix)
        peak = peak_flops(device, run.precision != "fp32")[0] * comm.size
        if device.type == "cuda":
            print(f"one 8192 x 8192 product: {measured_peak(device, run.precision != 'fp32') / 1e12:.0f} TFLOP/s")
        print(f"{device_name()}; torch {torch.__version__}; {ranks.threads} threads; {run.precision}")
        print(
            f"{arguments.shape}, {arguments.style}: {shape.parameter_count():,} parameters, "
            f"{bench.batch} x {bench.sequence} tokens"
        )
        _report(work, arguments.steps, bench, flops_per_token(shape, bench.sequence), peak)
    exit_process(0)


def _report(work: dict[str, Callable[[int], None]], steps: int, bench: Bench, flops: float, peak: float) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for step in work.values():
        for number in range(1, 4):  # compilation, allocation, moments
            step(number)
    peaks = []
    for number in range(4, 4 + steps):
        peaks.append(_now_peak(peak))
        for name, step in work.items():
            start = time.perf_counter()
            step(number)
            seconds[name].append(time.perf_counter() - start)
    tokens = bench.batch * bench.sequence
    print(f"matrix products: {statistics.median(peaks) / 1e12:.2f} TFLOP/s (median in this run)")
    print(f"{'':24}{'s/step':>9}{'tokens/s':>12}{'of peak':>9}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:24}{median:9.4f}{tokens / median:12,.0f}{flops * tokens / median / statistics.median(peaks):9.1%}"
        )


def _now_peak(fallback: float) -> float:
    """On a CPU the peak drifts with the neighbours: measured beside each step."""
    if torch.cuda.is_available():
        return fallback
    return measured_peak(torch.device("cpu"), low_precision=True)


def _engine_step(run, shape: ModelConfig, device, comm, prefix: Path) -> Callable[[int], None]:
    engine = build_engine(run, shape, device, comm)
    loader = random_batches(run, prefix, comm.rank)

    def step(number: int) -> None:
        engine.train_step(loader.batch((number - 1) * run.batch.global_batch), number, 1e-4)

    return step


def _bare_step(run, shape: ModelConfig, device, compiled: bool, prefix: Path) -> Callable[[int], None]:
    """The same model without DeepSpeed: bf16 weights, AdamW on them, clipping. What nothing costs less than."""
    clock = DropoutClock(0)
    model = LanguageModel(shape, LayerFactory(clock, compiled), clock, loss_chunk_tokens(run.config, shape, run.device))
    initialize(model, shape, 1)
    model = model.to(device, torch.bfloat16 if run.precision == "bf16" else torch.float32)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, True), lr=1e-4, betas=(0.9, 0.95), fused=True)
    loader = random_batches(run, prefix, 0)

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
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _resolve(bench: Bench, style: str, path: str, compiled: bool, folder: Path):
    content = json.loads(Path(path).read_text()) | {"train_batch_size": bench.batch}
    ours = folder / "deepspeed.json"
    ours.write_text(json.dumps(content))
    loaded = load_run_config(
        None,
        [
            f"model.style={style}",
            f"model.num_hidden_layers={bench.layers}",
            f"model.hidden_size={bench.hidden}",
            f"model.num_attention_heads={bench.heads}",
            "model.qk_norm=false",
            f"data.sequence_length={bench.sequence}",
            f"train.loss_chunk_tokens={bench.chunk}",
            f"compile={str(compiled).lower()}",
        ],
    )
    ranks = rank_facts()
    device = device_facts(ranks.local_world_size)
    return resolve(loaded, read_deepspeed_json(str(ours)), ranks.world_size, device, bench.vocabulary)


if __name__ == "__main__":
    main()
