"""Universal checkpoints in the layouts that DeepSpeed writes; what is wrong with one is named, and nothing is run.

That DeepSpeed writes these layouts is shown by tests/distributed/test_universal_checkpoints.py.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.shard_spec import WEIGHTS, WEIGHTS_AND_MOMENTS
from megalm.cli.import_ import command
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.huggingface import torch_file
from megalm.huggingface.config_json import to_config
from megalm.huggingface.export_tokenizer import write_tokenizer
from megalm.huggingface.import_model import import_model
from megalm.huggingface.torch_file import load_torch_file
from megalm.huggingface.universal_checkpoint import UniversalCheckpoint
from megalm.huggingface.weight_mapping import HFTensor, hf_tensors, to_hf
from megalm.utils.atomic_files import write_json
from tests.huggingface_models import FAMILIES, SECTIONS, random_model
from tests.messages import assert_names

STEP = 12
KINDS = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
Values = dict[tuple[str, str], torch.Tensor]


def value(weights: dict[str, torch.Tensor], name: str, kind: str) -> torch.Tensor:
    """Moments that differ from the weights and from each other."""
    return weights[name] * {"fp32": 1.0, "exp_avg": 0.1, "exp_avg_sq": 0.01}[kind]


def make(folder: Path, section: str = "llama", flat: bool = False, canonical: bool = False) -> tuple[Path, Values]:
    """A universal checkpoint, its config.json and tokenizer in `hf` beside it; what it holds by (name, kind).

    Args:
        flat: as from ZeRO 3, whose tensors have no shape.
        canonical: with megalm's own names.
    """
    shape, model = random_model({**SECTIONS, **FAMILIES}[section])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    (folder / "hf").mkdir(parents=True)
    write_json(folder / "hf/config.json", to_config(shape, 256, {}, "float32"))
    write_tokenizer(load_tokenizer("bytes"), folder / "hf", 40, shape.vocab_size, "llama")
    place = folder / "global_step14_universal"
    tensors = [HFTensor(name, ((name, size),)) for name, size in shape.parameters().items()]
    for tensor in tensors if canonical else hf_tensors(shape):
        path = place / "zero" / tensor.name
        path.mkdir(parents=True)
        for kind in KINDS:
            whole = to_hf(tensor, [value(weights, name, kind) for name, _ in tensor.parts]).contiguous()
            torch.save(whole.flatten() if flat else {"param": whole, "cat_dim": 0}, path / f"{kind}.pt")
        if not flat:
            torch.save(torch.tensor(float(STEP)), path / "step.pt")
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    inner: dict[str, Any] = {"optimizer_state_dict": {"state": {0: {"step": STEP}}}} if flat else {}
    torch.save({"param_groups": [group], **inner}, place / "zero/optimizer_state.pt")
    torch.save({"global_steps": STEP + 2, "skipped_steps": 2, "ds_config": {}}, place / "mp_rank_00_model_states.pt")
    (folder / "latest_universal").write_text(place.name)
    return place, {(name, kind): value(weights, name, kind) for name in weights for kind in KINDS}


def opened(place: Path, **words: Any) -> UniversalCheckpoint:
    return UniversalCheckpoint(place, place.parent / "hf", **words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    return make(tmp_path_factory.mktemp("universal") / "it")


@pytest.fixture
def place(made: tuple[Path, Values], tmp_path: Path) -> Path:
    """A copy of a Llama's, to be spoilt."""
    shutil.copytree(made[0].parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / made[0].name


@pytest.mark.parametrize(
    ("section", "flat", "canonical"),
    [
        ("llama", False, False),
        ("llama-gqa-tied", True, False),
        ("qk-norm", False, False),
        ("gpt2", False, False),
        ("gpt2-untied", True, False),
        ("gpt2", True, True),
        ("gpt_neox", False, False),
        ("gemma3_text", True, False),
    ],
)
def test_every_family_and_layout_comes_in_bit_for_bit(
    section: str, flat: bool, canonical: bool, tmp_path: Path
) -> None:
    place, values = make(tmp_path, section, flat, canonical)
    source = UniversalCheckpoint(tmp_path if flat else place, tmp_path / "hf")
    made = import_model(source, tmp_path / "new", None, lambda: None)
    reader = CheckpointReader(made.checkpoint)
    assert (reader.manifest.holds, reader.manifest.step) == (WEIGHTS_AND_MOMENTS, STEP + 2)
    assert reader.manifest.counters == {"optimizer_step": STEP, "skipped_steps": 2, "loss_scaler": {}}
    assert reader.manifest.imported_from == place.name
    for (name, kind), expected in values.items():
        stored = "master" if kind == "fp32" else kind
        found = reader.read_parameter(name, tuple(expected.shape), stored)  # type: ignore[arg-type]
        assert torch.equal(found, expected), (name, kind)
    assert any("lr=0.0003" in note and "(0.9, 0.95)" in note for note in made.notes)


def test_weights_alone_need_no_moments_and_no_counters(tmp_path: Path) -> None:
    place, values = make(tmp_path, "llama-gqa-tied")
    (place / "mp_rank_00_model_states.pt").unlink()
    for path in place.rglob("exp_avg*.pt"):
        path.unlink()
    made = import_model(opened(place, weights_only=True), tmp_path / "new", None, lambda: None)
    reader = CheckpointReader(made.checkpoint)
    assert (reader.manifest.holds, reader.manifest.step, made.optimizer) == (WEIGHTS, 0, None)
    assert all(torch.equal(found, values[name, "fp32"]) for name, found in reader.model().items())


def test_a_tied_head_of_lower_precision_is_the_embedding(tmp_path: Path) -> None:
    place, values = make(tmp_path, "llama-gqa-tied")
    head = place / "zero/lm_head.weight"
    head.mkdir()
    rows = values["embedding.tokens.weight", "fp32"]
    torch.save({"param": rows.bfloat16().float()}, head / "fp32.pt")
    assert "head.weight" not in opened(place).shape.parameters()
    torch.save({"param": rows + 0.1}, head / "fp32.pt")
    with pytest.raises(CheckpointError) as refused:
        opened(place)
    assert_names(refused.value, "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings")
    (head / "fp32.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as unread:
        opened(place)
    assert_names(unread.value, head / "fp32.pt")


NORM = "zero/model.norm.weight"


def _save(content: Any, name: str = f"{NORM}/exp_avg.pt") -> Callable[[Path], None]:
    return lambda place: torch.save(content, place / name)


def _cut(place: Path) -> None:
    path = place / NORM / "fp32.pt"
    path.write_bytes(path.read_bytes()[:-40])


def _twice(place: Path) -> None:
    shutil.copytree(place / NORM, place / "zero/module.model.norm.weight")


def _two_pickles(place: Path) -> None:
    with zipfile.ZipFile(place / NORM / "fp32.pt", "a") as archive:
        archive.writestr("other/data.pkl", b"N.")


def _several(place: Path) -> None:
    shutil.rmtree(place / NORM)
    (place / "zero/model.layers.0.mlp.up_proj.weight/exp_avg_sq.pt").unlink()
    torch.save({"param": torch.zeros(3)}, place / "zero/lm_head.weight/fp32.pt")


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[object, ...]]] = {
    "truncated": (_cut, ("fp32.pt",)),
    "missing": (lambda place: (place / NORM / "exp_avg_sq.pt").unlink(), ("exp_avg_sq.pt",)),
    "no moments": (lambda place: [path.unlink() for path in (place / NORM).glob("exp*")], ("model.norm.weight",)),
    "twice": (_twice, ("model.norm.weight", "module.model.norm.weight")),
    "two pickles": (_two_pickles, ("fp32.pt", 2)),
    "shape": (_save({"param": torch.ones(4, 8)}), ("model.norm.weight/exp_avg.pt", [4, 8], [32])),
    "dtype": (_save(torch.ones(32, dtype=torch.bfloat16)), ("model.norm.weight/exp_avg.pt", "torch.bfloat16")),
    "no tensor": (_save({"param": [1.0]}), ("exp_avg.pt",)),
    "another step": (_save(13, f"{NORM}/step.pt"), (12, 13)),
    "no step": (_save("x", f"{NORM}/step.pt"), ("'x'",)),
    "Lamb": (
        _save({"global_steps": 14, "ds_config": {"optimizer": {"type": "Lamb"}}}, "mp_rank_00_model_states.pt"),
        ("Lamb", "--weights-only"),
    ),
    "no states": (lambda place: (place / "mp_rank_00_model_states.pt").unlink(), ("*_model_states.pt",)),
    "no counter": (_save({}, "mp_rank_00_model_states.pt"), ("global_steps=None",)),
    "no settings": (lambda place: (place / "zero/optimizer_state.pt").unlink(), ("optimizer_state.pt",)),
    "unknown": (
        lambda place: shutil.copytree(place / NORM, place / "zero/model.layers.3.mlp.experts.w1"),
        ("model.layers.3.mlp.experts.w1",),
    ),
    "Megatron": (
        lambda place: (place / NORM).rename(place / "zero/2.self_attention.query_key_value.weight"),
        ("model.norm.weight", "2.self_attention.query_key_value.weight", "Megatron"),
    ),
    "several": (_several, ("model.norm.weight", "exp_avg_sq.pt", "lm_head.weight/fp32.pt", [257, 32])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_and_nothing_is_written(fault: str, place: Path, tmp_path: Path) -> None:
    spoil, words = FAULTS[fault]
    spoil(place)
    with pytest.raises(CheckpointError) as refused:
        command(place, tmp_path / "new", config=tmp_path / "hf")
    assert_names(refused.value, *words)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [float("nan"), "flipped"])
def test_values_are_checked_where_they_are_read(
    number: Any, made: tuple[Path, Values], place: Path, tmp_path: Path
) -> None:
    path = place / NORM / "exp_avg.pt"
    if number == "flipped":
        bits = made[1]["final_norm.weight", "exp_avg"].numpy().tobytes()
        content = path.read_bytes()
        assert content.count(bits) == 1
        path.write_bytes(content.replace(bits, bytes([bits[0] ^ 1]) + bits[1:]))
    else:
        torch.save(torch.full((32,), number), path)
    with pytest.raises(CheckpointError) as refused:
        import_model(opened(place), tmp_path / "new", None, lambda: None)
    assert_names(refused.value, "exp_avg.pt")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["global_step14_universal", "hf", "latest_universal"]


class _Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command_line: str) -> None:
        self.command_line = command_line

    def __reduce__(self) -> Any:
        return os.system, (self.command_line,)


