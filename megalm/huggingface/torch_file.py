"""Reads a file of `torch.save` without running what it names.

A .pt file is a zip with a pickle, and a pickle may call any function that its author names. Here every name in the
pickle must be in a list before anything of it is built, and torch's restricted unpickler (`weights_only=True`) builds
it. DeepSpeed's own classes become plain objects with the same attributes, so DeepSpeed is not imported.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megalm.errors import CheckpointError

_STORAGES = "Float BFloat16 Half Double Long Int Short Char Byte Bool"
_DTYPES = "float32 bfloat16 float16 float64 int64 int32 int16 int8 uint8 bool"


class Attributes:
    """Stands for an object of DeepSpeed: its attributes, without its class."""


def _number(value: int) -> int:
    """Stands for an enumeration of DeepSpeed."""
    return value


# What stands for a class of DeepSpeed, by its name.
_STAND_INS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Attributes,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Attributes,
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape": Attributes,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _number,
}
ALLOWED = frozenset(
    {
        "collections.OrderedDict",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.Size",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        *(f"torch.{kind}Storage" for kind in _STORAGES.split()),
        *(f"torch.{kind}" for kind in _DTYPES.split()),
        *_STAND_INS,
    }
)
# Opcodes that name something in another way than GLOBAL does; torch.save writes none of them.
_OTHER_NAMES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"})


def load_torch_file(path: Path, check_values: bool = False) -> Any:
    """Return what `torch.save` wrote; tensors are on the CPU and mapped, so they are read when they are used.

    Args:
        check_values: read the whole file and compare its checksums.

    Raises:
        CheckpointError: the file is missing or damaged, or its pickle names something that is not in `ALLOWED`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = _pickle_in(path, archive)
            damaged = archive.testzip() if check_values else None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the checkpoint again") from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a complete file of torch.save ({error}); copy it again") from None
    if damaged:
        raise CheckpointError(f"{path} is damaged: {damaged} does not match its checksum; copy it again")
    if foreign := sorted(_names(path, pickled) - ALLOWED):
        raise CheckpointError(
            f"{path} holds {', '.join(foreign)}, which megalm does not open because a pickle runs what it names; save "
            "the checkpoint again without it (as plain numbers, texts, lists and dictionaries in client_state)"
        )
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason}); copy it again") from None


def _pickle_in(path: Path, archive: zipfile.ZipFile) -> bytes:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1 or len(set(names)) < len(names):
        raise CheckpointError(f"{path} is not a file of torch.save: it has {len(pickles)} pickles, or a name twice")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed, which torch.save does not do; copy the original file")
    return archive.read(pickles[0])


def _names(path: Path, pickled: bytes) -> set[str]:
    """The names in a pickle; nothing of it is built."""
    names = set()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL":
                names.add(str(argument).replace(" ", ".", 1))
            elif opcode.name in _OTHER_NAMES:
                names.add(f"a name by {opcode.name}")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None
    return names
