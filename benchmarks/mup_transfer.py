"""Which learning rate is the best at each width, with and without the maximal-update parametrisation.

    python -m benchmarks mup_transfer [--widths 64,128,256] [--rates 2.5e-4,...] [--steps 200]

Trains the coordinate check's small model (two layers, four heads) on the bytes of Python's standard library, the same
batches at every width and rate, and prints the mean loss per byte of the last tenth of the steps as Markdown.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import numpy.typing as npt

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.sampling.samples import Samples
from megalm.model.transformer import LanguageModel, initialize
from megalm.parity.coordinate_check import LENGTH, shape_at, train_steps
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.runs.run_settings import read_settings

RATES = ",".join(f"{2.5e-4 * 2**power:g}" for power in range(9))
BYTES = 256


class Windows(Samples):
    """Random windows of a text's bytes; the same by number."""

    def __init__(self, text: bytes) -> None:
        self.sequence_length, self.document_mask = LENGTH, False
        self._text = np.frombuffer(text, dtype=np.uint8)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        start = np.random.default_rng([11, index]).integers(len(self._text) - LENGTH)
        window = self._text[start : start + LENGTH + 1].astype(np.int64)
        return window[:-1], window[1:]

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        return np.zeros(LENGTH, dtype=np.int32)

    def target_count(self, index: int) -> int:
        return LENGTH


def run_of(base: int | None) -> ResolvedRun:
    settings = [] if base is None else [f"model.mup_base_width={base}"]
    files = read_settings(None, settings, "zero1.json", resume=False, ranks=1)
    return resolve(files.loaded, files.deepspeed, 1, DeviceFacts("cpu", bf16=True, memory_bytes=4 << 30), BYTES)


def final_loss(run: ResolvedRun, width: int, base: int, rate: float, steps: int, samples: Samples) -> float:
    """Return the mean of the last tenth, after a warm-up of a tenth and a linear decay to a tenth of the rate."""
    shape = shape_at(run, width, base, BYTES)
    model = LanguageModel(shape)
    initialize(model, shape, run.config.train.seed)
    tenth = steps // 10
    rates = [rate * min((step + 1) / tenth, 1 - 0.9 * (step - tenth) / (steps - tenth)) for step in range(steps)]
    losses = list(train_steps(run, model, shape, samples, rates))
    return sum(losses[-tenth:]) / tenth


def table(widths: list[int], learning_rates: list[float], steps: int) -> Iterator[str]:
    samples = Windows(b"\n".join(path.read_bytes() for path in source_files().values()))
    yield "| parametrisation | width | " + " | ".join(f"{rate:g}" for rate in learning_rates) + " |"
    yield "|" + "---|" * (len(learning_rates) + 2)
    for name, base in (("standard", None), ("maximal-update", widths[0])):
        run = run_of(base)
        for width in widths:
            losses = [final_loss(run, width, widths[0], rate, steps, samples) for rate in learning_rates]
            best = min(loss for loss in losses if math.isfinite(loss))
            cells = (f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses)
            yield f"| {name} | {width} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64,128,256", help="the first is the base width")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    widths, rates = arguments.widths.split(","), arguments.rates.split(",")
    for line in table([int(width) for width in widths], [float(rate) for rate in rates], arguments.steps):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
