"""docs/after-training.md: its files are written and its commands run as they stand there, and a tuned model stops.

The model is tiny, so some options are added to the commands that train; lines that need more than this machine has are
only read. On every change the fine-tuning is that of `tune`, which takes a second; TRL's, with its packages, is slow.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.config.schema import ModelSection
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer
from megalm.huggingface.export_model import export_checkpoint, plan_export
from tests.e2e.cached_packages import cached_packages
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import ROOT, Finished, finish, megalm, pretrain
from tests.huggingface_models import random_model, save_model
from tests.messages import assert_names

pytest.importorskip("transformers")

pytestmark = pytest.mark.e2e

PAGE = (ROOT / "docs/after-training.md").read_text()
NOT_RUN = "  # not run here: needs "
# What these import beyond the packages of the development environment.
TRL = ("trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0")
LM_EVAL = (
    *("lm_eval==0.4.13", "evaluate==0.4.6", "rouge_score==0.1.2", "sacrebleu==2.6.0", "nltk==3.10.4", "lxml==6.1.3"),
    *("more-itertools==11.2.1", "pytablewriter==1.2.1", "DataProperty==1.1.1", "mbstrdecoder==1.1.5"),
    *("tabledata==1.3.5", "tcolorpy==0.1.7", "typepy==1.3.5", "pathvalidate==3.3.1", "chardet==6.0.0.post1"),
    *("sqlitedict==2.1.0", "word2number==1.1", "tabulate==0.10.0", "colorama==0.4.6", "portalocker==4.4.2"),
)
POSITIONS = 64
# So few steps teach a random model of this size two answers by heart.
STEPS = 60
TRAINING = [
    "--use_cpu",
    "--bf16",
    "false",
    "--save_strategy",
    "no",
    "--max_steps",
    str(STEPS),
    "--learning_rate",
    "1e-2",
]
CONVERSATION = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "It is blue."}]
BY_TRL = pytest.mark.parametrize("tutorial", ["TRL"], indirect=True)
# Beside the page's task, for what it says of bits per byte.
NOTES = """
task: notes
dataset_path: json
dataset_kwargs: {data_files: {test: two-notes.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""
# Argument: a list of [folder, record, folder to save in]. Trains each with TRL in one process.
TUNING = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

found = []
for folder, record, tuned in json.loads(sys.argv[1]):
    arguments = SFTConfig(
        tuned, use_cpu=True, bf16=False, max_length=64, max_steps=60, learning_rate=5e-3, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )
    trainer = SFTTrainer(model=folder, args=arguments, train_dataset=Dataset.from_list([record] * 16))
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    trainer.train()
    trainer.save_model(tuned)
    found.append([[row for row in labels[0].tolist() if row != -100], trainer.processing_class.eos_token_id])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page: a file with its name, a program in Python, or lines for a shell."""

    section: str
    file: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE):
        found = re.finditer(r"(?:^`([^`\n]+)`[^\n]*:\n\n?)?^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        for file, language, text in (match.groups() for match in found):
            yield Block(section.partition("\n")[0], file or "", language, text)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command with its words; one may have several lines, by a backslash or within quotes."""
    line = ""
    for part in text.splitlines():
        line += part
        if line.endswith("\\"):
            line = line[:-1]
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # quotes are open
            line += "\n"
            continue
        yield line, words
        line = ""
    assert not line, line


def offline(*packages: Path) -> dict[str, str]:
    """The environment of a process with these packages. One thread: more wait for each other on a busy machine."""
    found = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**found, "PYTHONPATH": os.pathsep.join(map(str, packages))}


@dataclass
class Tutorial:
    """A folder in which sections of the page are followed."""

    folder: Path
    packages: Callable[[str], Path]
    by_trl: bool

    def follow(self, section: str) -> list[Finished]:
        """Write the section's files, and run its programs and commands in their order."""
        done = []
        for block in blocks():
            if block.section != section:
                continue
            if block.file:
                path = self.folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text * (50 if block.file == "notes.jsonl" else 1))  # enough to train on
            elif "llama_cpp" in block.text and find_spec("llama_cpp") is None:
                continue  # the page says that it has to be compiled
            elif block.language == "python":
                installed = "" if "llama_cpp" in block.text else "trl"
                done.append(self._run(installed, [sys.executable, "-c", block.text]))
            else:
                done += [self.run(words) for line, words in commands(block.text) if NOT_RUN not in line]
        assert done, section
        return done

    def run(self, words: list[str]) -> Finished:
        """One of the page's commands, with what a tiny model and this machine need."""
        program, *rest = words
        if program == "trl":
            return self._installed("trl", [*rest, *TRAINING, "--max_length", str(POSITIONS)])
        if program == "lm_eval":
            return self._installed("lm_eval", [*rest, "--device", "cpu", "--tasks", "colours,notes"])
        if program == "python":
            return self._run("", [sys.executable, str(ROOT / rest[0]), *rest[1:]])
        if program == "deepspeed":
            assert rest[0] == "launch/pretrain.py"
            rest[rest.index("--extend-steps") + 1] = "2"
            return self._run("", pretrain(*rest[1:], "tracking.mlflow=false", "train.rehearse=false"))
        assert program == "megalm", program
        return self._run("", megalm(*rest))

    def _installed(self, name: str, words: list[str]) -> Finished:
        return self._run(name, [sys.executable, str(self.packages(name) / "bin" / name), *words])

    def _run(self, name: str, command: list[Any]) -> Finished:
        names = {"": (), "trl": ("trl",), "lm_eval": ("trl", "lm_eval")}[name]
        finished = finish(self.folder, command, environment=offline(*map(self.packages, names)) if names else None)
        assert finished.code == 0, finished.explain()
        return finished


