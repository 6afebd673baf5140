"""A run is published and taken over by the commands: transformers says the same, and training goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

from megalm.config.loading import load_run_config
from megalm.data.builder.builder import build_dataset
from megalm.data.readers.document_reader import Document
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.planning.batch_size import TrainingStages
from megalm.runs.metrics_log import read_metrics
from megalm.train.datasets import find_data, open_datasets
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, megalm, own_lines, pretrain
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.e2e

PROMPT = "    def "
STEPS = 6


def run(folder: Path, *words: object) -> Finished:
    return finish(folder, megalm(*words))


@pytest.fixture(scope="module")
def folder(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With runs/mine, which has trained a little, and its export in `published`."""
    place = tmp_path_factory.mktemp("publishing")
    trained = finish(place, pretrain(*small_data.words, "run.name=mine", f"train.steps={STEPS}"))
    assert trained.code == 0, trained.explain()
    exported = run(place, "export", "runs/mine", "published", "--name", "small-one", "--max-shard-size", "100KB")
    assert exported.code == 0, exported.explain()
    assert own_lines(exported.stderr) == []
    return place


@pytest.fixture(scope="module")
def imported(folder: Path) -> Finished:
    finished = run(folder, "import", "published", "runs/base")
    assert finished.code == 0, finished.explain()
    return finished


def test_transformers_goes_on_as_megalm_generate_does(folder: Path, small_data: SmallData) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "published").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "published")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == load_tokenizer(small_data.tokenizer).encode_batch([PROMPT])[0].tolist()
    told = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    words = ("--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 20)
    ours = run(folder, "generate", "runs/mine", *words)
    assert ours.stdout.rstrip("\n") == tokenizer.decode(told, skip_special_tokens=True).rstrip("\n"), ours.explain()


def test_the_card_says_what_the_run_knows(folder: Path, small_data: SmallData) -> None:
    card = (folder / "published/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert "license" not in matter
    assert "# license: " in front
    rows = list(read_metrics(folder / "runs/mine/metrics.jsonl"))
    validation = [row for row in rows if row["kind"] == "eval"][-1]
    tokens = STEPS * 16 * 64
    for words in (
        "# small-one\n",
        f"{tokens:,} in {STEPS} steps",
        f"| dataset | {small_data.prefix.name} |",
        f"loss {validation['loss']:.4f}",
        f"{validation['bits_per_byte']:.3f} bits per byte ({validation['targets']:,} tokens)",
        "16 sequences of 64 tokens",
        "AdamW",
        "beginning-of-sequence token",
    ):
        assert words in body, words
    epochs = next(line for line in body.splitlines() if line.startswith("| epochs |"))
    share, whole = float(epochs.split()[3]), int(epochs.split()[5].replace(",", ""))
    assert share == pytest.approx(tokens / whole, abs=0.005)
    assert str(small_data.prefix.parent) not in card, "paths of this machine are nobody's business"


def test_training_goes_on_from_an_imported_model(folder: Path, small_data: SmallData, imported: Finished) -> None:
    """By the command that it tells, with this data: the first loss is what transformers has for these weights."""
    (line,) = (line for line in imported.stdout.splitlines() if "launch/pretrain.py" in line)
    told = line.split("launch/pretrain.py ", 1)[1].split()
    told[told.index("--extend-steps") + 1] = "3"
    told[told.index("run.name=NAME")] = "run.name=mine-2"
    told[told.index("data.train=data/mine")] = f"data.train={small_data.prefix}"
    finished = finish(folder, pretrain(*told, "evaluate.interval_steps=null", "tracking.mlflow=false"))
    assert finished.code == 0, finished.explain()
    rows = [row for row in read_metrics(folder / "runs/mine-2/metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] == pytest.approx(
        _loss_of_first_batch(folder / "runs/mine-2", folder / "published"), abs=2e-5
    )
    again = finish(folder, pretrain("run.name=mine-2", "--resume", "auto", "train.steps=5"))
    assert again.code == 0, again.explain()
    exported = run(folder, "export", "runs/mine-2", "second")
    assert exported.code == 0, exported.explain()
    assert "| starts from | the weights of base, step-00000000 |" in (folder / "second/README.md").read_text()


def test_documents_that_begin_with_a_token(folder: Path, small_data: SmallData, imported: Finished) -> None:
    """From a model that knows none: the run says so, and transformers has the ids and text of what it trained."""
    tokenizer = load_tokenizer(small_data.tokenizer, bos_token="<eod>")
    build_dataset(small_data.documents[:40], tokenizer, folder / "begun-data")
    words = ("--config", "runs/base/model.yaml", "data.train=begun-data", "data.sequence_length=64", "run.name=begun")
    start = ("--resume", "runs/base/checkpoints/step-00000000", "--extend-steps", 1, "--extend-strategy", "weights")
    trained = finish(folder, pretrain(*words, *start, "tracking.mlflow=false"))
    assert trained.code == 0, trained.explain()
    (note,) = (line for line in trained.stdout.splitlines() if "note: documents begin" in line)
    assert_names(note, "<eod>", tokenizer.bos_id)
    exported = run(folder, "export", "runs/begun", "begun")
    assert exported.code == 0, exported.explain()
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "begun")
    inputs = theirs(PROMPT, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [tokenizer.bos_id, *tokenizer.encode_batch([PROMPT])[0].tolist()]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "begun").eval()
    told = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    ours = run(folder, "generate", "runs/begun", "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 20)
    assert ours.stdout.rstrip("\n") == theirs.decode(told, skip_special_tokens=True).rstrip("\n"), ours.explain()


@pytest.mark.slow
def test_an_import_with_more_tokens_trains_resumes_and_is_exported(folder: Path, small_data: SmallData) -> None:
    added = ["<tool>", "<|user|>"]
    (folder / "more.txt").write_text("\n".join(added))
    grown = run(folder, "import", "published", "runs/grown", "--add-tokens", "more.txt", "--new-rows", "copy:<eod>")
    assert grown.code == 0, grown.explain()
    assert_names(grown.stdout, "'<tool>'", "'<|user|>'", "copy:<eod>")
    tokenizer = load_tokenizer(folder / "runs/grown/tokenizer.json")
    texts = [f"{added[number % 2]} def f{number}(x):\n    return x + {number}\n" * 4 for number in range(200)]
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    build_dataset(documents, tokenizer, folder / "grown-data")
    words = (
        "--config",
        "runs/grown/model.yaml",
        "data.train=grown-data",
        "data.split=90,10",
        "data.sequence_length=64",
    )
    start = ("--resume", "runs/grown/checkpoints/step-00000000", "--extend-steps", 2, "--extend-strategy", "weights")
    trained = finish(folder, pretrain(*words, "run.name=longer", *start))
    assert trained.code == 0, trained.explain()
    resumed = finish(folder, pretrain("run.name=longer", "--resume", "auto", "train.steps=3"))
    assert resumed.code == 0, resumed.explain()
    exported = run(folder, "export", "runs/longer", "grown")
    assert exported.code == 0, exported.explain()
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "grown")
    assert theirs(texts[0])["input_ids"] == tokenizer.encode_batch([texts[0]])[0].tolist()
    assert set(theirs.convert_tokens_to_ids(added)) == {tokenizer.vocab_size - 2, tokenizer.vocab_size - 1}
    refused = run(folder, "import", "published", "runs/none", "--add-tokens", "more.txt", "--new-rows", "copy:<eos>")
    assert refused.code == 2
    (line,) = own_lines(refused.stderr)
    assert_names(line, "--new-rows", "copy:<eos>")


def _loss_of_first_batch(run: Path, published: Path) -> float:
    """In transformers, over the samples that the run reads in step 1."""
    config = load_run_config(str(run / "config.yaml"), []).config
    batch = json.loads((run / "deepspeed.resolved.json").read_text())["train_batch_size"]
    data = open_datasets(config, TrainingStages.of(config, batch), find_data(config.data, lambda line: None))
    inputs, labels = (
        np.stack(rows) for rows in zip(*(data.train.sample(index) for index in range(batch)), strict=True)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(published).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs.astype(np.int64))).logits
    return float(functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels.astype(np.int64)).flatten()))


