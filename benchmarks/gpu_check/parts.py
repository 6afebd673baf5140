"""The parts of a GPU check; each runs in a process of its own, which this file starts.

    python -m benchmarks.gpu_check.parts NAME cuda|cpu REPORT.json SECONDS

On a CPU the sizes are tiny: the same code runs, and shows nothing but that it runs.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from benchmarks.gpu_check.report import Report

if TYPE_CHECKING:
    import torch

    from megalm.engine.distributed import DistributedCommunicator

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """What a part is given.

    Attributes:
        deadline: on the monotonic clock; later work is left out and reported.
        folder: empty, removed at the end.
    """

    device: str
    report: Report
    deadline: float
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()


def main() -> None:
    name, device, report, seconds = sys.argv[1:]
    # A part that sees its end coming leaves out the rest by itself.
    deadline = time.monotonic() + float(seconds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        task = Task(device, Report(Path(report)), deadline, Path(folder))
        if name.startswith("speed-"):
            from benchmarks.gpu_check.speed import speed

            speed(task, name.removeprefix("speed-"))
        else:
            PARTS[name](task)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of process groups may abort a normal exit


@contextmanager
def one_rank() -> Iterator[tuple[DistributedCommunicator, torch.device]]:
    """The control channel and the device of a job of one rank."""
    from megalm.engine.deepspeed_patches import limit_openmp_spin, silence

    limit_openmp_spin()
    silence()
    from megalm.engine.device import claim_device
    from megalm.engine.distributed import start_distributed
    from megalm.rank_environment import rank_facts

    ranks = rank_facts()
    device = claim_device(ranks)
    yield start_distributed(ranks, device), device


# --- the machine ------------------------------------------------------------------------------------------------------


def machine(task: Task) -> None:
    import torch

    report = task.report
    report.fact("torch", torch.__version__)
    report.fact("Python", platform.python_version())
    report.fact("cores", len(os.sched_getaffinity(0)))
    for package in ("deepspeed", "triton", "transformers", "flash_attn"):
        report.fact(package, _version(package))
    for tool in ("g++", "ninja", "nvcc"):
        report.fact(tool, "found" if shutil.which(tool) or (Path(sys.executable).parent / tool).exists() else "missing")
    report.check("a CUDA device", torch.cuda.is_available() if task.on_gpu else None, str(torch.cuda.device_count()))
    kind = torch.device(task.device)
    sizes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if task.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability(0)
        report.fact("GPU", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, capability {major}.{minor}")
        report.fact("driver", _driver())
        report.fact("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
        report.fact("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        report.check("bf16 is native", None, "yes" if native else "no: fp16 is the precision of this card")
    else:
        del sizes["fp16"]  # a thousand times slower
    _measure_ceilings(task, kind, sizes)


def _measure_ceilings(task: Task, device: torch.device, sizes: dict[str, torch.dtype]) -> None:
    import torch

    from megalm.cost_model.gpu_specs import data_sheet_peak
    from megalm.engine.device import fastest_seconds

    name = torch.cuda.get_device_name(0) if task.on_gpu else ""
    rows = []
    size = 8192 if task.on_gpu else 512
    for precision, dtype in sizes.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        flops = 2 * size**3 / fastest_seconds(lambda a=left, b=right: a @ b, device, 12, 0.3)  # type: ignore[misc]
        sheet = data_sheet_peak(name, precision != "fp32")
        of_peak = "-" if sheet is None else f"{flops / sheet[0]:.0%} of {sheet[0] / 1e12:.0f}"
        rows.append([f"{size} x {size} product, {precision}", f"{flops / 1e12:.2f} TFLOP/s", of_peak])
        if sheet is not None:
            task.report.check(f"{precision} products reach half of the data sheet", flops > sheet[0] / 2, rows[-1][1])
    source = torch.empty((2**31 if task.on_gpu else 2**26) // 4, device=device).normal_()
    target = torch.empty_like(source)
    seconds = fastest_seconds(lambda: target.copy_(source), device, 8, 0.3)
    rows.append(["copy on the device, read and written", f"{2 * source.nbytes / seconds / 1e9:,.0f} GB/s", "-"])
    if task.on_gpu:
        for pinned in (False, True):
            host = torch.empty(2**26, pin_memory=pinned)
            place = torch.empty(2**26, device=device)
            seconds = fastest_seconds(lambda h=host, p=place: p.copy_(h), device, 4, 0.2)  # type: ignore[misc]
            rows.append(
                [f"to the device, {'pinned' if pinned else 'pageable'}", f"{host.nbytes / seconds / 1e9:.1f} GB/s", "-"]
            )
    task.report.table("Ceilings", ["what", "measured", "data sheet"], rows)


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- the tests --------------------------------------------------------------------------------------------------------


def tests(task: Task) -> None:
    """Only files that mark a test are collected: importing all of them takes longer than the tests."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu\b", path.read_text())]
    results = task.folder / "results.xml"
    environment = os.environ | ({"MEGALM_REQUIRE_GPU": "1"} if task.on_gpu else {})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={results}"]
    done = subprocess.run([*command, *map(str, marked)], cwd=ROOT, env=environment, check=False)
    task.report.fact("files", len(marked))
    if not results.is_file():
        task.report.check("pytest runs", False, f"exit code {done.returncode}")
        return
    for case in ElementTree.parse(results).iter("testcase"):
        failed = [child for child in case if child.tag in ("failure", "error")]
        skipped = [child.get("message", "") for child in case if child.tag == "skipped"]
        found = (failed[0].get("message") or "").splitlines()[:1] if failed else skipped or ["passed"]
        task.report.check(
            str(case.get("name")), None if skipped else not failed, f"{' '.join(found)}, {case.get('time')} s"
        )


