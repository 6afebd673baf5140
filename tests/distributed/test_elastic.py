"""One run folder goes through several grids, each of which resumes the one before, and is the run of one rank.

All stages of a real start and of a real end; only the ranks are forked, and each number of them is used twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.data.builder.builder import build_dataset
from megalm.data.readers.document_reader import Document
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.engine.device import device_facts
from megalm.errors import EXIT_DONE
from megalm.nodes.node_check import NodeCheck
from megalm.parity.state_comparison import TOLERANCES
from megalm.rank_environment import rank_facts
from megalm.runs.metrics_log import live_rows, read_metrics
from megalm.runs.run_settings import Arguments
from megalm.topology import Axis
from megalm.train import setup
from megalm.train.datasets import open_run_data
from megalm.train.lifecycle.shutdown import RankSupervisor
from megalm.train.resume.resume_plan import find_resume_checkpoint, plan_resume
from tests.distributed.parity import EPSILON
from tests.messages import assert_names
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 10
TOLERANCE = TOLERANCES["fp32"]
# The batch grows in the middle. Of the three sizes only the first grid has exactly these.
SIZES = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
WORDS = (
    "schedule.batch=[{from_step: 0, sequences: 8}, {from_step: 5, sequences: 16}]",
    "schedule.warmup_steps=1",
    "schedule.kind=cosine",
    f"schedule.decay_end_step={STEPS}",
    "schedule.peak_learning_rate=3e-3",
    "model.hidden_size=32",
    "model.intermediate_size=88",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.sequence_length=24",
    "data.tokenizer=bytes",
    "data.document_mask=true",
    "data.split=90,10",
    "train.rehearse=false",
    "train.ema_decay=0.9",
    "evaluate.interval_steps=null",
    "evaluate.max_samples=16",
    "sample.interval_steps=null",
    "sample.max_new_tokens=1",
    "checkpoint.interval_steps=null",
    "tracking.mlflow=false",
)


@dataclass(frozen=True)
class Stretch:
    """What is said when the run begins or resumes, and the grid and the batch of it: micro-batch, accumulation."""

    last_step: int
    zero: int
    said: tuple[str, ...]
    grid: dict[Axis, int]
    sizes: tuple[int, int] = (2, 8)


# Number of ranks -> its stretches; those of fewer ranks resume from those of more.
STRETCHES = {
    4: (
        Stretch(2, 2, (), {"data": 4}, (2, 1)),
        Stretch(4, 3, ("parallel.tensor=2",), {"data": 2, "tensor": 2}, (2, 2)),
    ),
    2: (
        Stretch(6, 1, ("parallel.pipeline=2",), {"pipeline": 2}),
        Stretch(8, 2, ("parallel.context=2",), {"context": 2}),
    ),
    1: (Stretch(STEPS, 2, (), {}),),
}


ALONE = (Stretch(STEPS, 0, (), {}),)


def _train(comm: Any, device: torch.device, folder: Path, runs: dict[str, Sequence[Stretch]]) -> list[int]:
    """Train each stretch as `setup.pretrain` does once its ranks have met; return the exit codes."""
    codes = []
    for name, stretch in ((name, stretch) for name, stretches in runs.items() for stretch in stretches):
        said = (f"run.root={folder}", f"run.name={name}", f"data.train={folder / 'data'}", *WORDS, *stretch.said)
        json_file = str(folder / f"zero{stretch.zero}.json")
        arguments = Arguments(json_file, None, (*said, f"train.steps={stretch.last_step}"), resume="auto")
        ranks, supervisor = rank_facts(), RankSupervisor(comm.rank)
        settings = setup.load_settings(arguments, ranks, device_facts(comm.size))
        opened = setup.open_run(settings, comm, supervisor)
        point = find_resume_checkpoint(settings.run, opened.folder, settings.options, comm)
        plan = plan_resume(point, open_run_data(point.run, point.first_sample_of, comm, lambda _: None))
        observers = setup.CollectiveObservers()
        built = setup.build_trainer(plan, opened, NodeCheck(), ranks, device, comm, supervisor, (), observers)
        codes.append(built.trainer.fit())
        built.trainer.parts.close()
        comm.once((opened.folder.path / "lock").unlink)  # a process holds it to its end
    return codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    words = ["def", "return", "import", "while", "lambda", "yield", "class"]
    texts = (" ".join(words[(it * step) % 7] for step in range(1, 60)) for it in range(60))
    build_dataset((Document(text, str(it)) for it, text in enumerate(texts)), load_tokenizer("bytes"), folder / "data")
    for stage in range(4):
        sizes = SIZES if stage else {"train_micro_batch_size_per_gpu": 2}  # of the undisturbed run
        optimizer = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "eps": EPSILON, "weight_decay": 0.1}}
        content = {**sizes, "gradient_clipping": 0.5, "optimizer": optimizer, "zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[Path, Path]:
    """The folders of the run on several grids, and of the undisturbed one."""
    for ranks, stretches in STRETCHES.items():
        for codes in run_ranks(ranks, _train, folder, {"several": stretches, "alone": ALONE if ranks == 1 else ()}):
            assert set(codes) == {EXIT_DONE}
    return folder / "several", folder / "alone"


def _rows(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in live_rows(list(read_metrics(run / "metrics.jsonl"))) if row["kind"] == kind]


def test_the_steps_are_those_of_one_rank(runs: tuple[Path, Path]) -> None:
    several, alone = (_rows(run, "train") for run in runs)
    assert [row["step"] for row in several] == list(range(1, STEPS + 1))
    for name in ("step", "tokens", "lr"):
        assert [row[name] for row in several] == [row[name] for row in alone], name
    for name, limit in (("loss", TOLERANCE.loss), ("grad_norm", TOLERANCE.norm)):
        np.testing.assert_allclose([row[name] for row in several], [row[name] for row in alone], rtol=limit)
    last = [_rows(run, "eval")[-1]["loss"] for run in runs]
    np.testing.assert_allclose(*last, rtol=TOLERANCE.loss)


def test_the_last_checkpoint_is_that_of_one_rank(runs: tuple[Path, Path]) -> None:
    several, alone = (CheckpointReader(run / "checkpoints" / f"step-{STEPS:08d}") for run in runs)
    assert several.manifest.fingerprints == alone.manifest.fingerprints
    assert several.manifest.data_position == alone.manifest.data_position
    for name, shape in alone.shapes().items():
        assert several.kinds(name) == alone.kinds(name) == ("master", "exp_avg", "exp_avg_sq", "ema")
        for kind in alone.kinds(name):
            found, expected = (reader.read_parameter(name, shape, kind) for reader in (several, alone))
            limit = TOLERANCE.moments if kind.startswith("exp_avg") else TOLERANCE.weights
            assert (found - expected).norm() <= limit * expected.norm(), (name, kind)


def test_each_change_is_reported_in_one_line(runs: tuple[Path, Path]) -> None:
    events = [row for row in read_metrics(runs[0] / "metrics.jsonl") if row.get("event") in ("start", "resume")]
    stretches = [stretch for each in STRETCHES.values() for stretch in each]
    assert len(events) == len(stretches)
    assert events[0]["changed"] == []
    for event, before, after in zip(events[1:], stretches, stretches[1:], strict=False):
        (line,) = (line for line in event["changed"] if line.startswith("the grid "))
        was, now = line.split(", is ")
        for text, stretch in ((was, before), (now, after)):
            axes = [f"{axis} {size}" for axis, size in stretch.grid.items()]
            assert_names(text, *axes, f"ZeRO {stretch.zero}", "micro-batch {} x {}".format(*stretch.sizes))
