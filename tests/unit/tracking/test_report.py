"""The page about a run: true numbers, every state a run can be in, and nothing in it but what the template holds."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from report_runs import END, Page, event, page_of, train_row, validation, write_run

from megalm.checkpoint.manifest import Manifest, write_manifest
from megalm.cli.main import main
from megalm.config.schema import TrainSection
from megalm.errors import ConfigError
from megalm.runs.metrics_history import TRAINING, VALIDATION
from megalm.runs.metrics_log import Row
from megalm.tracking.report.page import write_report
from tests.messages import assert_names

START = event("start")
STEPS = [train_row(step, 5.0 - step / 10) for step in range(1, 31)]


def finding(page: Page, what: str, *names: object) -> str:
    """The line of what was unusual that begins with `what` and has all names."""
    (found,) = (line for line in page.items("unusual") if line.startswith(what))
    assert_names(found, *names)
    return found


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
    assert page.verdict.attributes["class"] == "verdict finished"
    assert_names(page.verdict.text, 30)
    expected: list[tuple[object, ...]] = [
        ("Validation loss", "3.2500", 30, "4,096"),
        ("3.2500", 30),  # the best
        ("Perplexity", "25.79", "665.1"),
        ("Bits per byte", "1.500", 3),
        ("Training loss", "2.0000"),
        ("Tokens", "1,920", "2.00"),
        ("Parameters", 960),
        ("Epochs", "1.50"),
        (640, "0.1 s"),
        ("MFU", "20.0%"),
        (1,),  # attempt
    ]
    for told, names in zip(page.items("numbers"), expected, strict=True):
        assert_names(told, *names)
    assert page.items("unusual") == []
    grows = {"training_stages": [[1, 8, 8, 1], [31, 24, 8, 1]]}  # a quarter of the tokens in the first half
    (run / "environment.json").write_text(json.dumps(facts | grows))
    assert any("Epochs" in told and "0.75" in told for told in page_of(run).items("numbers"))


# Rows, files, the kind of verdict and what it names.
STATES: dict[str, tuple[list[Row], dict[str, str], str, tuple[object, ...]]] = {
    "an empty folder": ([], {}, "waiting", ()),
    "just started": ([START], {}, "unknown", (0, 30)),
    "running": ([START, *STEPS[:9]], {"lock": "host a, process 1; beat 3"}, "running", (9, 30)),
    "killed": ([START, *STEPS[:9]], {"lock": ""}, "unknown", (9, 30)),
    "stopped": (
        [START, *STEPS[:9], event("signal", 9, signal=15), event("end", 9, status="stopped", exit_code=75)],
        {},
        "stopped",
        (9, 30, 15),
    ),
    "out of time": (
        [START, *STEPS[:9], event("wall_time", 9, limit="1h"), event("end", 9, status="stopped", exit_code=75)],
        {},
        "stopped",
        (9, 30, "train.max_wall_time=1h"),
    ),
    "failed": (
        [START, *STEPS[:9], event("end", 9, status="failed", exit_code=1)],
        {"failures/attempt-1.txt": "Traceback\n  ...\nRuntimeError: no memory\n\n"},
        "failed",
        (9, 30, "RuntimeError: no memory"),
    ),
    "failed before it began": (
        [],
        {"failures/attempt-1.txt": "megalm: error: no such file"},
        "failed",
        ("megalm: error: no such file",),
    ),
    "learnt no more": (
        [START, *STEPS[:9], event("early_stop", 9, best_loss=2.0), event("end", 9, status="finished", exit_code=0)],
        {},
        "finished",
        (9, 30, "evaluate.patience"),
    ),
    "resumed after its end": ([START, *STEPS, END, event("resume", 30, attempt=2)], {}, "unknown", (30,)),
}


@pytest.mark.parametrize("state", STATES)
def test_what_became_of_it_is_said_in_one_sentence(state: str, tmp_path: Path) -> None:
    rows, files, kind, names = STATES[state]
    run = write_run(tmp_path / "mine", rows)
    for name, text in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    verdict = page_of(run).verdict
    assert verdict.attributes["class"] == f"verdict {kind}"
    assert_names(verdict.text, *names)


def test_a_lock_that_nobody_counts_in_any_more_is_no_sign_of_life(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS[:9]])
    (run / "lock").write_text("host a, process 1; beat 3")
    os.utime(run / "lock", (1e9, 1e9))
    assert page_of(run).verdict.attributes["class"] == "verdict unknown"


def test_without_metrics_there_is_a_page_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [])
    (run / "metrics.jsonl").unlink()
    assert page_of(run).verdict.attributes["class"] == "verdict waiting"


def test_a_torn_last_row_is_no_row_and_a_broken_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS[:9]])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind":"train","step":10,"lo')
    assert_names(page_of(run).verdict.text, 9, 30)
    broken_at = (run / "metrics.jsonl").read_bytes().rindex(b"\n") + 1
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\n")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(run)])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert_names(told, "megalm: error: ", run / "metrics.jsonl", broken_at)
    assert told.count("\n") == 1


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
    finding(page, "resume", 5, 2, "step-00000005")
    finding(page, "rollback", 12, 7, "step-00000007", 80)
    (killed,) = (line for line in page.items("unusual") if not line.startswith(("resume", "rollback")))
    assert_names(killed, 5, 1, 4)  # the first attempt wrote no end, and four of its rows were taken back
    changed = page.texts.index("train.seed was 1, is 2")
    assert_names(page.texts[changed - 1], 2, "resume", 5)


def test_losses_that_are_no_numbers_are_marked_and_leave_a_gap(tmp_path: Path) -> None:
    rows = [train_row(step, math.nan if step == 5 else math.inf if step == 9 else 3.0) for step in range(1, 20)]
    page = page_of(write_run(tmp_path / "mine", [START, *rows, validation(19, math.nan)]))
    assert page.marks().count("not-finite") == 2
    (no_number,) = page.items("unusual")
    assert_names(no_number, "training loss", 5, 9)
    assert [path.count("M") for path in page.lines("steps")[:1]] == [3]
    assert not [told for told in page.items("numbers") if told.startswith("Validation")]


def test_a_run_of_nothing_but_nan(tmp_path: Path) -> None:
    rows = [train_row(step, math.nan, grad_norm=math.nan) for step in range(1, 20)]
    page = page_of(write_run(tmp_path / "mine", [START, *rows]))
    (no_number,) = page.items("unusual")
    assert_names(no_number, "training loss", 19)


def test_a_spike_is_reported_with_its_report_and_does_not_press_the_curve_flat(tmp_path: Path) -> None:
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
    numbers = (60, 900, 7, "2.5", 4)  # step, loss, gradient norm, median, limit
    finding(page, "spike", "loss", *numbers, "skip", "incidents/step-00000060.md", "# Step 60 the text of it")
    finding(page, "skip", 70, 1024)  # the overflow alone: the spike's skip is the spike
    (note,) = (text for text in page.texts if "900.0000" in text)
    assert_names(note, 1, 60)
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
    assert_names(page.items("numbers")[0], "Validation loss", "3.0000")
    assert_names(" ".join(page.items("legend")), "code", "news")
    looks = ("validation", "set-1", "set-2", "ema")
    assert [len(page.lines(look)) for look in looks] == [2, 2, 2, 0]  # a line and its dots


def test_the_average_of_the_weights_has_a_number_and_a_curve(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "mine", [START, *STEPS, validation(10, 3.0, ema_loss=2.5), END]))
    assert_names(page.items("numbers")[1], "2.5000")
    assert [len(page.lines(look)) for look in ("validation", "ema")] == [2, 2]


def test_slow_stretches_and_where_the_time_went(tmp_path: Path) -> None:
    rows = [
        train_row(step, 3.0, step_seconds=2.0 if 10 <= step < 14 else 0.5, time=step * 3.0) for step in range(1, 40)
    ]
    rows.insert(20, validation(20, 3.0, time=60.5))
    page = page_of(write_run(tmp_path / "mine", [{**event("start"), "startup_seconds": 8.0, "time": 2.0}, *rows]))
    (slow,) = page.items("unusual")
    assert_names(slow, 10, 13, "2 s", "0.5 s", "6.0 s")
    startup, *work = page.items("work")
    assert_names(startup, "8.0 s")
    for name, seconds in ((TRAINING, "26 s"), (VALIDATION, "0.5 s")):
        (row,) = (row for row in work if row.startswith(name))
        assert_names(row, seconds)


def test_the_newest_profile_is_a_table_and_nothing_unusual(tmp_path: Path) -> None:
    profiled = event("profile", 12, path="profile/steps-00000010-00000012.txt", profiled_step=10, last_step=12)
    run = write_run(tmp_path / "mine", [START, *STEPS, profiled, event("traffic", 10, first_step=1), END])
    part = {"part": "communication: data", "seconds": 0.02, "share": 0.25, "rank_seconds": [0.01, 0.03]}
    (run / "profile").mkdir()
    for moment, name, seconds in ((1, "step-00000003", 0.5), (2, "steps-00000010-00000012", 0.002)):
        path = run / "profile" / f"{name}.json"
        times = [part | {"host_seconds": 0.0, "hidden_seconds": seconds}]
        path.write_text(json.dumps({"step": 10, "last_step": 12, "ranks": 2, "times": times}))
        os.utime(path, (moment, moment))
    page = page_of(run)
    assert page.items("unusual") == []
    (row,) = (row for row in page.items("work") if row.startswith("communication"))
    assert_names(row, "data", "25.0%", "20.00 ms", "30.00 ms", "rank 1", "2.00 ms")
    # Written before there were tables.
    path.write_text("{}")
    assert not [row for row in page_of(run).items("work") if row.startswith("communication")]


def test_the_newest_load_of_each_expert(tmp_path: Path) -> None:
    loads = [{"1": [0.5, 1.5], "2": [1.0, 1.0]}, {"1": [0.25, 1.75], "2": [1.0, 1.0]}]
    rows = [
        event("experts", 10 * n, first_step=10 * n - 9, last_step=10 * n, load=load) for n, load in enumerate(loads, 1)
    ]
    page = page_of(write_run(tmp_path / "mine", [START, *STEPS, *rows, END]))
    assert page.items("unusual") == []
    cells = [str(own["title"]) for tag, own in page.elements if tag == "td" and "expert" in str(own.get("title"))]
    assert len(cells) == 4
    assert_names(cells[1], 1, 1, "1.75")


def test_checkpoints_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS, END])
    for step, status in ((10, "good"), (20, "suspect"), (30, "good")):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(b"12345678")
        files = {"a.safetensors": {"bytes": 8, "sha256": "0" * 64}}
        facts = {"files": files, "tensors": {}, "tokens": 64 * step, "validation_loss": 2.5}
        reason = "a spike" if status == "suspect" else None
        marked = {**facts, "step": step, "status": status, "status_reason": reason}
        write_manifest(folder, Manifest.from_json(marked))
    (run / "checkpoints" / "latest").write_text("step-00000030")
    (run / "checkpoints" / "best").write_text("step-00000010")
    (run / "checkpoints" / "step-00000030" / "a.safetensors").write_bytes(b"1")
    (run / "checkpoints" / "step-00000040").mkdir()
    page = page_of(run)
    for row in (
        "10 good best 2.5000 640 8 B",
        "20 suspect 2.5000 1,280 8 B",
        "30 damaged latest 2.5000 1,920 8 B",
        "step-00000040 incomplete",
    ):
        assert [found for found in page.rows if found.startswith(row)], row
    suspect, damaged, incomplete = page.items("unusual")
    assert_names(suspect, "step-00000020", "suspect", "a spike")
    assert_names(damaged, "step-00000030", "a.safetensors", 1, 8)
    assert_names(incomplete, "step-00000040")
    assert f"megalm generate {run}" in page.text


def test_settings_that_are_not_the_presets_come_first(tmp_path: Path) -> None:
    page = page_of(
        write_run(tmp_path / "mine", [START], preset="quickstart", model={"hidden_size": 77, "style": "llama"})
    )
    assert {"model.hidden_size 77 256", "train.steps 30 400"} < set(page.rows)
    assert [row for row in page.rows if row.startswith("model.style")] == ["model.style llama"], "among all settings"
    assert_names(page.text, "quickstart")


def test_a_configuration_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [event("start"), END])
    (folder / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as refused:
        write_report(folder)
    assert_names(refused.value, folder / "config.yaml")


def test_a_preset_that_is_gone_leaves_the_defaults(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "mine", [START], preset="gone"))
    assert f"train.steps 30 {TrainSection().steps}" in page.rows


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
        event("signal", 5, signal=15, why=EVIL),
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
    assert_names(page.text, f"{len('text of 10') + 1 + 20_000 - 12_000:,}")


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS, END])
    for words, path in (([], run / "report.html"), (["--output", str(tmp_path / "a.html")], tmp_path / "a.html")):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(run), *words])
        assert not caught.value.code
        assert_names(capsys.readouterr().out, path)
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
    assert_names(capsys.readouterr().err, tmp_path)


def test_what_was_evaluated_afterwards_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", [START, *STEPS])
    assert not any("quiz" in row for row in page_of(run).rows)
    row = {"kind": "evaluation", "source": "choices", "dataset": "a/quiz.jsonl", "questions": 1200, "step": 30}
    (run / "evaluations.jsonl").write_text(json.dumps({**row, "accuracy": 0.25, "accuracy_error": 0.0125}) + "\n")
    (found,) = (row for row in page_of(run).rows if "quiz" in row)
    assert found == "30 quiz accuracy 0.2500 \u00b1 0.0125 1,200 questions"
