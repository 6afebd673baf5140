"""Reads a universal checkpoint of DeepSpeed: weights, Adam's moments and the step, by canonical name.

`python -m deepspeed.checkpoint.ds_to_universal` writes it (read here as of DeepSpeed 0.19.8): a folder
`zero/PARAMETER` for each parameter, with fp32.pt, exp_avg.pt, exp_avg_sq.pt and step.pt. From ZeRO 1 and 2 a file is a
dictionary with the whole tensor as `param`; from ZeRO 3 it is the tensor, flat, and the step is in
`zero/optimizer_state.pt`. Beside `zero` are model states, of which the counters are used. The model's settings are in
none of them.

Nothing in it is trusted, see `torch_file`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import is_finite
from megalm.checkpoint.shard_spec import FragmentKind
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.config_json import family_of_config, to_shape
from megalm.huggingface.families import Family
from megalm.huggingface.pretrained_folder import (
    MOMENTS,
    ModelSource,
    OptimizerFacts,
    first_of,
    is_buffer,
    read_config,
)
from megalm.huggingface.torch_file import load_torch_file
from megalm.huggingface.weight_mapping import HFTensor, hf_tensors, own_head, read_part, tensors_by_part
from megalm.model.model_config import ModelConfig

LATEST = "latest_universal"
_STATES = "*_model_states.pt"
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Optimizers whose two moments are AdamW's; others keep something else under the same names.
_ADAM = frozenset({"adam", "adamw", "torch_adam", "fusedadam", "deepspeedcpuadam", "cpuadam"})
_MEGATRON = re.compile(r"(.*\.)?(query_key_value|dense_h_to_4h|word_embeddings|linear_qkv|linear_fc1)\.(weight|bias)")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def is_universal(path: Path) -> bool:
    """Whether a folder is a universal checkpoint, or one that `latest_universal` is in."""
    return (path / "zero").is_dir() or (path / LATEST).is_file()


def refuse_unconverted(path: Path) -> None:
    """Raises: CheckpointError: the folder is a checkpoint of DeepSpeed that is not universal yet.

    The Trainer of transformers saves such a one inside a Hugging Face model's folder, which is not refused.
    """
    if (path / "config.json").exists():
        return
    latest = path / "latest"
    tag = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    folder = path / tag if _FOLDER_NAME.fullmatch(tag) else path
    if any(folder.glob("*_optim_states.pt")):
        raise CheckpointError(
            f"{folder} is a checkpoint of DeepSpeed in the layout of its ranks; make it universal with `python -m "
            f"deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder {folder}_universal "
            "--inject_missing_state`, and import that"
        )


class UniversalCheckpoint(ModelSource):
    """A supported model with its weights, and with the moments of its optimizer.

    Args:
        path: the checkpoint, or the folder with its `latest_universal`.
        config: the model's config.json, or the folder that has it; None: in the checkpoint's folder, or the one above,
            where the Trainer of transformers writes it.
        ignored_keys: keys of config.json that the user knows to change nothing.
        weights_only: moments and counters are not read and may be missing.

    Attributes:
        optimizer: None with `weights_only`.

    Raises:
        CheckpointError: files that are missing, damaged or unsafe to open, tensors that are not the model's, or moments
            of another optimizer; the message names all of them up to some.
        DataError: no config.json, or one of an unsupported model.
    """

    def __init__(
        self,
        path: Path,
        config: Path | None = None,
        ignored_keys: Collection[str] = (),
        weights_only: bool = False,
    ) -> None:
        self.folder = _folder(path)
        self._stored = _parameters(self.folder / "zero")
        file = _config_file(self.folder, config)
        self.config_folder = file.parent
        self.config = read_config(file, ignored_keys)
        self.shape = to_shape(self.config, ignored_keys)
        family = family_of_config(self.config)
        self._stored = {own_head(name, family.names): folder for name, folder in self._stored.items()}
        self._head = family.names.head_weight
        tensors = _tensors(self.shape, self._stored, family)
        self._kinds: tuple[FragmentKind, ...] = ("master",) if weights_only else ("master", *MOMENTS)
        if problems := list(self._problems(tensors)):
            raise CheckpointError(f"{self.folder} is not the model of {file}: {first_of(problems, '; ')}")
        self._owners = tensors_by_part(tensors)
        folders = [self._stored[tensor.name] for tensor in tensors]
        self.optimizer = None if weights_only else _optimizer(self.folder, folders)

    def read(self, name: str, kind: FragmentKind = "master") -> Tensor:
        """See `ModelSource.read`.

        Raises:
            CheckpointError: the file is damaged, or has values that are not finite.
        """

        def load(tensor: HFTensor) -> Tensor:
            path = self._stored[tensor.name] / _file(kind)
            found = _tensor(path, check_values=True)
            if not is_finite(found):
                raise CheckpointError(f"{path} has values that are not finite; use an earlier checkpoint")
            return found.reshape(tensor.shape)

        return read_part(self._owners[name], name, load)

    def _problems(self, tensors: list[HFTensor]) -> Iterator[str]:
        expected = {tensor.name: tensor for tensor in tensors}
        if missing := [name for name in expected if name not in self._stored]:
            yield f"zero has no {first_of(missing)}"
        if self.shape.tie_word_embeddings and self._head not in expected:
            yield from self._tied_head(tensors[0])
        if unknown := [name for name in self._stored if name not in expected]:
            yield f"the model has no place for {first_of(unknown)}{_known_names(unknown)}"
        untrained = [name for name, folder in self._stored.items() if name in expected and _never_trained(folder)]
        if untrained and len(self._kinds) > 1:
            yield (
                f"{first_of(untrained)} has weights without moments, because it did not train or the copy is "
                "incomplete (--weights-only imports the weights of all)"
            )
        for name, tensor in expected.items():
            folder = self._stored.get(name)
            kinds = () if folder is None else self._kinds[:1] if _never_trained(folder) else self._kinds
            for kind in kinds:
                yield from _misfit(self._stored[name] / _file(kind), tensor.shape)

    def _tied_head(self, embedding: HFTensor) -> Iterator[str]:
        """DeepSpeed stores a tied head too, from the model's own precision; it must be the token embedding, rounded."""
        head, table = self._stored.pop(self._head, None), self._stored.get(embedding.name)
        if head is None or table is None:
            return
        try:
            rows, own = (_tensor(folder / _file("master")).reshape(-1) for folder in (head, table))
        except CheckpointError as error:
            yield str(error)
            return
        if not any(torch.equal(rows, each) for each in (own, own.bfloat16().float(), own.half().float())):
            yield f"{self._head} differs from {embedding.name}, but tie_word_embeddings is true"


