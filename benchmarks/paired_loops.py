"""megalm's real command against a compiled loop in nanoGPT's way: whole loops, in turn, within one run.

    python -m benchmarks paired_loops [--shapes 34m quickstart] [--precisions bf16 fp32] [--rounds 6] [--seconds 8]

Both programs are started and compiled once. Then one of them runs for some seconds while all processes of the other are
stopped, and so on in turn; a step that a stop interrupts does not count. So both meet the same machine, and the ratio
of a round is of neighbours in time. megalm is `python launch/pretrain.py` with all that a run has: metrics, log,
mirror, spike guard, read-ahead. Same tokens, model (GPT-2's), batch, threads, precision and OpenMP waiting.

- wall: median over rounds of megalm's tokens/s over the other's; more is better for megalm.
- CPU: the same of tokens per second of processor time, of all its processes: what a busy machine changes least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import psutil

from benchmarks.bench_runs import ROOT, ZERO1, keys_of, words_of, write_random_tokens
from benchmarks.nanogpt import Shape

_WITHOUT_OURS = {"TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH": "0"}  # torch's default; megalm's command sets its own
_BYTES = 256  # ids of the byte tokenizer; more entries of the vocabulary cost the same whether they occur or not
_START_SECONDS = 600.0
_FEWEST_STEPS = 4  # of a round, however busy the machine is


SHAPES = {"quickstart": Shape(4, 256, 4, 8192, 256, 16), "34m": Shape(8, 512, 8, 16384, 512, 8)}


@dataclass
class Program:
    """A started training program, and the file with a JSON line for each step, which has its `time`."""

    process: subprocess.Popen[bytes]
    rows: Path
    log: IO[bytes]

    def times(self) -> list[float]:
        """Unix time of the end of each step so far."""
        if not self.rows.is_file():
            return []
        lines = [line for line in self.rows.read_bytes().split(b"\n")[:-1] if b'"loss"' in line]
        return [json.loads(line)["time"] for line in lines]

    def signal(self, number: signal.Signals) -> None:
        for process in self._all():
            process.send_signal(number)

    def cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._all()))

    def _all(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def wait_for_steps(self, count: int) -> None:
        began = time.monotonic()
        while len(self.times()) < count:
            if time.monotonic() - began > _START_SECONDS:
                self._give_up()
            self._wait()

    def measure(self, seconds: float) -> tuple[float, float]:
        """Let it run alone for some time; return seconds of wall and of processor time of one step."""
        self.signal(signal.SIGCONT)
        time.sleep(min(1.0, seconds / 8))  # caches and clocks
        begin, cpu, first = time.time(), self.cpu_seconds(), len(self.times()) + 1  # one step met the stop
        while time.time() - begin < seconds or len(self.times()) - first < _FEWEST_STEPS:
            self._wait()
        cpu = self.cpu_seconds() - cpu
        spent = time.time() - begin
        done = self.times()[first:]
        self.signal(signal.SIGSTOP)
        wall = (done[-1] - done[0]) / (len(done) - 1)
        return wall, cpu / spent * wall

    def _wait(self) -> None:
        if self.process.poll() is not None:
            self._give_up()
        time.sleep(0.2)

    def _give_up(self) -> NoReturn:
        self.log.flush()
        sys.exit(f"no further steps:\n{Path(self.log.name).read_text(errors='replace')[-3000:]}")

    def end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self._all():
                process.kill()
        self.process.wait()
        self.log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["34m", "quickstart"])
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--words", nargs="*", default=[], help="more key=value for megalm")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the stopped programs, too
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} threads each; {arguments.rounds} rounds of {arguments.seconds:g} s each")
    print(f"{'':22}{'megalm, s/step':>15}{'other, s/step':>15}{'wall':>7}{'lowest':>8}{'highest':>9}{'CPU':>7}")
    for name in arguments.shapes:
        for precision in arguments.precisions:
            with tempfile.TemporaryDirectory() as folder:
                _pair(name, precision, arguments, cores, Path(folder))


def _pair(name: str, precision: str, arguments: argparse.Namespace, cores: int, folder: Path) -> None:
    shape = SHAPES[name]
    write_random_tokens(folder / "data", _BYTES, shape.sequence)
    programs = [_megalm(shape, precision, arguments.words, folder), _nanogpt(shape, precision, cores, folder)]
    try:
        for program in programs:
            program.signal(signal.SIGCONT)
            program.wait_for_steps(4)
            program.signal(signal.SIGSTOP)
        rounds = [[program.measure(arguments.seconds) for program in programs] for _ in range(arguments.rounds)]
    finally:
        for program in programs:
            program.end()
    wall = [other[0] / ours[0] for ours, other in rounds]
    cpu = [other[1] / ours[1] for ours, other in rounds]
    ours, other = (statistics.median(each[index][0] for each in rounds) for index in (0, 1))
    print(
        f"{f'{name}, {precision}':22}{ours:15.4f}{other:15.4f}{statistics.median(wall):7.2f}{min(wall):8.2f}"
        f"{max(wall):9.2f}{statistics.median(cpu):7.2f}",
        flush=True,
    )


def _megalm(shape: Shape, precision: str, words: list[str], folder: Path) -> Program:
    content = json.loads(ZERO1.with_name("zero2.json").read_text())
    content |= {"train_batch_size": shape.batch, "bf16": {"enabled": precision == "bf16"}}
    (folder / "deepspeed.json").write_text(json.dumps(content))
    settings = {
        **keys_of(shape, "gpt2"),
        "model.vocab_size": shape.vocabulary,
        "model.tie_word_embeddings": True,
        "data.train": folder / "data",
        "data.tokenizer": "bytes",
        "data.split": "95,5",
        "train.steps": 100_000,
        "schedule.peak_learning_rate": 1e-4,  # random tokens teach nothing, and higher rates diverge on them
        "evaluate.interval_steps": "null",
        "checkpoint.interval_steps": "null",
        "compile": True,
        "run.name": "paired",
        "run.root": folder,
    }
    command = [str(ROOT / "launch" / "pretrain.py"), "--deepspeed_config", str(folder / "deepspeed.json")]
    command += [*words_of(settings), *words]
    return _start(command, folder / "paired" / "metrics.jsonl", folder / "megalm.log", folder, {})


def _nanogpt(shape: Shape, precision: str, cores: int, folder: Path) -> Program:
    sizes = vars(shape) | {"steps": 100_000, "threads": cores}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [str(ROOT / "benchmarks" / "nanogpt.py"), "--tokens", str(folder / "data.bin"), *options]
    rows = folder / "nanogpt.jsonl"
    return _start([*command, "--precision", precision], rows, rows, folder, _WITHOUT_OURS)


def _start(command: list[str], rows: Path, log: Path, folder: Path, more: dict[str, str]) -> Program:
    output = log.open("wb")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **more}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdout=output, stderr=subprocess.DEVNULL
    )
    started = Program(process, rows, output)
    started.signal(signal.SIGSTOP)  # until it is its turn
    return started