# --- ZeRO 2's overlap -------------------------------------------------------------------------------------------------


def overlap(task: Task) -> None:
    """Off, on, off again: what two equal runs differ by is the noise that the other difference is held against."""
    import torch

    from benchmarks.step_loops import SHAPES, Setting, free_memory
    from megalm.parity.state_comparison import Trace

    torch.use_deterministic_algorithms(True, warn_only=True)
    steps, bench = (50, replace(SHAPES["34m"], batch=32)) if task.on_gpu else (6, SHAPES["tiny"])
    traces: list[Trace] = []
    seconds = []
    with one_rank() as (comm, device):
        setting = Setting(bench, device, comm, task.folder)
        setting.write_tokens()
        for is_on in (False, True, False):
            start = time.monotonic()
            traces.append(_overlap_run(setting, is_on, steps))
            seconds.append(time.monotonic() - start)
            free_memory()
    off, on, again = traces
    task.report.fact("steps", steps)
    task.report.fact(
        "model", f"{bench.layers} x {bench.hidden}, {bench.batch} x {bench.sequence} tokens, 4 micro-batches"
    )
    task.report.fact("seconds, off, on and off again", ", ".join(f"{each:.1f}" for each in seconds))
    for name, found, noise in zip(
        ("losses", "gradient norms", "weights and moments"),
        _trace_differences(on, off),
        _trace_differences(again, off),
        strict=True,
    ):
        holds = found <= 4 * noise if noise else found == 0.0
        task.report.check(f"{name} are equal", holds, f"differ by {found:.1e}; two runs without overlap by {noise:.1e}")


def _overlap_run(setting: Any, is_on: bool, steps: int) -> Any:
    from benchmarks.bench_runs import engine_steps
    from megalm.parity.miniature_training import snapshot
    from megalm.parity.state_comparison import Trace

    content = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    content["train_micro_batch_size_per_gpu"] = setting.bench.batch // 4
    # Small buckets: many reductions are under way beside the backward pass.
    content["zero_optimization"] |= {"overlap_comm": is_on, "reduce_bucket_size": 1_000_000}
    own = setting.folder / f"overlap-{is_on}.json"
    own.write_text(json.dumps(content))
    run = replace(setting, json=own).resolve(False)
    engine, step = engine_steps(run, setting.bench.vocabulary, setting.device, setting.comm, setting.prefix)
    found = [step(number) for number in range(1, steps + 1)]
    return Trace([each.loss for each in found], [each.grad_norm for each in found], snapshot(engine))


