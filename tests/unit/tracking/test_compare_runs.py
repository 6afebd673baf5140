"""Comparing runs: the settings that differ, the numbers as they count, a picture that is one."""

from __future__ import annotations

import json
import re
import resource
import signal
import warnings
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.errors import ConfigError
from megalm.runs.evaluations import read_evaluations
from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.compare_runs import differing_settings, incomparable, measure_of, plot_losses, read_run, results
from tests.messages import assert_names


def write_run(root: Path, name: str, peak: float, batch: int, losses: list[float], **config: object) -> Path:
    """Rows ten seconds apart; validation every second step."""
    folder = root / name
    folder.mkdir()
    settings = {"run": {"name": name}, "schedule": {"peak_learning_rate": peak}, "train": {"steps": len(losses)}}
    (folder / "config.yaml").write_text(json.dumps(settings | config))
    (folder / "deepspeed.resolved.json").write_text(json.dumps({"train_batch_size": batch}))
    rows: list[dict[str, object]] = [{"kind": "event", "event": "start", "time": 1000.0}]
    for step, loss in enumerate(losses, 1):
        moment = 1000.0 + 10 * step
        speed = 1.0 if step == 1 else 100.0 + step
        train = {"kind": "train", "step": step, "tokens": step * 64, "loss": loss, "mfu": 0.25, "attempt": 1}
        rows.append({**train, "tokens_per_second": speed, "time": moment})
        if step % 2 == 0:
            rows.append({"kind": "eval", "step": step, "tokens": step * 64, "loss": loss + 0.5, "time": moment})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def append(folder: Path, *rows: dict[str, object]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_only_what_differs_is_named(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path, "a", 1e-3, 8, [3.0] * 4))
    second = read_run(write_run(tmp_path, "b", 6e-4, 16, [3.0] * 4, compile=True))
    assert differing_settings([first, second]) == {
        "compile": [None, "true"],
        "deepspeed.train_batch_size": ["8", "16"],
        "schedule.peak_learning_rate": ["0.001", "0.0006"],
    }
    assert differing_settings([first, first]) == {}


def test_of_several_validation_sets_the_total_judges(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [])
    sets = (("hard", 9.0), ("easy", 1.0), ("validation", 4.0))
    append(
        folder,
        *(
            {"kind": "eval", "time": 1020.0, "step": 2, "tokens": 64, "dataset": name, "loss": loss}
            for name, loss in sets
        ),
    )
    run = read_run(folder)
    assert (results(run).final_validation_loss, results(run).best_validation_loss) == (4.0, 4.0)
    assert run.validation_curves() == [[(64.0, 4.0)]]


def test_the_optimizer_is_compared_as_written_and_as_resolved(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name, 1e-3, 8, [3.0] * 4) for name in ("a", "b")]
    for folder, decay in zip(folders, (0.1, 0.01), strict=True):  # of runs whose resolved file has no optimizer
        given = {"optimizer": {"type": "AdamW", "params": {"weight_decay": decay}}, "train_batch_size": "auto"}
        (folder / "deepspeed.json").write_text(json.dumps(given))
    key = "deepspeed.optimizer.params.weight_decay"
    assert differing_settings([read_run(folder) for folder in folders]) == {key: ["0.1", "0.01"]}
    resolved = json.dumps({"optimizer": {"params": {"weight_decay": 0.1}}, "train_batch_size": 8})
    for folder in folders:
        (folder / "deepspeed.resolved.json").write_text(resolved)
    assert differing_settings([read_run(folder) for folder in folders]) == {}


def test_results_are_the_last_the_best_and_the_median(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [5.0, 4.0, 3.0, 2.0, 2.5, 2.4, 2.4, 2.4, 2.4, 2.4])
    found = results(read_run(folder))
    assert (found.steps, found.tokens, found.attempts) == (10, 640, 1)
    assert (found.final_train_loss, found.final_validation_loss) == (2.4, 2.9)
    assert (found.best_validation_loss, found.best_validation_step) == (2.5, 4)
    assert found.tokens_per_second == 106.0  # of steps 2-10: the first, compiling, is left out
    assert (found.mfu, found.wall_seconds) == (0.25, 100.0)