def test_weights_alone_are_no_training_state(folder: Path, small_data: SmallData, imported: Finished) -> None:
    words = ("--config", "runs/base/model.yaml", *small_data.words[:1], "data.split=90,10", "data.sequence_length=64")
    before = sorted((folder / "runs/base").rglob("*"))
    for resume in (("run.name=base", "--resume", "auto"), ("run.name=new", "--resume", "runs/base/checkpoints/latest")):
        refused = finish(folder, pretrain(*words, *resume))
        assert refused.code == 2, refused.explain()
        (line,) = own_lines(refused.stderr)
        assert "--extend-strategy weights" in line
    assert not (folder / "runs/new").exists()
    assert sorted((folder / "runs/base").rglob("*")) == before, "an imported model stays as it is"


def test_what_cannot_be_done_is_refused_in_one_line(folder: Path) -> None:
    config = folder / "published/config.json"
    stated = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(stated), "rope_scaling": {"type": "linear", "factor": 2.0}}))
        refused = run(folder, "import", "published", "runs/other")
    finally:
        config.write_text(stated)
    full = run(folder, "export", "runs/mine", "published")
    nowhere = run(folder, "export", "runs/mime", "elsewhere")
    for finished, words in (
        (refused, "rope_scaling={'type': 'linear', 'factor': 2.0}"),
        (full, "published"),
        (nowhere, "runs/mime"),
    ):
        assert finished.code == 2, finished.explain()
        (line,) = own_lines(finished.stderr)
        assert line.startswith("megalm: ")
        assert words in line
    assert not (folder / "runs/other").exists()
    assert not (folder / "elsewhere").exists()
