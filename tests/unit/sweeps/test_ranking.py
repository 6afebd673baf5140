"""Ranking the runs of a sweep: what is best, and what cannot be told from it."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.sweeps.expansion import Sweep, read_sweep
from megalm.sweeps.ranking import RankedRun, Ranking, effects, rank, score_runs
from megalm.sweeps.sweep_folder import SweepFolder, find_sweep, state_of
from megalm.sweeps.sweep_report import effect_chart, ranking_rows, read_ranking, summary, verdict, write_sweep_page
from megalm.tracking.compare_runs import read_run
from tests.messages import assert_names
from tests.unit.tracking.report_runs import END, Page, event, train_row, validation, write_run

RATE, WIDTH = "schedule.peak_learning_rate", "model.hidden_size"


def ranked(sweep: Sweep, scores: Sequence[float | None], stderr: float | None = None) -> Ranking:
    return rank(
        [RankedRun(run, "finished", score=score, stderr=stderr) for run, score in zip(sweep.runs, scores, strict=True)]
    )


def of_values(ranking: Ranking, key: str = RATE) -> list[tuple[str, float]]:
    return [(entry.values[key], round(entry.score, 6)) for entry in ranking.entries]


def test_without_seeds_the_validation_samples_are_the_noise() -> None:
    sweep = read_sweep([f"{RATE}=0.001,0.002,0.003"])
    found = ranked(sweep, [3.10, 3.00, 3.05], stderr=0.02)
    assert of_values(found) == [("0.002", 3.0), ("0.003", 3.05), ("0.001", 3.1)]
    assert found.noise(found.entries[1]) == pytest.approx(1.96 * math.hypot(0.02, 0.02))
    assert [found.equals_best(entry) for entry in found.entries] == [True, True, False]
    assert not found.by_seeds
    unknown = ranked(sweep, [3.1, 3.0, 3.05])
    assert not any(unknown.equals_best(entry) for entry in unknown.entries[1:])
    assert unknown.noise(unknown.entries[1]) is None


def test_with_seeds_their_pooled_scatter_is_the_noise() -> None:
    sweep = read_sweep([f"{RATE}=0.001,0.002", "train.seed=1,2"])  # in order: both rates with seed 1, then with seed 2
    found = ranked(sweep, [3.30, 3.00, 3.32, 3.02], stderr=5.0)  # which does not matter
    assert of_values(found) == [("0.002", 3.01), ("0.001", 3.31)]
    deviation = math.sqrt((2 * 0.01**2 + 2 * 0.01**2) / 2)
    assert found.entries[0].stderr == pytest.approx(deviation / math.sqrt(2))
    assert found.by_seeds
    assert found.noise(found.entries[1]) == pytest.approx(4.30 * deviation)  # two degrees of freedom
    assert not found.equals_best(found.entries[1])
    near = ranked(sweep, [3.05, 3.00, 3.07, 3.02])
    assert near.equals_best(near.entries[1])


def test_an_effect_is_over_the_same_values_of_the_others() -> None:
    sweep = read_sweep([f"{RATE}=0.001,0.002", f"{WIDTH}=64,128"])
    full = ranked(sweep, [4.0, 3.0, 3.8, 2.6], stderr=0.1)
    assert {it.value: (round(it.score, 6), it.count) for it in effects(full, RATE)} == {
        "0.001": (3.5, 2),
        "0.002": (3.2, 2),
    }
    # Of the higher rate only the wide one is there: it would be compared with nothing.
    part = ranked(sweep, [4.0, 3.0, None, 2.6], stderr=0.1)
    assert {it.value: (round(it.score, 6), it.count) for it in effects(part, WIDTH)} == {
        "64": (4.0, 1),
        "128": (3.0, 1),
    }
    assert {it.stderr for it in effects(part, WIDTH)} == {0.1}


def finished_run(root: Path, name: str, loss: float, tokenizer: str = "t", **fields: object) -> Path:
    rows = [event("start"), train_row(15, loss + 1), train_row(30, loss), validation(30, loss, **fields), END]
    folder = write_run(root / name, rows)
    (folder / "environment.json").write_text(f'{{"tokenizer_fingerprint": "{tokenizer}", "flops_per_token": 1000}}')
    return folder


def made(root: Path, losses: Sequence[float | None], **fields: object) -> Sweep:
    """A sweep whose runs have ended with these losses; None has not begun."""
    values = ",".join(f"0.00{index + 1}" for index in range(len(losses)))
    sweep = read_sweep([f"{RATE}={values}"], [f"run.root={root}"], "lr")
    for run, loss in zip(sweep.runs, losses, strict=True):
        if loss is not None:
            finished_run(root, run.name, loss, **fields)
    return SweepFolder(sweep.folder).write(sweep, ["python", "launch/pretrain.py"])


def test_a_page_has_the_ranking_and_the_effect(tmp_path: Path) -> None:
    sweep = made(tmp_path, [3.2, 3.0, None, 3.01], loss_stderr=0.02, targets=6400)
    ranking = read_ranking(sweep)
    assert [run.state for run in ranking.rest] == ["waiting"]
    page = Page()
    page.feed(write_sweep_page(sweep, ranking).read_text())
    assert_names(page.verdict.text, f"{RATE}=0.002", f"{RATE}=0.004", "3.0000", "0.0200")
    assert f"{RATE}=0.001" not in page.verdict.text
    assert [row for row in page.rows if "0.001" in row and "+0.2000" in row]
    ids = [attributes.get("id") for tag, attributes in page.elements if tag == "figure"]
    assert ids == ["chart-effect-1", *(f"chart-{by}-{n}" for by in ("tokens", "time", "flops") for n in (1, 2))]
    content = summary(sweep, ranking)
    assert content["uncertainty"] == "samples"
    assert content["best"]["values"] == {RATE: "0.002"}
    assert [entry["differs_from_best"] for entry in content["ranking"]] == [False, False, True]
    assert len(ranking_rows(ranking, [RATE])[1]) == 4


def test_runs_that_are_not_finished_or_not_finite_have_no_rank(tmp_path: Path) -> None:
    sweep = made(tmp_path, [3.2, float("nan"), 3.0])
    broken = tmp_path / sweep.runs[2].name
    write_run(
        broken, [event("start"), train_row(1, 3.0), validation(1, 1.0), event("end", 1, status="failed", exit_code=1)]
    )
    ranking = read_ranking(sweep)
    assert of_values(ranking) == [("0.001", 3.2)]
    assert [run.run.values[RATE] for run in ranking.rest] == ["0.002", "0.003"]
    assert effect_chart(ranking, RATE) is None
    assert_names(verdict(read_ranking(made(tmp_path / "other", [None, None]))), "finished")


def test_other_tokenizers_are_ranked_by_bits_per_byte(tmp_path: Path) -> None:
    sweep = read_sweep(["data.tokenizer=a,b"], [f"run.root={tmp_path}"])
    # Fewer nats a token, but shorter tokens.
    for run, loss, bits in zip(sweep.runs, (2.0, 4.0), (1.5, 1.2), strict=True):
        finished_run(tmp_path, run.name, loss, run.values["data.tokenizer"], bits_per_byte=bits, loss_stderr=loss / 100)
    found = [(run, state_of(tmp_path / run.name), read_run(tmp_path / run.name)) for run in sweep.runs]
    ranking = rank(*score_runs(found))
    assert ranking.scored_by == "bits per byte"
    assert of_values(ranking, "data.tokenizer") == [("b", 1.2), ("a", 1.5)]
    assert [entry.stderr for entry in ranking.entries] == pytest.approx([0.012, 0.015])


def test_a_sweep_grows_but_does_not_change(tmp_path: Path) -> None:
    root = [f"run.root={tmp_path}"]
    few = read_sweep([f"{RATE}=1e-3,2e-3"], root, "lr")
    folder = SweepFolder(few.folder)
    folder.write(few, ["python"])
    whole = folder.write(read_sweep([f"{RATE}=3e-3,1e-3"], root, "lr"), ["deepspeed"])
    assert whole.axes == {RATE: ("0.001", "0.002", "0.003")}
    assert [run.values[RATE] for run in whole.runs] == ["0.001", "0.002", "0.003"]
    assert folder.read() == (whole, ["deepspeed"])
    assert find_sweep(str(folder.path)) == folder
    for words, arguments in ((["train.seed=1,2"], root), ([f"{RATE}=1e-3,2e-3"], [*root, "train.steps=7"])):
        with pytest.raises(ConfigError) as refused:
            folder.write(read_sweep(words, arguments, "lr"), ["python"])
        assert_names(refused.value, folder.path, "--name")
    (folder.path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError):
        folder.read()


def test_the_state_of_a_run_is_that_of_its_last_event(tmp_path: Path) -> None:
    assert state_of(tmp_path / "none") == "waiting"
    ends = {"finished": "finished", "stopped": "stopped", "failed": "failed"}
    for status, state in ends.items():
        rows = [event("start"), train_row(1, 3.0), event("end", 1, status=status, exit_code=0)]
        assert state_of(write_run(tmp_path / status, rows)) == state
    assert state_of(write_run(tmp_path / "killed", [event("start"), train_row(1, 3.0)])) == "stopped"
    (tmp_path / "killed" / "lock").write_text("host elsewhere, process 1; beat 3\n")
    assert state_of(tmp_path / "killed") == "running"
    (tmp_path / "killed" / "lock").write_text(f"host {platform.node()}, process {2**22 + 1}; beat 3\n")
    assert state_of(tmp_path / "killed") == "stopped"  # no process has this number