def _trace_differences(found: Any, expected: Any) -> tuple[float, float, float]:
    """Losses and norms relative, states relative to each one's L2 norm: the largest each."""
    from megalm.parity.state_comparison import relative, state_difference, whole_state

    state, reference = whole_state([found]), whole_state([expected])
    states = max(state_difference(state, reference, kind) for kind in {kind for _, kind in reference})
    return relative(found.losses, expected.losses), relative(found.norms, expected.norms), states


# --- parity -----------------------------------------------------------------------------------------------------------

_OTHER_KERNELS = 10.0  # times the matrix's tolerance: another device sums in another order, with other kernels


def parity(task: Task) -> None:
    """Each model, ZeRO stage and precision on one rank of the device, against ZeRO 1 on it and against a CPU."""
    import torch

    from megalm.parity.state_comparison import TOLERANCES, Outcome, difference
    from tests.distributed.parity import MODELS, Row, train, train_rows
    from tests.distributed.training import make_dataset
    from tests.ranks import run_ranks

    torch.backends.cuda.matmul.allow_tf32 = False
    models = list(MODELS) if task.on_gpu else list(MODELS)[-1:]
    wanted = [("fp32", (1, 0, 2, 3), models), ("bf16", (1, 2, 3), models[-1:]), ("fp16", (1, 2, 3), models[-1:])]
    if not task.on_gpu:
        wanted = [("fp32", (1, 3), models), ("bf16", (1,), models)]
    rows = [
        Row("dp2", model, zero, precision)
        for precision, of_precision, of_models in wanted
        for model in of_models
        for zero in of_precision
    ]
    prefix = task.folder / "parity"
    make_dataset(prefix)
    cases = {row.reference: row.reference_case() for row in rows}
    references = run_ranks(1, train_rows, cases, prefix, _made(task.folder / "cpu"), timeout_seconds=task.left())[0]
    task.report.fact("references on the CPU", len(references))
    lines: list[list[str]] = []
    left_out = 0
    of_device: dict[str, Outcome] = {}
    with one_rank() as (comm, device):
        for row in rows:
            if task.left() < 5:
                left_out += 1
                continue
            case = row.reference_case()
            zero = {**case.settings["zero_optimization"], "stage": row.zero}
            case = replace(case, settings={**case.settings, "zero_optimization": zero})
            name = f"{row.model}, ZeRO {row.zero}, {row.numbers}"
            try:
                outcome = train(comm, device, case, prefix, _made(task.folder / f"row-{len(lines)}"))
            except Exception as error:  # the other rows are worth as much
                task.report.check(name, False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            first = of_device.setdefault(row.reference, outcome)  # ZeRO 1 comes first
            tolerance = TOLERANCES[row.precision]
            wide = replace(tolerance, **{key: value * _OTHER_KERNELS for key, value in vars(tolerance).items()})
            to_cpu, to_first = difference([outcome], references[row.reference]), difference([outcome], first)
            beyond = [f"to the CPU {each}" for each in to_cpu.beyond(wide)]
            beyond += [f"to ZeRO 1 {each}" for each in to_first.beyond(tolerance)]
            if beyond:
                task.report.check(name, False, "; ".join(beyond))
            figures = [f"{getattr(to, kind):.0e}" for to in (to_cpu, to_first) for kind in ("loss", "norm", "weights")]
            lines.append([name, *figures, "no" if beyond else "yes"])
            columns = [f"{kind}, to {to}" for to in ("CPU", "ZeRO 1") for kind in ("losses", "norms", "weights")]
            task.report.table("Largest differences", ["row", *columns, "within tolerance"], lines)
    task.report.check(
        "rows within tolerance", bool(lines), f"{sum(line[-1] == 'yes' for line in lines)} of {len(rows)}"
    )
    if left_out:
        task.report.check("all rows", None, f"{left_out} rows are left out: no time is left")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- document masks ---------------------------------------------------------------------------------------------------


def document_mask(task: Task) -> None:
    """A masked sequence against each of its documents alone: loss and gradients; then what the mask costs."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    length = 2048 if task.on_gpu else 128
    kinds = [("gpt2", False), ("llama", True), ("gpt2", True), ("llama", False)]
    for style, compiled in kinds if task.on_gpu else kinds[:2]:
        loss, gradient = _mask_differences(task, style, compiled, length)
        name = f"{style}, {'compiled' if compiled else 'eager'}: documents do not see each other"
        found = f"to documents alone: loss differs by {loss:.1e}, gradients by {gradient:.1e}"
        task.report.check(name, loss < 1e-5 and gradient < 1e-3, found)
    rows = []
    for masked in (False, True):
        seconds = _mask_seconds(task, masked, length)
        rows.append(["documents" if masked else "causal alone", f"{seconds * 1e3:.2f}"])
    task.report.table(f"Forward and backward, {length} tokens, bf16", ["mask", "ms"], rows)


def _mask_model(style: str, compiled: bool, length: int, task: Task) -> Any:
    from megalm.config.schema import ModelSection
    from megalm.model.layer_factory import LayerFactory
    from megalm.model.model_config import build_model_config
    from megalm.model.modules import DropoutClock
    from megalm.model.transformer import LanguageModel, initialize

    heads, layers = (8, 4) if task.on_gpu else (2, 1)
    section = ModelSection.model_validate(
        {"style": style, "hidden_size": 64 * heads, "num_hidden_layers": layers, "num_attention_heads": heads}
    )
    shape, clock = build_model_config(section, 512, length), DropoutClock(0)
    model = LanguageModel(shape, LayerFactory(clock, compiled), clock)
    initialize(model, shape, 1)
    model = model.to(task.device)
    if compiled:
        model.compile_blocks()
    return model


def _documents(length: int) -> list[int]:
    """Lengths of documents that together fill a sequence: some within one block of attention, some over many."""
    parts = [length // 16 + 3, length // 2 - 5, 1, length // 8]
    return [*parts, length - sum(parts)]


def _mask_differences(task: Task, style: str, compiled: bool, length: int) -> tuple[float, float]:
    import torch

    from megalm.model.loss import IGNORE

    lengths = _documents(length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 512, (1, length), generator=generator).to(task.device)
    labels = tokens.roll(-1, 1)
    ends = list(itertools.accumulate(lengths))
    labels[0, [end - 1 for end in ends]] = IGNORE
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0).to(task.device)
    packed, alone = _mask_model(style, compiled, length, task), _mask_model(style, False, length, task)
    loss, _ = packed(tokens, labels, numbers)
    loss.backward()
    expected = 0.0
    for begin, end in zip([0, *ends], ends, strict=False):
        each, _ = alone(tokens[:, begin:end], labels[:, begin:end])
        each.backward()
        expected += float(each.detach())
    differences = [
        float((own.grad - other.grad).norm() / other.grad.norm())
        for (name, own), other in zip(packed.named_parameters(), alone.parameters(), strict=True)
        if not name.endswith("key.bias")  # has no gradient but rounding
    ]
    return abs(float(loss.detach()) / expected - 1), max(differences)


def _mask_seconds(task: Task, masked: bool, length: int) -> float:
    import torch

    from megalm.engine.device import fastest_seconds

    model = _mask_model("llama", task.on_gpu, length, task).to(torch.bfloat16)
    tokens = torch.randint(0, 512, (4, length), device=task.device)
    lengths = torch.tensor(_documents(length))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths).expand(4, -1).to(task.device)

    def work() -> None:
        loss, _ = model(tokens, tokens, numbers if masked else None)
        loss.backward()

    work()
    return fastest_seconds(work, torch.device(task.device), 5 if task.on_gpu else 2)


# --- a checkpoint behind training, and a resume -----------------------------------------------------------------------


def checkpoint(task: Task) -> None:
    """The real command: a run that saves behind its steps, then again from its first checkpoint on."""
    steps, half = (40, 20) if task.on_gpu else (6, 3)
    size = {"hidden_size": 512, "num_hidden_layers": 8} if task.on_gpu else {"hidden_size": 32, "num_hidden_layers": 2}
    (task.folder / "text.txt").write_text("def read(self):\n    return self\n\n" * (20_000 if task.on_gpu else 400))
    data = ("--input", "text.txt", "--tokenizer", "bytes", "--output-prefix", "small", "--txt-documents", "blank-line")
    _command(task, "build", [str(ROOT / "data_tools" / "build_dataset.py"), *data])
    words = [
        str(ROOT / "launch" / "pretrain.py"),
        "--deepspeed_config",
        str(ROOT / "ds_configs" / "zero2.json"),
        "data.train=small",
        "data.tokenizer=bytes",
        "data.split=90,10",
        f"data.sequence_length={512 if task.on_gpu else 32}",
        *(f"model.{name}={value}" for name, value in size.items()),
        f"model.num_attention_heads={size['hidden_size'] // 16}",
        f"train.steps={steps}",
        "schedule.warmup_steps=2",
        "evaluate.interval_steps=null",
        f"checkpoint.interval_steps={half}",
        "checkpoint.async=true",
        "sample.max_new_tokens=1",
        "tracking.mlflow=false",
        "run.name=checked",
        "train.deterministic=true",
    ]
    _command(task, "train", words)
    rows = _rows(task)
    saves = [row for row in rows if row.get("event") == "checkpoint"]
    step_seconds = sorted(row["step_seconds"] for row in rows if row["kind"] == "train")[steps // 2]
    stall = "; ".join(
        f"step {row['saved_step']}: {row['stall_seconds']:.3f} s of {row['seconds']:.2f} s" for row in saves
    )
    task.report.fact("a step takes", f"{step_seconds:.4f} s")
    task.report.check("checkpoints are saved behind training", len(saves) == 2, f"training waits at {stall}")
    _command(task, "resume", [*words, "--resume", str(half)])
    rows = _rows(task)
    task.report.check("the resumed run begins", any(row.get("event") == "resume" for row in rows), f"at step {half}")
    of_attempt = {
        attempt: {row["step"]: row for row in rows if row["kind"] == "train" and row["attempt"] == attempt}
        for attempt in (1, 2)
    }
    again = of_attempt[2]
    task.report.check("it trains the other steps", set(again) == set(range(half + 1, steps + 1)), f"{len(again)} steps")
    worst = max(abs(row["loss"] / of_attempt[1][step]["loss"] - 1) for step, row in again.items())
    # Without deterministic kernels two runs of the same steps drift apart by rounding.
    task.report.check(
        "losses are those of the unbroken run", worst < (1e-3 if task.on_gpu else 1e-12), f"differ by {worst:.1e}"
    )
    task.report.check("and equal to the last bit", None, "yes" if worst == 0.0 else "no")


def _command(task: Task, name: str, words: Sequence[str]) -> None:
    start = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=task.folder, check=True, timeout=max(1.0, task.left()))
    task.report.fact(f"seconds of {name}", f"{time.monotonic() - start:.1f}")


def _rows(task: Task) -> list[dict[str, Any]]:
    text = (task.folder / "runs" / "checked" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


PARTS: dict[str, Callable[[Task], None]] = {
    "machine": machine,
    "tests": tests,
    "overlap": overlap,
    "parity": parity,
    "document-mask": document_mask,
    "checkpoint": checkpoint,
}

if __name__ == "__main__":
    main()