def test_losses_by_dataset_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path, name, 1e-3, 8, [3.0] * 4) for name in ("a", "b")]
    for folder, loss in zip(folders, (2.0, 1.5), strict=True):
        more = {"kind": "train", "tokens": 320, "loss": 3.0, "attempt": 1, "time": 1050.0}
        append(folder, {**more, "step": 5, "loss_of_web": loss, "loss_of_code": None})
    assert [results(read_run(folder)).dataset_losses for folder in folders] == [{"web": 2.0}, {"web": 1.5}]
    with pytest.raises(SystemExit):
        main(["compare", *map(str, folders), "--plot", str(tmp_path / "plot.png")])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "on web" in line)
    assert_names(line, "2.0000", "1.5000")
    with pytest.raises(SystemExit):
        main(["compare", *map(str, folders), "--json"])
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [run["results"]["final_train_loss_of_web"] for run in found] == [2.0, 1.5]


def test_a_resume_takes_back_rows_and_its_pause_is_no_wall_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [5.0, 4.0, 1.0, 0.5])
    again = {"kind": "train", "step": 3, "tokens": 192, "loss": 3.0, "attempt": 2}
    append(folder, {"kind": "event", "event": "resume", "step": 2, "time": 9000.0}, {**again, "time": 9010.0})
    found = results(read_run(folder))
    assert (found.steps, found.final_train_loss, found.best_validation_loss) == (3, 3.0, 4.5)
    assert (found.wall_seconds, found.attempts) == (50.0, 2)


def test_the_best_is_found_among_validations_on_the_same_samples(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "one", 1e-3, 8, [3.0, 2.9])
    evaluations = [(1, 4.0, False), (2, 3.5, False), (2, 3.1, True)]
    append(
        folder,
        *(
            {
                "kind": "eval",
                "step": step,
                "tokens": step,
                "loss": loss,
                "dataset": "validation",
                "whole": whole,
                "time": 9.0,
            }
            for step, loss, whole in evaluations
        ),
    )
    found = results(read_run(folder))
    assert (found.final_validation_loss, found.best_validation_loss) == (3.1, 3.4)


def test_losses_that_are_no_numbers_do_not_win(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [5.0, 4.0])
    append(folder, {"kind": "eval", "step": 3, "tokens": 192, "loss": "NaN", "time": 1030.0})
    record = read_run(folder)
    assert results(record).best_validation_loss == 4.5
    assert record.validation_curves() == [[(128.0, 4.5)]]


def test_the_command_prints_both_tables_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, "a", 1e-3, 8, [3.0, 2.0]), write_run(tmp_path, "b", 6e-4, 8, [3.0, 2.5])]
    picture = tmp_path / "curves" / "loss.png"
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, runs), "--plot", str(picture)])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert re.search(r"schedule.peak_learning_rate +0.001 +0.0006\n", out)
    assert re.search(r"2.5000 +3.0000 +\+0.5000 \(\+20.00%\)\n", out)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_of_two_runs_each_line_has_its_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady, noisy = [4.0] * 90, [3.0, 3.1] * 5
    first = write_run(tmp_path, "a", 1e-3, 8, [*steady, *noisy])
    second = write_run(tmp_path, "b", 6e-4, 8, [*steady, *(loss - 0.04 for loss in noisy), 2.0])
    (first / "environment.json").write_text(json.dumps({"parameters": 640}))
    lines = compared(capsys, first, second)
    assert lines["tokens"] == ["6400", "6464", "+64 (+1.00%)"]
    assert lines["parameters"] == ["640", "-", "-"]  # of one it is not known
    assert lines["tokens per parameter"][0] == "10.00"
    assert lines["perplexity"] == ["36.60", "35.16", "-1.44 (-3.92%)"]
    assert lines["validation loss, last"][2] == "-0.0400 (-1.11%)"  # one number a run: nothing is said of noise
    assert lines["training loss, last"][2] == "-1.1000 (-35.48%)"
    assert re.fullmatch(r"[^()]+ \([^()]+%\).+", lines["tokens/s, median"][2]), "a note that it is noise"
    assert lines["MFU, median"][:2] == ["25.00%", "25.00%"]
    assert not re.search(r"\d", lines["MFU, median"][2]), "there is no difference"
    assert lines["wall time"][2] == "+10 s (+1.00%)"