@pytest.mark.parametrize("name", [f"{NORM}/fp32.pt", f"{NORM}/step.pt", "mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_file_can_run_a_command(name: str, protocol: int, place: Path, tmp_path: Path) -> None:
    torch.save({"param": _Runs(f"touch {tmp_path}/ran")}, place / name, pickle_protocol=protocol)
    with pytest.raises(CheckpointError) as refused:
        command(place, tmp_path / "new", config=tmp_path / "hf")
    assert_names(refused.value, place / name, "posix.system" if protocol == 2 else "STACK_GLOBAL")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()
    torch.load(place / name, weights_only=False)  # the file does what it is made for
    assert (tmp_path / "ran").exists()


def test_the_second_lock_holds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch builds nothing that is unsafe, even if it were listed here."""
    monkeypatch.setattr(torch_file, "ALLOWED", torch_file.ALLOWED | {"posix.system"})
    torch.save({"param": _Runs(f"touch {tmp_path}/ran")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as refused:
        load_torch_file(tmp_path / "a.pt")
    assert_names(refused.value, tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_only_listed_names_are_built(tmp_path: Path) -> None:
    """torch's own list is longer; and what is not a zip is not opened at all."""
    torch.save({"a": torch.ones(2).to_sparse(), "b": torch.device("cpu")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as refused:
        load_torch_file(tmp_path / "a.pt")
    assert_names(refused.value, "torch._utils._rebuild_sparse_tensor", "torch.device")
    torch.save(torch.ones(2), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError) as refused:
        load_torch_file(tmp_path / "b.pt")
    assert_names(refused.value, tmp_path / "b.pt")


def test_options_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as no_config:
        command(place, tmp_path / "new")
    assert_names(no_config.value, place / "config.json", "--config")
    shutil.copy(tmp_path / "hf/config.json", tmp_path)
    assert UniversalCheckpoint(place).config_folder == tmp_path
    with pytest.raises(ConfigError) as pretrained:
        command(tmp_path / "hf", tmp_path / "new", config=tmp_path / "hf", weights_only=True)
    assert_names(pretrained.value, "--config", "--weights-only", tmp_path / "hf")
    (tmp_path / "more.txt").write_text("<tool>")
    with pytest.raises(DataError) as grown:
        command(place, tmp_path / "new", config=tmp_path / "hf", add_tokens=tmp_path / "more.txt")
    assert_names(grown.value, "--weights-only")
    (tmp_path / "latest_universal").write_text("../elsewhere")
    with pytest.raises(CheckpointError) as outside:
        command(tmp_path, tmp_path / "new", config=tmp_path / "hf")
    assert_names(outside.value, "latest_universal")
    raw = tmp_path / "raw/global_step3"
    raw.mkdir(parents=True)
    (raw / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "raw/latest").write_text(raw.name)
    with pytest.raises(CheckpointError) as unconverted:
        command(tmp_path / "raw", tmp_path / "new")
    assert_names(unconverted.value, "deepspeed.checkpoint.ds_to_universal", raw, f"{raw}_universal")
    shutil.copy(tmp_path / "hf/config.json", tmp_path / "raw")
    with pytest.raises(DataError) as pretrained_too:  # where the Trainer of transformers saves both
        command(tmp_path / "raw", tmp_path / "new")
    assert_names(pretrained_too.value, "model.safetensors")
    assert not (tmp_path / "new").exists()