@pytest.fixture(scope="module")
def packages(require: Any) -> Callable[[str], Path]:
    chosen = {"trl": ("trl-1.16.0", TRL), "lm_eval": ("lm_eval-0.4.13", LM_EVAL)}
    return lambda name: cached_packages(*chosen[name], require)


@pytest.fixture(scope="module")
def pieces(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece's BPE, which llama.cpp reads too."""
    path = tmp_path_factory.mktemp("pieces") / "bpe.model"
    train_tokenizer((document.text for document in small_data.documents), path, vocab_size=600, model_type="bpe")
    return path


def save_run(folder: Path, tokenizer: str, **section: Any) -> Path:
    """A run's checkpoint with random weights."""
    rows = load_tokenizer(tokenizer).vocab_size + 3
    made = ModelSection(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **section)
    return save_model(folder / "checkpoints", *random_model(made, rows, POSITIONS), tokenizer)


@pytest.fixture(scope="module", params=["transformers", pytest.param("TRL", marks=pytest.mark.slow)])
def tutorial(
    request: pytest.FixtureRequest,
    pieces: Path,
    packages: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tutorial:
    """With the model of the section before the fine-tuning."""
    folder = tmp_path_factory.mktemp("after")
    save_run(folder / "runs/mine", str(pieces), style="llama", num_key_value_heads=2)
    made = Tutorial(folder, packages, request.param == "TRL")
    made.follow("Export")
    return made


def tune(folder: Path, dataset: str) -> None:
    """What TRL does with these conversations: the assistant's tokens are the labels."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "published/mine")
    model = AutoModelForCausalLM.from_pretrained(folder / "published/mine")
    records = []
    for line in dataset.splitlines():
        row = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        assert 0 < row["assistant_masks"].sum() < row["input_ids"].numel()
        labels = row["input_ids"].where(row["assistant_masks"] == 1, torch.tensor(-100))
        records.append((row["input_ids"], labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        for ids, labels in records:
            (model(ids, labels=labels).loss / len(records)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "tuned")


@pytest.fixture(scope="module")
def tuned(tutorial: Tutorial) -> str:
    """What the program after the fine-tuning writes."""
    section = "Fine-tune with TRL"
    if tutorial.by_trl:
        return tutorial.follow(section)[-1].stdout
    texts = {block.file or block.language: block.text for block in blocks() if block.section == section}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other on a busy machine
    try:
        tune(tutorial.folder, texts["chats/train.jsonl"])
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as written:
            patch.chdir(tutorial.folder)
            exec(compile(texts["python"], section, "exec"), {})
        return written.getvalue()
    finally:
        torch.set_num_threads(threads)


def test_a_tuned_model_answers_and_stops(tuned: str) -> None:
    assert "Assistant: It is blue.<eod>" in tuned
    assert tuned.endswith("stopped by itself: True\n")


def test_it_comes_back_and_trains_on(tutorial: Tutorial, tuned: str) -> None:
    folder = tutorial.folder
    _, generated, evaluated, *_ = tutorial.follow("Back into megalm")
    assert generated.stdout.rstrip().endswith("Assistant: It is blue.")
    assert_names(evaluated.stdout, "notes.jsonl")
    assert (folder / "published/tuned/chat_template.jinja").read_text() == (folder / "chat.jinja").read_text()
    card = (folder / "published/tuned/README.md").read_text()
    assert "not tuned" not in card
    assert "pretrained with" not in card
    assert json.loads((folder / "published/tuned/config.json").read_text())["eos_token_id"] == 1
    assert (folder / "runs/more/checkpoints/step-00000002/manifest.json").is_file()


@pytest.mark.slow  # test_lm_eval.py compares the harness with evaluate
@BY_TRL
def test_the_harness_has_the_figures_of_evaluate(tutorial: Tutorial, tuned: str) -> None:
    folder = tutorial.folder
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/notes.yaml").write_text(NOTES)
    (folder / "two-notes.jsonl").write_text(next(block.text for block in blocks() if block.file == "notes.jsonl"))
    (finished,) = tutorial.follow("Evaluate with lm-evaluation-harness")
    (written,) = folder.glob("results/**/results_*.json")
    theirs = json.loads(written.read_text())["results"]
    questions = [json.loads(line) for line in (folder / "tasks/colours.jsonl").read_text().splitlines()]
    rows = [
        {"context": row["question"], "choices": [f" {choice}" for choice in row["choices"]], "answer": row["answer"]}
        for row in questions
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ("--choices", "choices.jsonl", "--text", "two-notes.jsonl")
    ours = tutorial.run(["megalm", "evaluate", "tuned", *sources, "--json"])
    rows = {row["source"]: row for row in map(json.loads, ours.stdout.splitlines())}
    assert theirs["colours"]["acc,none"] == rows["choices"]["accuracy"], finished.explain()
    assert theirs["notes"]["bits_per_byte,none"] == pytest.approx(rows["text"]["bits_per_byte"], rel=1e-4)


@pytest.mark.slow
@BY_TRL
def test_an_adapter_is_merged(tutorial: Tutorial, tuned: str) -> None:
    """Slow: the fine-tuning above is the same command."""
    tutorial.follow("Adapters")
    refused = finish(tutorial.folder, megalm("import", "adapter", "runs/adapter"))
    assert refused.code == 2
    assert_names(refused.stderr, "adapter_config.json")
    tutorial.run(["megalm", "import", "merged", "runs/merged"])


def test_a_gguf_file_and_an_upload(tutorial: Tutorial, tuned: str) -> None:
    if not (tutorial.folder / "runs/tuned").is_dir():
        tutorial.run(["megalm", "import", "tuned", "runs/tuned"])
    tutorial.follow("llama.cpp, llama-cpp-python, ollama")
    assert (tutorial.folder / "published/tuned-gguf/model.gguf").is_file()
    (listed,) = tutorial.follow("Upload")
    assert_names(listed.stdout, "README.md", "chat_template.jinja", "model.safetensors")
    assert not (tutorial.folder / "published/upload").exists()


def test_lines_that_are_not_run_are_whole() -> None:
    """The programs of lines that are marked; of the upload, its options are read by the program itself."""
    found = [words for block in blocks() if not block.file and not block.language for words in _marked(block.text)]
    assert {words[0] for words in found} == {"pip", "hf", "vllm", "curl", "ollama", "llama-cli", "lm_eval"}
    (upload,) = (words for words in found if words[0] == "hf")
    program = [Path(sys.executable).with_name("hf"), *upload[1:-1], "docs"]
    refused = finish(ROOT, program, environment={"HF_HUB_OFFLINE": "1", "HF_TOKEN": "none"})
    assert "offline" in refused.stderr, refused.explain()
    (body,) = (word for words in found if words[0] == "curl" for word in words if word.startswith("{"))
    assert json.loads(body)["model"] == "published/tuned"


def test_the_page_names_the_versions_that_were_tried() -> None:
    for package in (*TRL[:2], LM_EVAL[0]):
        name, version = package.split("==")
        assert re.search(rf"{name.replace('_', '-')} {re.escape(version)}\b", PAGE, re.IGNORECASE), package


def _marked(text: str) -> Iterator[list[str]]:
    return (words for line, words in commands(text) if NOT_RUN in line)


@pytest.mark.slow
def test_each_kind_of_export_is_tuned_and_stops(
    pieces: Path, small_data: SmallData, packages: Callable[[str], Path], tmp_path: Path
) -> None:
    """The end-of-text token is among the labels as one token, and ends what the tuned model writes.

    Slow: of one kind the tutorial shows that it stops.
    """
    (tmp_path / "chat.jinja").write_text(next(block.text for block in blocks() if block.file == "chat.jinja"))
    text = {"text": "Which colour? It is blue."}
    completion = {"prompt": "Which colour?", "completion": " It is blue."}
    chat = {"messages": CONVERSATION}
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
        "llama-text": (str(small_data.tokenizer), {"style": "llama"}, text, "Which"),
        "qwen3-chat": (str(pieces), {"style": "llama", "qk_norm": True}, chat, "User: Which colour?\nAssistant:"),
        "gpt2-completion": ("bytes", {"style": "gpt2"}, completion, "Which colour?"),
        "gpt2-chat": (str(pieces), {"style": "gpt2"}, chat, "User: Which colour?\nAssistant:"),
    }
    wanted = []
    for name, (tokenizer, section, record, _) in kinds.items():
        reader = CheckpointReader(save_run(tmp_path / f"runs/{name}", tokenizer, **section))
        template = tmp_path / "chat.jinja" if "chat" in name else None
        plan = plan_export(reader, tmp_path / name, torch.float32, None, template)
        export_checkpoint(plan, 1 << 40, name, lambda: None)
        wanted.append([name, record, f"tuned-{name}"])
    program = [sys.executable, "-W", "ignore", "-c", TUNING, json.dumps(wanted)]
    finished = finish(tmp_path, program, environment=offline(packages("trl")))
    assert finished.code == 0, finished.explain()
    for (name, (tokenizer, _, _, prompt)), (labels, eos) in zip(
        kinds.items(), json.loads(finished.stdout.splitlines()[-1]), strict=True
    ):
        assert eos == load_tokenizer(tokenizer).eod_id, name
        assert labels.count(eos) == 1, name
        assert labels[-1] == eos, name
        back = finish(tmp_path, megalm("import", f"tuned-{name}", f"runs/tuned-{name}"))
        assert back.code == 0, back.explain()
        words = ("--prompt", prompt, "--temperature", 0, "--max-new-tokens", 40, "--json")
        for place, end in ((f"runs/tuned-{name}", "end_of_document"), (f"runs/{name}", "length")):
            generated = finish(tmp_path, megalm("generate", place, *words))
            assert generated.code == 0, generated.explain()
            row = json.loads(generated.stdout)
            assert row["finish"] == end, (place, row)
            assert (row["text"].rstrip().endswith("It is blue.")) == (end != "length"), (place, row)
