"""Reads a downloaded or saved Hugging Face model folder: its configuration, and its tensors by name.

Nothing in it is trusted: file names cannot leave the folder, pickle is never opened, and each tensor is checked before
use.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import is_finite
from megalm.checkpoint.manifest import refuse_adapter
from megalm.checkpoint.shard_spec import FragmentKind
from megalm.errors import DataError
from megalm.huggingface.config_json import family_of_config, to_shape
from megalm.huggingface.weight_mapping import INDEX, WEIGHTS, HFTensor, hf_tensors, own_head, read_part, tensors_by_part
from megalm.model.model_config import ModelConfig
from megalm.utils.atomic_files import read_json

_EXACT = ("F32", "F16", "BF16")  # converting these to fp32 is exact
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
# Masks and tables that older versions of transformers saved; the configuration determines them.
_BUFFER = re.compile(
    r"(.*\.)?(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq"
    r"|layers\.\d+\.attention\.(bias|masked_bias))"
)
_SHOWN = 5
MOMENTS: tuple[FragmentKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerFacts:
    """What DeepSpeed's run had done, and with which settings.

    Attributes:
        step: steps, with those that an overflow skipped.
        updates: steps that changed the weights; the bias correction counts these.
        loss_scaler: the state of a dynamic loss scaler; empty without one.
        settings: learning rate, betas, eps and weight decay of each parameter group.
    """

    step: int
    updates: int
    loss_scaler: dict[str, float]
    settings: tuple[dict[str, Any], ...]

    @property
    def counters(self) -> dict[str, Any]:
        """The `counters` of a manifest."""
        skipped = self.step - self.updates
        return {"optimizer_step": self.updates, "skipped_steps": skipped, "loss_scaler": self.loss_scaler}


class ModelSource(ABC):
    """A model to import: the content of its config.json, its dimensions, and its parameters.

    Attributes:
        optimizer: of a model with moments; None: it has weights alone.
    """

    folder: Path
    config: dict[str, Any]
    shape: ModelConfig
    optimizer: OptimizerFacts | None = None

    @property
    def kinds(self) -> tuple[FragmentKind, ...]:
        """What it has of each parameter."""
        return ("master",) if self.optimizer is None else ("master", *MOMENTS)

    @abstractmethod
    def read(self, name: str, kind: FragmentKind = "master") -> Tensor:
        """One of megalm's parameters by canonical name, or a moment of it: fp32 in the parameter's shape."""


class HuggingFaceFolder(ModelSource):
    """A supported model with all its tensors.

    Args:
        folder: holds config.json and safetensors files.
        ignored_keys: keys of config.json that the user knows to change nothing.

    Raises:
        DataError: unsupported model, pickled or quantized weights, or a missing, unknown or misshapen tensor.
    """

    def __init__(self, folder: Path, ignored_keys: Collection[str] = ()) -> None:
        self.folder = folder
        self.config = _config(folder, ignored_keys)
        self.shape = to_shape(self.config, ignored_keys)
        self._names = family_of_config(self.config).names
        self._tensors = {tensor.name: tensor for tensor in hf_tensors(self.shape, family_of_config(self.config))}
        self._files = {name: _opened(folder / name) for name in _weight_files(folder)}
        self._places: dict[str, tuple[str, str]] = {}  # full name -> file, name in the file
        self._find_tensors()
        self._owners = tensors_by_part(self._tensors.values())
        self._check_tensors()

    def read(self, name: str, kind: FragmentKind = "master") -> Tensor:
        """See `ModelSource.read`.

        Raises:
            DataError: the tensor cannot be read, or is not finite.
        """
        return read_part(self._owners[name], name, self._load_finite)

    def _load_finite(self, tensor: HFTensor) -> Tensor:
        found = self._load(tensor.name)
        if not is_finite(found):
            raise DataError(
                f"{self.folder}: {tensor.name} has values that are not finite; download or save the model again"
            )
        return found

    def _find_tensors(self) -> None:
        names = self._names
        for file, opened in self._files.items():
            for stored in opened.keys():  # noqa: SIM118  (not a dictionary)
                if is_buffer(stored):
                    continue
                name = own_head(stored, names)
                name = name if name.startswith(names.prefix) or name == names.head_weight else names.prefix + name
                if name in self._places:
                    raise DataError(f"{self.folder}: {self._places[name][0]} and {file} both hold {stored}")
                self._places[name] = (file, stored)

    def _check_tensors(self) -> None:
        expected = self._tensors
        if self.shape.tie_word_embeddings:
            self._drop_tied_head()
        if missing := [name for name in expected if name not in self._places]:
            raise DataError(f"{self.folder}: config.json requires {first_of(missing)}, which no file holds")
        if unknown := [stored for name, (_, stored) in self._places.items() if name not in expected]:
            raise DataError(f"{self.folder}: megalm's model has no place for {first_of(unknown)}")
        for name, tensor in expected.items():
            file, stored = self._places[name]
            found = self._files[file].get_slice(stored)
            shape, dtype = tuple(found.get_shape()), found.get_dtype()
            if shape != tensor.shape:
                raise DataError(
                    f"{self.folder}: {stored} has shape {list(shape)}, but config.json implies {list(tensor.shape)}"
                )
            if dtype not in _EXACT:
                raise DataError(f"{self.folder}: {stored} is {dtype}; megalm reads only {', '.join(_EXACT)}")

    def _drop_tied_head(self) -> None:
        """A stored head of a model with tied weights must equal the token embedding."""
        head, table = self._names.head_weight, next(iter(self._tensors))
        if head not in self._places:
            return
        if table in self._places and not torch.equal(self._load(head), self._load(table)):
            raise DataError(
                f"{self.folder}: {head} differs from {table}, but tie_word_embeddings is true; correct one of them"
            )
        del self._places[head]

    def _load(self, name: str) -> Tensor:
        file, stored = self._places[name]
        try:
            found: Tensor = self._files[file].get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.folder / file}: {stored} cannot be read ({error}); copy the file again") from None
        return found


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is no parameter: the configuration determines it."""
    return _BUFFER.fullmatch(name) is not None


def _config(folder: Path, ignored_keys: Collection[str]) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a local folder with config.json and {WEIGHTS}")
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
        raise DataError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    return read_config(folder / "config.json", ignored_keys)


def read_config(path: Path, ignored_keys: Collection[str]) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        DataError: it cannot be read, is no JSON object, or lacks a key that is to be ignored.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object")
    if absent := [key for key in ignored_keys if key not in config]:
        raise DataError(f"--ignore-key {absent[0]}: config.json has no such key")
    return config


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return list(_indexed_files(folder))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"{folder} has its weights in {pickled[0]}, a pickle file, which runs any code in it when opened. If you "
            "trust it, load it with transformers, write safetensors with save_pretrained, and import those"
        )
    raise DataError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


def _indexed_files(folder: Path) -> Iterator[str]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{folder / INDEX} has no weight_map; copy the file again")
    for name in sorted(set(map(str, weight_map.values()))):
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"{folder / INDEX} names {name!r}, which is not a safetensors file in its folder")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; {INDEX} names it")
        yield name


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a complete safetensors file ({error}); copy the file again") from None


def first_of(names: list[str], between: str = ", ") -> str:
    """Return the first names, and how many more there are."""
    more = f"{between}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more