def test_a_loss_within_the_scatter_of_steps_is_no_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [3.0, 3.1] * 50
    runs = [write_run(tmp_path, name, 1e-3, 8, losses[:length]) for name, length in (("a", 100), ("b", 99))]
    difference = compared(capsys, *runs)["training loss, last"][2]
    assert re.fullmatch(r"-0\.1000 \(-3\.23%\).+", difference), "a note that it is noise"


def compared(capsys: pytest.CaptureFixture[str], *runs: Path) -> dict[str, list[str]]:
    """Line -> its cells, of the second table."""
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, runs), "--plot", str(runs[0] / "loss.png")])
    assert not caught.value.code
    table = capsys.readouterr().out.partition("\nresult ")[2].splitlines()[2:]
    cells = [re.split(r"  +", line.strip()) for line in table if line.strip()]
    return {name: values for name, *values in cells}


def test_one_run_or_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [3.0])
    for words in ([str(folder)], [str(folder), str(tmp_path / "none")], [str(folder), str(tmp_path)]):
        with pytest.raises(SystemExit) as caught:
            main(["compare", *words])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("megalm: error: ")


def test_a_picture_of_no_known_format_is_refused(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, "a", 1e-3, 8, [3.0]))
    with pytest.raises(ConfigError, match=r"\.png"):
        plot_losses([record, record], tmp_path / "curve.docx")


@pytest.mark.parametrize("name", ["_a", "a $x^$ b", "w" * 200], ids=["underscore", "mathematics", "long"])
def test_every_run_is_in_the_legend_by_its_name(name: str, tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path, folder, 1e-3, 8, [3.0, 2.0])) for folder in (name, "b")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what matplotlib cannot lay out
        plot_losses(runs, tmp_path / "curves.svg")
    written = re.findall(r"<!-- (.*?) -->", (tmp_path / "curves.svg").read_text(encoding="utf-8"))
    assert name in "".join(written)
    assert "b" in written
    assert max(map(len, written)) <= 50


def test_runs_of_one_name_are_distinguished_in_the_picture_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("one", "two"):
        Path(root).mkdir()
        write_run(Path(root), "a", 1e-3, 8, [3.0, 2.0])
    with pytest.raises(SystemExit) as caught:
        main(["compare", "one/a", "two/a", "--plot", "curves.svg"])
    assert not caught.value.code
    assert re.search(r"^result +one/a +two/a ", capsys.readouterr().out, re.MULTILINE)
    written = re.findall(r"<!-- (.*?) -->", Path("curves.svg").read_text(encoding="utf-8"))
    assert {"one/a", "two/a"} <= set(written)


def test_an_attempt_of_which_nothing_was_kept_is_one_all_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [5.0, 4.0])
    append(folder, {"kind": "event", "event": "start", "step": 0, "time": 2000.0})
    append(folder, {"kind": "train", "step": 1, "tokens": 64, "loss": 3.0, "attempt": 2, "time": 2010.0})
    assert results(read_run(folder)).attempts == 2


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, "a", 1e-3, 8, [3.0]))
    picture = tmp_path / "curves.png"
    plot_losses([record], picture)
    before = picture.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(ConfigError) as refused:
            plot_losses([record], picture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_names(refused.value, picture)
    assert picture.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "curves.png"]


def with_facts(folder: Path, **facts: object) -> Path:
    (folder / "environment.json").write_text(json.dumps(facts))
    return folder