def _file(kind: FragmentKind) -> str:
    return f"{'fp32' if kind == 'master' else kind}.pt"


def _folder(path: Path) -> Path:
    """The checkpoint's own folder."""
    if (path / "zero").is_dir():
        return path
    tag = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not _FOLDER_NAME.fullmatch(tag):
        raise CheckpointError(f"{path / LATEST} names {tag!r}, which is not a folder beside it; give the folder itself")
    if not (path / tag / "zero").is_dir():
        raise CheckpointError(f"{path / tag} has no folder zero, but {LATEST} names it; copy the checkpoint again")
    return path / tag


def _parameters(zero: Path) -> dict[str, Path]:
    """The folders of parameters by name, without the prefixes of wrappers."""
    found: dict[str, Path] = {}
    twice = []
    for folder in sorted(path for path in zero.iterdir() if path.is_dir()):
        name = folder.name
        while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
            name = name.removeprefix(wrapper)
        if is_buffer(name):
            continue
        if name in found:
            twice.append(f"{found[name].name} and {folder.name}")
        found[name] = folder
    if twice:
        raise CheckpointError(f"{zero} has a parameter twice: {first_of(twice)}; remove the wrong one")
    if not found:
        raise CheckpointError(f"{zero} has no parameters; run ds_to_universal again")
    return found


def _config_file(folder: Path, config: Path | None) -> Path:
    if config is None:
        own, above = folder / "config.json", folder.resolve().parent / "config.json"
        file = own if own.is_file() or not above.is_file() else above
    else:
        file = config / "config.json" if config.is_dir() else config
    if not file.is_file():
        raise DataError(
            f"{file} does not exist, and tensors do not tell a model's heads, rotary base or norm epsilon; name the "
            "model's config.json with --config (transformers writes it: model.config.save_pretrained(FOLDER))"
        )
    return file


def _tensors(shape: ModelConfig, stored: Mapping[str, Path], family: Family) -> list[HFTensor]:
    """The tensors by the names that the checkpoint uses: megalm's, or Hugging Face's with or without their prefix."""
    parameters = shape.parameters()
    if all(name in stored for name in list(parameters)[:1]):
        return [HFTensor(name, ((name, size),)) for name, size in parameters.items()]
    prefix, tensors = family.names.prefix, hf_tensors(shape, family)
    if any(name.startswith(prefix) for name in stored):
        return tensors
    return [replace(tensor, name=tensor.name.removeprefix(prefix)) for tensor in tensors]


