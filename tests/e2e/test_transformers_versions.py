"""Exports in the transformers versions that people have: each in its own environment, kept in the user's cache.

In a process of that version each export is loaded, its card's example is run as it stands, and ids and logits are
compared with megalm's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.huggingface.export_model import export_checkpoint, plan_export
from tests.distributed.selection import selected
from tests.e2e.cached_packages import cached_packages
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, megalm
from tests.huggingface_models import FAMILIES, SECTIONS, random_model, save_model

pytestmark = pytest.mark.e2e

# Each with the newest releases of two packages that it accepts; the others are those of the development environment.
VERSIONS = {
    "4.46.3": ("tokenizers==0.20.3", "huggingface_hub==0.26.5"),
    "4.57.6": ("tokenizers==0.22.2", "huggingface_hub==0.36.0"),
    "development": (),
}
UNKNOWN_THERE = {"4.46.3": ("qwen3", "olmo3", "gemma3_text", "qwen3_moe")}  # came later
KINDS = {**SECTIONS, **FAMILIES}
MODELS = ("llama-gqa-tied", "qk-norm", "gpt2", "olmo3", "gemma3_text", "gpt_neox", "mixtral", "qwen3_moe", "olmoe")
PROMPT = [(7 * place + place**2) % 250 for place in range(24)]  # beyond windows and the first positions
TEXTS = ["Once", "def f(x):\n    return x  # na\u00efve\n", " \t 1234567890"]
TRANSLATION = """
import contextlib, io, json, re, sys
import torch, transformers

transformers.logging.set_verbosity_error()
found = {}
for folder in sys.argv[3:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = json.loads(sys.argv[1])
    kept = [tokenizer(text + tokenizer.eos_token) for text in texts]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    facts = {"ids": [row["input_ids"] for row in kept], "keys": sorted(kept[0]), "chat": chat, "length": len(tokenizer)}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    except ValueError as error:
        facts["unknown"] = str(error)
    else:
        with torch.no_grad():
            facts["logits"] = model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()
        with open(folder + "/README.md") as card:
            example = re.search("```python\\n(.*?)```", card.read(), re.S)[1].replace("PATH", folder)
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            exec(compile(example, "the card", "exec"), {})
        facts["written"] = written.getvalue()
    found[folder] = facts
print(json.dumps({"version": transformers.__version__, "found": found}))
"""


def environment(version: str, require: Any) -> dict[str, str]:
    """With this version of transformers before the installed one."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # all versions run at once
    if not VERSIONS[version]:
        return alone
    packages = (f"transformers=={version}", *VERSIONS[version])
    return {**alone, "PYTHONPATH": str(cached_packages(f"transformers-{version}", packages, require))}


@pytest.fixture(scope="module")
def exports(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[Any, torch.Tensor]]:
    """Exported folder -> the tokenizer that the run had, and the logits of PROMPT; one is by the real command, and the
    documents of one began with a token."""
    place = tmp_path_factory.mktemp("versions")
    (place / "chat.jinja").write_text(
        "{% for message in messages %}<{{ message['content'] }}>{% endfor %}{{ eos_token }}"
    )
    made = {}
    for name, tokenizer in [*((name, "bytes") for name in MODELS), ("llama", str(small_data.tokenizer))]:
        rows = load_tokenizer(tokenizer).vocab_size + 3
        section = KINDS[name].model_copy(update={"vocab_size": rows})
        shape, model = random_model(section, vocab_size=rows)
        bos_token = "<eod>" if name == "gpt2" else None
        used = load_tokenizer(tokenizer, bos_token=bos_token)
        checkpoint = save_model(place / f"run-{name}" / "checkpoints", shape, model, tokenizer, bos_id=used.bos_id)
        if tokenizer == "bytes":
            plan = plan_export(CheckpointReader(checkpoint), place / name, torch.float32, None, place / "chat.jinja")
            export_checkpoint(plan, 1 << 40, name, lambda: None)
        else:
            words = ("export", f"run-{name}", name, "--chat-template", "chat.jinja")
            finished = finish(place, megalm(*words))
            assert finished.code == 0, finished.explain()
        with torch.no_grad():
            made[place / name] = used, model(torch.tensor([PROMPT]))[0]
    return made


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, exports: dict[Path, Any], require: Any) -> dict[str, dict[str, Any]]:
    """Version -> what its process says; all at once."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        TRANSLATION,
        json.dumps(TEXTS),
        json.dumps(PROMPT),
        *map(str, exports),
    ]
    running = {
        version: subprocess.Popen(
            command,
            env=environment(version, require),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in selected(request, "version")
    }
    ended = {version: process.communicate(timeout=300) for version, process in running.items()}
    for version, (_, errors) in ended.items():
        assert running[version].returncode == 0, (version, errors[-3000:])
    return {version: json.loads(out.splitlines()[-1]) for version, (out, _) in ended.items()}


# The one between the oldest and the newest is slow.
@pytest.mark.parametrize("version", ["4.46.3", pytest.param("4.57.6", marks=pytest.mark.slow), "development"])
def test_an_export_works_in(version: str, exports: dict[Path, Any], loaded: dict[str, Any]) -> None:
    facts = loaded[version]
    assert facts["version"] == version or version == "development"
    for folder, (ours, logits) in exports.items():
        found = facts["found"][str(folder)]
        expected = [[*ours.begun(ids).tolist(), ours.eod_id] for ids in ours.encode_batch(TEXTS)]
        assert found["ids"] == expected, (folder.name, "a text's ids, and the end of a document written in it")
        assert found["keys"] == ["attention_mask", "input_ids"], "what the example passes to the model"
        assert found["length"] == ours.vocab_size + (ours.spec == "bytes"), (
            "a free row is the padding, where nothing else is"
        )
        assert found["chat"] == f"<hello>{ours.eod_token}"
        if "unknown" in found:
            assert json.loads((folder / "config.json").read_text())["model_type"] in UNKNOWN_THERE[version]
            continue
        assert torch.allclose(torch.tensor(found["logits"]), logits, atol=1e-5), folder.name
        assert found["written"].startswith(f"{ours.bos_token or ''}Once"), "the card's own example"