def validation(step: int, loss: float, targets: int, **fields: object) -> dict[str, object]:
    row = {"kind": "eval", "step": step, "tokens": step * 64, "loss": loss, "targets": targets, "time": 2000.0 + step}
    return row | fields


def test_losses_over_other_samples_are_not_joined_and_do_not_compete(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 1e-3, 8, [])
    part = [validation(step, loss, 640, whole=False) for step, loss in ((2, 4.0), (4, 3.5), (6, 3.6))]
    append(folder, *part, validation(6, 3.4, 6400, whole=True, loss_stderr=0.25))
    run = read_run(folder)
    assert run.validation_curves() == [[(128.0, 4.0), (256.0, 3.5), (384.0, 3.6)], [(384.0, 3.4)]]
    found = results(run)
    assert (found.final_validation_loss, found.validation_targets, found.validation_stderr) == (3.4, 6400, 0.25)
    assert (found.best_validation_loss, found.best_validation_targets) == (3.5, 640)
    # Over the same samples the last one can be the best, whole or not.
    append(folder, validation(8, 3.3, 640, whole=True))
    assert results(read_run(folder)).best_validation_loss == 3.3


def test_curves_are_over_tokens_time_or_flops(tmp_path: Path) -> None:
    folder = with_facts(write_run(tmp_path, "a", 1e-3, 8, []), flops_per_token=10)
    train = {"kind": "train", "loss": 3.0, "attempt": 1, "time": 2000.0}
    append(folder, *({**train, "step": step, "tokens": step * 64, "step_seconds": 0.5} for step in (2, 4)))
    append(folder, validation(3, 3.5, 640))
    run = read_run(folder)
    assert run.training_curve("time") == [(1.0, 3.0), (2.0, 3.0)]
    assert run.training_curve("flops") == [(1280.0, 3.0), (2560.0, 3.0)]
    assert run.validation_curves("time") == [[(1.5, 3.5)]]
    unknown = read_run(with_facts(folder))
    assert (unknown.training_curve("flops"), unknown.validation_curves("flops")) == ([], [])


def test_what_does_not_compare_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, tokenizer, data, count in (("a", "t", "v", 64), ("b", "t", "v", 64), ("c", "u", "w", 64)):
        folder = write_run(tmp_path, name, 1e-3, 8, [3.0, 2.0])
        append(folder, validation(2, 2.5, count, bits_per_byte=1.5))
        runs.append(with_facts(folder, tokenizer_fingerprint=tokenizer, validation_fingerprint=data))
    records = [read_run(folder) for folder in runs]
    assert incomparable(records[:2]) == []
    assert measure_of(records[:2]) == "loss"
    tokenizers, data_differ = incomparable(records)
    assert_names(tokenizers, "a", "b", "c")
    assert_names(data_differ, "a", "b", "c")
    assert measure_of(records) == "bits_per_byte"
    lines = compared(capsys, runs[1], runs[2])
    assert lines["bits per byte"] == ["1.5000", "1.5000", "none"]
    assert not {"perplexity", "validation loss, last", "training loss, last"} & set(lines)
    # The same data in part and whole.
    append(runs[1], validation(2, 2.5, 6400))
    (counts,) = incomparable([read_run(folder) for folder in runs[:2]])
    assert_names(counts, "a", 64, "b", "6,400")
    lines = compared(capsys, *runs[:2])
    assert lines["validation loss, last"] == ["2.5000", "2.5000", "-"]  # no difference of what does not compare
    assert lines["training loss, last"][2] == "none"


