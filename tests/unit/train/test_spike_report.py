"""Reports of spikes: none takes another's place, and the command they advise is whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.data.builder.builder import build_files
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import sources_path
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import TrainingSamples
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.runs.run_folder import ResumeCommand
from megalm.train.console import RunConsole
from megalm.train.spikes.spike_guard import Verdict
from megalm.train.spikes.spike_report import (
    SpikeReport,
    SpikeReportWriter,
    next_command,
    report_name,
)
from tests.messages import assert_names

RUN = ResumeCommand(Path("runs/mine"))


def incident(saved_step: int) -> SpikeReport:
    return SpikeReport(8, 1, 9.0, 3.0, 0.2, Verdict("stop", None, ""), {}, (112, 128), saved_step)


def test_a_step_that_is_out_of_bounds_again_has_a_report_of_its_own() -> None:
    assert report_name(8, 1) == "step-00000008.md"
    assert report_name(8, 2) == "step-00000008.attempt-2.md"


def test_the_advice_is_past_the_data_or_where_nothing_is_saved_a_smaller_rate() -> None:
    assert next_command(RUN, incident(6)).endswith("launch/pretrain.py run.name=mine --resume 6 --skip-steps 2")
    told = next_command(RUN, incident(0))
    assert told.endswith("run.name=mine --resume auto schedule.peak_learning_rate=0.1")


class Alone:
    is_main = True


class Engine:
    def refused_gradients(self) -> dict[str, float]:
        return {"norm.weight": 3.0}


WINDOW = {
    "steps": 9,
    "loss_median": 3.0,
    "loss_sigma": 0.1,
    "loss_max": 3.5,
    "grad_norm_median": 0.5,
    "grad_norm_sigma": 0.2,
    "grad_norm_max": 0.75,
}


@pytest.fixture
def writer(tmp_path: Path) -> SpikeReportWriter:
    """Of a run on 40 documents."""
    lines = (json.dumps({"text": chr(65 + number) * 100}) + "\n" for number in range(40))
    (tmp_path / "my.jsonl").write_text("".join(lines))
    build_files([tmp_path / "my.jsonl"], ByteTokenizer(), tmp_path / "my")
    samples = TrainingSamples(IndexedDataset(tmp_path / "my"), (0, 40), 8, seed=1)
    blend, tokenizer = BlendedSamples([samples], [MixtureStage(0, (1.0,))]), ByteTokenizer()
    return SpikeReportWriter(tmp_path / "incidents", blend, tokenizer, RUN, Alone(), RunConsole(active=True))  # type: ignore[arg-type]


def test_each_number_is_in_its_column(writer: SpikeReportWriter) -> None:
    report = writer.write(Engine(), replace(incident(6), window=WINDOW))  # type: ignore[arg-type]
    loss, norm = (line for line in report.read_text().splitlines() if line.startswith(("| loss", "| gradient norm")))
    assert re.findall(r"[\d.]+", loss) == ["9.0000", "3", "0.1", "3.5"]
    assert re.findall(r"[\d.]+", norm) == ["3", "0.5", "0.2", "0.75"]


def test_text_that_cannot_be_looked_up_costs_the_report_not_the_run(
    writer: SpikeReportWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources_path(tmp_path / "my").write_bytes(b"half")
    writer.write(Engine(), replace(incident(6), window=WINDOW))  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert_names(said, "WARNING", 8, sources_path(tmp_path / "my"))
    assert said.count("\n") == 1