def _known_names(unknown: Iterable[str]) -> str:
    if not any(_MEGATRON.fullmatch(name) for name in unknown):
        return ""
    return (
        " (names of Megatron: the order of rows in its query_key_value depends on arguments that its files need not "
        "state; convert it to Hugging Face format with Megatron's converter, and import that)"
    )


def _never_trained(folder: Path) -> bool:
    """Whether DeepSpeed wrote weights alone, as it does for a parameter without a gradient."""
    return (folder / _file("master")).is_file() and not any((folder / _file(kind)).exists() for kind in MOMENTS)


def _tensor(path: Path, check_values: bool = False) -> Tensor:
    content = load_torch_file(path, check_values)
    found = content.get("param") if isinstance(content, dict) else content
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{path} holds no tensor; run ds_to_universal again")
    return found.detach()


def _misfit(path: Path, shape: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with a file, without reading its values. ZeRO 3 has flat tensors."""
    try:
        found = _tensor(path)
    except CheckpointError as error:
        yield str(error)
        return
    if tuple(found.shape) not in (shape, (math.prod(shape),)):
        yield f"{path.parent.name}/{path.name} has shape {list(found.shape)}, config.json implies {list(shape)}"
    if found.dtype != torch.float32:
        yield f"{path.parent.name}/{path.name} is {found.dtype}, not torch.float32"


def _optimizer(folder: Path, parameters: Iterable[Path]) -> OptimizerFacts:
    """Counters and settings, from the model states, from each parameter's step and from zero/optimizer_state.pt.

    Raises:
        CheckpointError: a file is missing, or they contradict each other.
    """
    files = sorted(folder.glob(_STATES))
    if not files:
        raise CheckpointError(f"{folder} has no {_STATES}, which has the number of steps; copy the checkpoint again")
    states, state = _mapping(files[0]), _mapping(folder / "zero" / "optimizer_state.pt")
    config = states.get("ds_config")
    kind = str(((config.get("optimizer") or {}) if isinstance(config, dict) else {}).get("type", "adamw"))
    if kind.lower() not in _ADAM:
        raise CheckpointError(
            f"{folder} has the moments of {kind}, which are not AdamW's; import the weights alone with --weights-only"
        )
    inner = state.get("optimizer_state_dict")
    groups = [group for group in state.get("param_groups") or () if isinstance(group, dict)]
    saved = [path / "step.pt" for path in parameters if (path / "step.pt").is_file()]
    found = [load_torch_file(path, check_values=True) for path in saved]
    if isinstance(inner, dict) and isinstance(inner.get("state"), dict):  # ZeRO 3
        found += [each["step"] for each in inner["state"].values() if isinstance(each, dict) and "step" in each]
    found += [group["step"] for group in groups if "step" in group]
    step, skipped = (_count(files[0], states, key) for key in ("global_steps", "skipped_steps"))
    updates = {_whole(folder, each) for each in found} or {step - skipped}
    if len(updates) > 1 or not 0 <= min(updates) <= step:
        raise CheckpointError(
            f"{folder} has parameters of {', '.join(map(str, sorted(updates)))} updates in {step} steps; run "
            "ds_to_universal again, or import the weights alone with --weights-only"
        )
    settings = tuple({key: group.get(key) for key in ("lr", "betas", "eps", "weight_decay")} for group in groups)
    return OptimizerFacts(step, min(updates), _loss_scaler(state), settings)


def _whole(folder: Path, value: object) -> int:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, (int, float)) or number != number // 1:
        raise CheckpointError(f"{folder} has {value!r} for a number of updates; run ds_to_universal again")
    return int(number)


def _loss_scaler(state: Mapping[str, Any]) -> dict[str, float]:
    scaler = vars(state["loss_scaler"]) if hasattr(state.get("loss_scaler"), "__dict__") else {}
    return {key: scaler[key] for key in _SCALER} if all(key in scaler for key in _SCALER) else {}


def _mapping(path: Path) -> Mapping[str, Any]:
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a dictionary; run ds_to_universal again")
    return content


def _count(path: Path, states: Mapping[str, Any], key: str) -> int:
    value = states.get(key)
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{path} has {key}={value!r}, which is no number of steps; copy the checkpoint again")
    return value