def test_json_csv_and_the_page_have_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path, name, peak, 8, [3.0, loss]) for name, peak, loss in (("a", 1e-3, 2.0), ("b", 2e-3, 2.5))
    ]
    page = tmp_path / "page.html"

    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["compare", *map(str, runs), "--plot", str(tmp_path / "unused.png"), *words])
        assert not caught.value.code
        return capsys.readouterr().out

    content = json.loads(printed("--json", "--page", str(page)))
    assert [run["name"] for run in content["runs"]] == ["a", "b"]
    assert [run["settings"]["schedule.peak_learning_rate"] for run in content["runs"]] == ["0.001", "0.002"]
    assert [run["results"]["final_validation_loss"] for run in content["runs"]] == [2.5, 3.0]
    heading, *lines = printed("--csv").splitlines()
    column = heading.split(",").index("final_validation_loss")
    assert [line.split(",")[column] for line in lines] == ["2.5", "3.0"]
    assert not (tmp_path / "unused.png").exists()
    text = page.read_text()
    assert re.findall(r'id="by-(\w+)"', text) == ["tokens"]  # of these runs no seconds and no FLOPs are known
    assert "3.0000" in text
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, runs), "--json", "--csv"])
    assert caught.value.code == 2


def evaluated(folder: Path, *rows: dict[str, object]) -> None:
    lines = [json.dumps({"kind": "evaluation", "time": 1.0, **row}) for row in rows]
    (folder / "evaluations.jsonl").write_text("\n".join(lines) + "\n")


def test_evaluations_over_the_same_questions_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_run(tmp_path, name, 1e-3, 8, [4.0, 3.0]) for name in ("a", "b"))
    asked = {"source": "choices", "dataset": "sets/quiz.jsonl.zst", "questions": 1000, "accuracy_error": 0.01}
    text = {"source": "text", "dataset": "books", "targets": 500, "loss": 3.0, "bits_per_byte": 1.25}
    evaluated(
        first,
        {**asked, "step": 1, "accuracy": 0.2},
        {**asked, "step": 2, "accuracy": 0.25},
        {**asked, "step": 2, "accuracy": 0.3},
        {**text, "step": 2},
        {**asked, "step": 2, "accuracy": 0.9, "ema": True},
    )
    evaluated(second, {**asked, "step": 2, "accuracy": 0.4, "questions": 1000}, {**text, "step": 2, "targets": 600})
    rows = compared(capsys, first, second)
    assert rows["quiz, accuracy of 1,000 questions"][:2] == ["0.3000", "0.4000"]
    assert rows["quiz, accuracy of 1,000 questions"][2].startswith("+0.1000")
    assert rows["books, bits per byte of 500 tokens"] == ["1.2500", "-", "-"]
    assert rows["books, bits per byte of 600 tokens"] == ["-", "1.2500", "-"]
    assert rows["quiz (EMA), accuracy of 1,000 questions"] == ["0.9000", "-", "-"]
    assert [one.value for one in read_evaluations(first)] == [0.2, 1.25, 0.9, 0.3]
    assert read_evaluations(first)[-1].error == 0.01
    assert read_evaluations(tmp_path) == []
    harness = {
        "source": "lm_eval",
        "dataset": "arc",
        "questions": 40,
        "metrics": {"acc": 0.5, "f1": 0.25},
        "errors": {"acc": 0.1},
    }
    evaluated(
        first, {**harness, "step": 2, "fewshot": 5}, {**harness, "step": 2, "fewshot": 0, "metrics": {"acc": 0.75}}
    )
    found = {one.name: (one.value, one.error) for one in read_evaluations(first)}
    assert found == {
        "arc (5-shot), acc of 40 questions": (0.5, 0.1),
        "arc (5-shot), f1 of 40 questions": (0.25, None),
        "arc, acc of 40 questions": (0.75, 0.1),
    }
    with MetricsWriter(second / "metrics.jsonl") as writer:  # the run answers other questions itself
        for step, share in ((1, 0.5), (2, 0.75)):
            asked = {"task": "own", "dataset": "own.jsonl", "questions": 8, "accuracy": share, "accuracy_error": 0.1}
            writer.row("task", step=step, tokens=step, attempt=1, **asked)
    assert compared(capsys, first, second)["own, accuracy of 8 questions"] == ["-", "0.7500", "-"]
