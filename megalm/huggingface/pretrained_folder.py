"""A folder in Hugging Face form, as it is downloaded or saved: its configuration, its tensors by name, its tokenizer.

Nothing of it is trusted: names of files are names in this folder, pickle is never opened, a tensor is looked at before
it is used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import is_finite
from megalm.errors import DataError
from megalm.huggingface.config_json import to_shape
from megalm.huggingface.export_weights import INDEX, WEIGHTS, to_ours
from megalm.huggingface.weight_mapping import TheirTensor, prefix_of, their_tensors
from megalm.utils.atomic_files import read_json

_EXACT = ("F32", "F16", "BF16")  # every number of theirs is one of fp32
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
# Masks and tables that older versions saved: they follow from the configuration.
_BUFFER = re.compile(r"(.*\.)?(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)")
_HEAD = "lm_head.weight"
_SHOWN = 3


class HuggingFaceFolder:
    """A model of a kind that megalm has, every tensor in its place.

    Args:
        folder: with config.json and safetensors.
        ignored_keys: of config.json, which a person knows to change nothing.

    Raises:
        DataError: another kind of model, pickled or quantised weights, a missing, unknown or misshapen tensor.
    """

    def __init__(self, folder: Path, ignored_keys: Collection[str] = ()) -> None:
        self.folder = folder
        self.config = _config(folder, ignored_keys)
        self.shape = to_shape(self.config, ignored_keys)
        self._files = {name: _opened(folder / name) for name in _weight_files(folder)}
        self._places: dict[str, tuple[str, str]] = {}  # name as transformers has it -> file, name in the file
        self._place_all()
        self._owner = {part: tensor for tensor in their_tensors(self.shape) for part, _ in tensor.parts}
        self._refuse_wrong_tensors()

    def read(self, name: str) -> Tensor:
        """One of our parameters by canonical name, fp32 in its shape.

        Raises:
            DataError: it cannot be read, or is not finite.
        """
        tensor = self._owner[name]
        found = to_ours(tensor, self._load(tensor.name), name).float()
        if not is_finite(found):
            raise DataError(f"{self.folder}: {tensor.name} has numbers that are not finite; it cannot be trained on")
        return found

    def _place_all(self) -> None:
        prefix = prefix_of(self.shape)
        for file, opened in self._files.items():
            for stored in opened.keys():  # noqa: SIM118  (it is no dictionary)
                if _BUFFER.fullmatch(stored):
                    continue
                name = stored if stored.startswith(prefix) or stored == _HEAD else prefix + stored
                if name in self._places:
                    raise DataError(f"{self.folder}: {stored} is there twice, in {self._places[name][0]} and in {file}")
                self._places[name] = (file, stored)

    def _refuse_wrong_tensors(self) -> None:
        expected = {tensor.name: tensor for tensor in their_tensors(self.shape)}
        if self.shape.tie_word_embeddings:
            self._drop_tied_head()
        if missing := [name for name in expected if name not in self._places]:
            raise DataError(f"{self.folder} has no {_first(missing)}, which its config.json calls for")
        if unknown := [stored for name, (_, stored) in self._places.items() if name not in expected]:
            raise DataError(f"{self.folder} has {_first(unknown)}, which no part of megalm's model is made of")
        for name, tensor in expected.items():
            self._refuse_wrong(tensor, *self._places[name])

    def _refuse_wrong(self, tensor: TheirTensor, file: str, stored: str) -> None:
        found = self._files[file].get_slice(stored)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if shape != tensor.shape:
            raise DataError(f"{self.folder}: {stored} is {list(shape)}, by config.json it is {list(tensor.shape)}")
        if dtype not in _EXACT:
            raise DataError(f"{self.folder}: {stored} is {dtype}; only {', '.join(_EXACT)} are read, as fp32")

    def _drop_tied_head(self) -> None:
        """A head that is stored although it is tied must be what it is tied to."""
        if _HEAD not in self._places:
            return
        table = next(tensor.name for tensor in their_tensors(self.shape))
        if table in self._places and not torch.equal(self._load(_HEAD), self._load(table)):
            raise DataError(
                f"{self.folder}: {_HEAD} is not {table}, though tie_word_embeddings is true; state in config.json "
                "which of the two holds"
            )
        del self._places[_HEAD]

    def _load(self, name: str) -> Tensor:
        file, stored = self._places[name]
        try:
            found: Tensor = self._files[file].get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.folder / file}: {stored} cannot be read ({error}); copy the file again") from None
        return found


def _config(folder: Path, ignored_keys: Collection[str]) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a local one with config.json and model.safetensors")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} has no config.json; give the folder of a model in Hugging Face form")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.json'} holds no JSON object")
    if absent := [key for key in ignored_keys if key not in config]:
        raise DataError(f"--ignore-key {absent[0]}: config.json does not have it")
    return config


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return list(_indexed_files(folder))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"{folder} has its weights in {pickled[0]}, which is pickle: opening it runs what is in it. Where you "
            "trust it, load it with transformers and save_pretrained it, which writes safetensors; then import that"
        )
    raise DataError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def _indexed_files(folder: Path) -> Iterator[str]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{folder / INDEX} has no weight_map; copy it again")
    for name in sorted(set(map(str, weight_map.values()))):
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"{folder / INDEX} names {name!r}, which is no safetensors file of its folder")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; {INDEX} names it")
        yield name


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is not a whole safetensors file ({error}); copy it again") from None


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
