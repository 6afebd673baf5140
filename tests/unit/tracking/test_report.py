"""The page about a run: true numbers, every state a run can be in, and nothing in it but what the template holds."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from report_runs import END, Page, event, page_of, train_row, validation, write_run

from megalm.checkpoint.manifest import write_manifest
from megalm.cli.main import main
from megalm.errors import ConfigError
from megalm.tracking.report import write_report

START = event("start")
STEPS = [train_row(step, 5.0 - step / 10) for step in range(1, 31)]


def finding(page: Page, what: str) -> str:
    """The text of the list `What was unusual` from the first `what` on."""
    listed = page.text.partition("What was unusual")[2].partition("Where the time went")[0].partition("Checkpoints")[0]
    assert what in listed, listed
    return listed[listed.index(what) :]


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    rows = [validation(20, 3.3), validation(30, 3.25, bits_per_byte=1.5, targets=4096, perplexity=25.79)]
    run = write_run(tmp_path / "mine", [START, *STEPS[:20], rows[0], *STEPS[20:], rows[1], END])
    facts = {
        "parameters": 960,
        "unigram_entropy": 6.5,
        "planned_steps": 60,
        "datasets": [{"prefix": "p", "epochs": 3.0}],
    }
    (run / "environment.json").write_text(json.dumps(facts))
    page = page_of(run)
    assert "Finished at step 30 of 30." in page.text
    for told in (
        "Validation loss 3.2500 last, step 30 over 4,096 tokens",
        "Best while training 3.2500 step 30",
        "Perplexity 25.79 counting tokens alone: 665.1",
        "Bits per byte 1.500 counting tokens alone: 3",
        "Training loss 2.0000",
        "Tokens 1,920 2.00 a parameter",
        "Parameters 960",
        "Epochs 1.50",
        "Tokens a second 640 0.1 s a step",
        "MFU 20.0%",
        "in 1 attempt",
    ):
        assert told in page.text
    assert "Nothing: no spike" in page.text


STATES = {
    "an empty folder": ([], {}, "Has not begun to train."),
    "just started": ([START], {}, "no end was written. It was at step 0 of 30"),
    "running": ([START, *STEPS[:9]], {"lock": "host a, process 1; beat 3"}, "Running, at step 9 of 30; last row"),
    "killed": ([START, *STEPS[:9]], {"lock": ""}, "Killed, or on a machine that is gone: no end was written."),
    "stopped": (
        [START, *STEPS[:9], event("signal", 9, signal=15), event("end", 9, status="stopped", exit_code=75)],
        {},
        "Stopped at step 9 of 30 by signal 15. It is saved, and wants to go on.",
    ),
    "out of time": (
        [START, *STEPS[:9], event("wall_time", 9, limit="1h"), event("end", 9, status="stopped", exit_code=75)],
        {},
        "Stopped at step 9 of 30, its time (train.max_wall_time=1h) being up.",
    ),
    "failed": (
        [START, *STEPS[:9], event("end", 9, status="failed", exit_code=1)],
        {"failures/attempt-1.txt": "Traceback\n  ...\nRuntimeError: no memory\n\n"},
        "Failed at step 9 of 30: RuntimeError: no memory",
    ),
    "failed before it began": (
        [],
        {"failures/attempt-1.txt": "megalm: data: no such file"},
        "Failed before it began to train: megalm: data: no such file",
    ),
    "learnt no more": (
        [START, *STEPS[:9], event("early_stop", 9, best_loss=2.0), event("end", 9, status="finished", exit_code=0)],
        {},
        "Finished at step 9 of 30, because the validation loss fell no more",
    ),
    "resumed after its end": ([START, *STEPS, END, event("resume", 30, attempt=2)], {}, "no end was written"),
}


@pytest.mark.parametrize("state", STATES)
def test_what_became_of_it_is_said_in_one_sentence(state: str, tmp_path: Path) -> None:
    rows, files, sentence = STATES[state]
    run = write_run(tmp_path / "mine", rows)
    for name, text in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    assert sentence in page_of(run).text


def test_a_lock_that_nobody_counts_in_any_more_is_no_sign_of_life(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS[:9]])
    (run / "lock").write_text("host a, process 1; beat 3")
    os.utime(run / "lock", (1e9, 1e9))
    assert "Killed, or on a machine that is gone" in page_of(run).text


def test_without_metrics_there_is_a_page_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [])
    (run / "metrics.jsonl").unlink()
    assert "Has not begun to train." in page_of(run).text


def test_a_torn_last_row_is_no_row_and_a_broken_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS[:9]])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind":"train","step":10,"lo')
    assert "at step 9 of 30" in page_of(run).text
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\n")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(run)])
    assert caught.value.code == 2
    assert re.fullmatch(r"megalm: error: .*metrics\.jsonl: the line at byte .*\n", capsys.readouterr().err)


def test_what_a_resume_and_a_rollback_took_back_is_drawn_faintly_and_counts_no_more(tmp_path: Path) -> None:
    again = [train_row(step, 4.0, attempt=2) for step in range(6, 12)]
    last = [train_row(step, 3.0, attempt=3) for step in range(8, 15)]
    back = event("rollback", 7, attempt=3, at_step=12, path="step-00000007", samples_skipped=80)
    resume = event(
        "resume", 5, attempt=2, path="runs/mine/checkpoints/step-00000005", changed=["train.seed was 1, is 2"]
    )
    page = page_of(write_run(tmp_path / "mine", [START, *STEPS[:9], resume, *again, back, *last]))
    assert len(page.lines("abandoned")) == 2 * 5  # attempts 1 and 2, on every chart: loss, rate, norm, speed, MFU
    (live,) = page.lines("steps")[:1]
    assert live.count(" ") == 26  # 14 points, of which the steps that count are made
    assert {"resume", "rollback"} == set(page.marks())
    assert "step 5 attempt 2, from step-00000005" in finding(page, "resume")
    assert "step 12 back to step 7 (step-00000007), past 80 samples" in finding(page, "rollback")
    assert "step 5 attempt 1 wrote no end: it was killed, or its machine failed; 4 rows of it were" in finding(
        page, "killed"
    )
    assert "Attempt 2, resume at step 5 train.seed was 1, is 2" in page.text


def test_losses_that_are_no_numbers_are_marked_and_leave_a_gap(tmp_path: Path) -> None:
    rows = [train_row(step, math.nan if step == 5 else math.inf if step == 9 else 3.0) for step in range(1, 20)]
    page = page_of(write_run(tmp_path / "mine", [START, *rows, validation(19, math.nan)]))
    assert page.marks().count("no-number") == 2
    assert "training loss at step 5, 9" in finding(page, "no number")
    assert [path.count("M") for path in page.lines("steps")[:1]] == [3]
    assert "Validation loss" not in page.text


def test_a_run_of_nothing_but_nan(tmp_path: Path) -> None:
    rows = [train_row(step, math.nan, grad_norm=math.nan) for step in range(1, 20)]
    page = page_of(write_run(tmp_path / "mine", [START, *rows]))
    assert "no step of 19 has a training loss that is a number" in page.text


def test_a_spike_is_told_of_with_its_report_and_does_not_press_the_curve_flat(tmp_path: Path) -> None:
    rows = [train_row(step, 900.0 if step == 60 else 3.0 - step / 100) for step in range(1, 100)]
    spike = event(
        "spike", 59, at_step=60, quantity="loss", decided="skip", loss=900.0, grad_norm=7.0, limit=4.0, median=2.5,
        why="", report="step-00000060.md",
    )  # fmt: skip
    skip = event("skip", 59, at_step=60, reason="loss 900")
    overflow = event("skip", 70, reason="gradient overflow", loss_scale=1024.0)
    run = write_run(tmp_path / "mine", [START, *rows[:59], spike, skip, *rows[59:], overflow])
    (run / "incidents").mkdir()
    (run / "incidents" / "step-00000060.md").write_text("# Step 60\nthe text of it")
    page = page_of(run)
    told = finding(page, "spike")
    assert "loss out of bounds: loss 900, gradient norm 7 (median 2.5, limit 4); decided: skip" in told
    assert "incidents/step-00000060.md # Step 60 the text of it" in told
    assert "step 70 gradient overflow, loss scale 1024" in told
    assert told.count("skip ") == 2  # what was decided of the spike, and the overflow; the spike's skip is the spike
    assert "1 step is above the frame and drawn at its edge; the highest is 900.0000 at step 60." in page.text
    heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", page.lines("steps")[0])]
    assert min(heights) == 0.0
    assert max(heights) - sorted(heights)[1] > 300  # the others still fill a good part of the frame


def test_an_incident_outside_the_run_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("not for a page")
    run = write_run(tmp_path / "mine", [START, event("spike", 1, report="../../secret.md")])
    (run / "incidents").mkdir()
    assert "not for a page" not in page_of(run).text


def test_several_validation_sets_each_have_a_curve(tmp_path: Path) -> None:
    rows = [validation(10, loss, dataset=name) for name, loss in (("code", 2.0), ("news", 4.0), ("validation", 3.0))]
    page = page_of(write_run(tmp_path / "mine", [START, *STEPS, *rows, END]))
    assert "Validation loss 3.0000" in page.text
    assert "validation on code" in page.text
    assert [len(page.lines(look)) for look in ("validation", "set-1", "set-2")] == [2, 2, 2]  # a line and its dots


def test_slow_stretches_and_where_the_time_went(tmp_path: Path) -> None:
    rows = [
        train_row(step, 3.0, step_seconds=2.0 if 10 <= step < 14 else 0.5, time=step * 3.0) for step in range(1, 40)
    ]
    rows.insert(20, validation(20, 3.0, time=60.5))
    page = page_of(write_run(tmp_path / "mine", [{**event("start"), "startup_seconds": 8.0, "time": 2.0}, *rows]))
    assert "slow step 10 until step 13, 2 s a step, usual are 0.5 s: 6.0 s lost" in page.text
    time_went = page.text.partition("Where the time went")[2].partition("Checkpoints")[0]
    assert re.search(r"start-up, before the first step [\d.]+% 8.0 s training steps [\d.]+% 26 s", time_went)
    assert re.search(r"validation [\d.]+% 0.5 s", time_went)


def test_checkpoints_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS, END])
    for step, status in ((10, "good"), (20, "suspect"), (30, "good")):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(b"12345678")
        facts = {"files": {"a.safetensors": {"bytes": 8, "sha256": "0" * 64}}, "tensors": {}, "tokens": 64 * step}
        reason = "a spike" if status == "suspect" else None
        write_manifest(
            folder, {**facts, "step": step, "status": status, "status_reason": reason, "validation_loss": 2.5}
        )
    (run / "checkpoints" / "latest").write_text("step-00000030")
    (run / "checkpoints" / "best").write_text("step-00000010")
    (run / "checkpoints" / "step-00000030" / "a.safetensors").write_bytes(b"1")
    (run / "checkpoints" / "step-00000040").mkdir()
    page = page_of(run)
    table = page.text.partition("tokens seen size")[2]
    assert "10 good best 2.5000 640 8 B 20 suspect 2.5000 1,280 8 B 30 damaged latest 2.5000 1,920 8 B" in table
    assert "step-00000040 incomplete" in table
    assert "step-00000020 is suspect: a spike" in finding(page, "checkpoint")
    assert "a.safetensors has 1 bytes, the manifest says 8" in finding(page, "checkpoint")
    assert f"megalm generate {run}" in page.text


def test_settings_that_are_not_the_presets_come_first(tmp_path: Path) -> None:
    page = page_of(
        write_run(tmp_path / "mine", [START], preset="quickstart", model={"hidden_size": 77, "style": "llama"})
    )
    differing = page.text.partition("What is not as in the preset quickstart:")[2].partition("All settings")[0]
    assert "model.hidden_size 77 256" in differing
    assert "train.steps 30 400" in differing
    assert "model.style" not in differing
    assert "model.style llama" in page.text


def test_a_configuration_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [event("start"), END])
    (folder / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        write_report(folder)


def test_a_preset_that_is_gone_leaves_the_defaults(tmp_path: Path) -> None:
    assert "What is not as in the defaults:" in page_of(write_run(tmp_path / "mine", [START], preset="gone")).text


EVIL = "</pre></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7919 * 7919 }}"


def test_nothing_that_a_run_holds_becomes_html(tmp_path: Path) -> None:
    evil_name = EVIL.replace("/", "")  # a folder's name has no slash
    rows = [
        event("start", changed=[EVIL]),
        *STEPS[:5],
        validation(5, 3.0, dataset=EVIL),
        event("warning", 5, text=EVIL),
        event("spike", 5, quantity=EVIL, decided=EVIL, why=EVIL, report="a.md"),
        event(EVIL, 5, text=EVIL),
        event("signal", 5, signal=EVIL),
        event("end", 5, status="failed"),
    ]
    run = write_run(tmp_path / evil_name, rows, **{EVIL: EVIL}, data={"tokenizer": EVIL, "train": EVIL})
    for name in ("samples/step-00000005.txt", "incidents/a.md", "failures/attempt-1.txt", "stacks/rank-0.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(EVIL)
    environment = {"device": EVIL, "command": [EVIL], "packages": {EVIL: EVIL}, "git": {"commit": EVIL}}
    (run / "environment.json").write_text(json.dumps({**environment, "datasets": [{"prefix": EVIL}]}))
    (run / "deepspeed.resolved.json").write_text(json.dumps({EVIL: EVIL}))
    page = page_of(run)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "a"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "href", "srcdoc") for name in attributes)
    assert page.text.count(EVIL) >= 15  # it is all there, as text
    assert str(7919 * 7919) not in page.text


def test_the_page_loads_nothing_and_is_small_also_for_a_long_run(tmp_path: Path) -> None:
    rows = [train_row(step, 3.0 + math.sin(step), grad_norm=1.0 + math.sin(step) / 2) for step in range(1, 20_001)]
    run = write_run(tmp_path / "mine", [START, *rows])
    content = write_report(run).read_text(encoding="utf-8")
    assert len(content) < 300_000
    assert not re.search(r"https?://|url\(|@import|<script|<link", content)
    assert "default-src 'none'" in content


def test_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [START])
    for step in (10, 20, 30, 40):
        (run / "samples").mkdir(exist_ok=True)
        (run / "samples" / f"step-{step:08d}.txt").write_text(f"text of {step}\n" + "x" * 20_000)
    page = page_of(run)
    assert [step for step in (10, 20, 30, 40) if f"text of {step}" in page.text] == [10, 30, 40]
    assert "more bytes are in the file" in page.text


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS, END])
    for words, path in (([], run / "report.html"), (["--output", str(tmp_path / "a.html")], tmp_path / "a.html")):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(run), *words])
        assert not caught.value.code
        assert capsys.readouterr().out.startswith(f"{path}: ")
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("output", ["", "none/a.html"])
def test_a_place_that_cannot_be_written_is_refused(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "mine", [START])
    with pytest.raises(SystemExit) as caught:
        main(["report", str(run), "--output", str(tmp_path / output)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path)])
    assert caught.value.code == 2
    assert "no run folder" in capsys.readouterr().err
