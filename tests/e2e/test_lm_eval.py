"""`megalm evaluate --tasks` with the real lm-evaluation-harness, whose own `hf` model gives the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalm.data.tokenizers.tokenizer import load_tokenizer
from tests.e2e.cached_packages import cached_packages
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, megalm

pytestmark = pytest.mark.e2e

# What lm-eval imports for such tasks and the development environment lacks; its other requirements are for other tasks.
PACKAGES = (
    *("lm_eval==0.4.13", "datasets==5.2.0", "dill==0.4.1", "xxhash==4.1.0", "multiprocess==0.70.19"),
    *("more-itertools==11.2.1", "sqlitedict==2.1.0", "evaluate==0.4.6", "sacrebleu==2.6.0", "portalocker==3.2.0"),
    *("tabulate==0.10.0", "colorama==0.4.6", "lxml==6.1.3"),
)
PICK = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
fewshot_split: test
num_fewshot: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST = """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""
WHOLE = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITE = """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
TASKS = {"pick": PICK, "last": LAST, "whole": WHOLE, "write": WRITE}
# The harness asks both models the same, and says what each answered. Then the command itself, with these imports.
COMPARISON = """
import contextlib, io, json, sys
from pathlib import Path
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from megalm.cli.main import main
from megalm.errors import MegalmError
from megalm.inference.inference_model import InferenceModel
from megalm.inference.lm_eval_tasks import HarnessModel, ask, load_tasks

exported, folder, *wrong = sys.argv[1:]
theirs = HFLM(pretrained=exported, device="cpu", dtype="float32", batch_size=3)
manager = TaskManager(include_path=folder, include_defaults=False)
expected = simple_evaluate(theirs, tasks=manager.all_tasks, task_manager=manager, bootstrap_iters=0)
# With the tokenizer of the hf model: SentencePiece's own may choose another of two equally likely segmentations.
ours = HarnessModel(InferenceModel(Path(exported), f"{exported}/tokenizer.json"), 4, lambda count: None)
found = ask(ours, load_tasks([folder], [], None), bootstrap_iters=0)
refused = {}
for word in wrong:
    try:
        load_tasks([word], [Path(folder)], None)
    except MegalmError as error:
        refused[word] = [type(error).__name__, str(error)]


def answers(result):
    return {
        task: [each["resps"] for each in sorted(samples, key=lambda each: each["doc_id"])]
        for task, samples in result["samples"].items()
    }


said = io.StringIO()
with contextlib.redirect_stdout(said):
    try:
        main(COMMAND)
    except SystemExit as end:
        assert end.code in (None, 0), end.code
rows = [json.loads(line) for line in said.getvalue().splitlines()]
print(json.dumps([answers(expected), answers(found), expected["results"], refused, ours.cut, rows]))
"""


COMMAND = (
    *("evaluate", "mine", "--tasks", "pick,tasks/whole.yaml", "--include-path", "tasks"),
    *("--every-checkpoint", "--plot", "p.png", "--json"),
)


@pytest.fixture(scope="module")
def environment(require: Any) -> dict[str, str]:
    packages = str(cached_packages("lm-eval-tasks-0.4.13", PACKAGES, require))
    return {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(six_steps: Path, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, its export, and tasks whose texts both tokenizers cut alike."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "runs").symlink_to(six_steps / "runs")
    finished = finish(folder, megalm("export", "mine", "exported"))
    assert finished.code == 0, finished.explain()
    ours, theirs = (load_tokenizer(path) for path in (small_data.tokenizer, folder / "exported/tokenizer.json"))
    rows = []
    for document in small_data.documents:
        text = document.text
        row = {"context": text[:60], "choices": [text[60:80], "%#" * 5, text[500:530]], "answer": 0, "text": text[:400]}
        texts = [row["text"], *(row["context"] + choice for choice in row["choices"])]
        pairs = zip(ours.encode_batch(texts), theirs.encode_batch(texts), strict=True)
        if len(text) > 600 and all(one.tolist() == other.tolist() for one, other in pairs):
            rows.append(row)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks}/data.jsonl}}}}\ntest_split: test"
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")
    (folder / "far.yaml").write_text(f"task: far\ndataset_path: nobody/nothing\ntest_split: test{LAST}")
    return folder


@pytest.fixture(scope="module")
def compared(folder: Path, environment: dict[str, str]) -> list[Any]:
    words = [str(folder / "exported"), str(folder / "tasks"), "far.yaml", "absent.yaml", "pikc"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPARISON.replace("COMMAND", repr(COMMAND)), *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def numbers(resps: list[Any]) -> list[tuple[float, object]]:
    """(log-likelihood, whether it is greedy) of each request of a question; rolling ones have the first alone."""
    return [(float(one[0][0]), one[0][1]) if isinstance(one[0], list) else (float(one[0]), None) for one in resps]


def test_answers_are_those_of_the_harness_own_model(compared: list[Any]) -> None:
    expected, found, _, _, cut, _ = compared
    assert found.keys() == expected.keys() == TASKS.keys()
    assert found["write"] == expected["write"], "the same texts, to the letter"
    assert any(text for ((text,),) in found["write"])
    for task in ("pick", "last", "whole"):
        for one, other in zip(found[task], expected[task], strict=True):
            for (score, is_greedy), (their_score, is_theirs) in zip(numbers(one), numbers(other), strict=True):
                assert score == pytest.approx(their_score, abs=1e-4)
                assert is_greedy == is_theirs
    assert cut > 0, "one of the prompts with an example exceeds 64 tokens"


def test_what_cannot_be_loaded_is_named(compared: list[Any]) -> None:
    refused = compared[3]
    assert {word: kind for word, (kind, _) in refused.items()} == {
        "far.yaml": "DataError",
        "absent.yaml": "DataError",
        "pikc": "ConfigError",
    }
    assert "nobody/nothing" in refused["far.yaml"][1]
    assert "'pick'" in refused["pikc"][1]
    assert all("\n" not in text for _, text in refused.values())


def test_the_command_records_and_draws_every_checkpoint(folder: Path, compared: list[Any]) -> None:
    rows = compared[5]
    assert [(row["step"], row["task"], row["source"]) for row in rows] == [
        (step, task, "lm_eval") for step in (3, 6) for task in ("pick", "whole")
    ]
    assert (rows[2]["fewshot"], rows[2]["questions"]) == (1, 12)
    theirs = compared[2]
    for metric in ("acc", "acc_norm"):
        assert rows[2]["metrics"][metric] == theirs["pick"][f"{metric},none"]
        assert 0 < rows[2]["errors"][metric] < 0.5
    assert rows[3]["metrics"]["bits_per_byte"] == pytest.approx(theirs["whole"]["bits_per_byte,none"], abs=1e-5)
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    recorded = (folder / "runs/mine/evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in recorded][-4:] == rows
