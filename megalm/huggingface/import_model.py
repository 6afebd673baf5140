"""A model in Hugging Face form as a starting point: a checkpoint of weights alone, which every layout loads."""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megalm.checkpoint.discovery import folder_name
from megalm.checkpoint.save_transaction import bytes_needed, save_checkpoint
from megalm.checkpoint.shard_spec import WEIGHTS, FragmentKey
from megalm.communicator import SingleProcessCommunicator
from megalm.config.validation import to_yaml
from megalm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import DataError, TrainingError
from megalm.huggingface.config_json import section_of
from megalm.huggingface.export_tokenizer import SENTENCEPIECE, TOKENIZER, TOKENIZER_CONFIG, added_around
from megalm.huggingface.output_folder import complete_folder
from megalm.huggingface.pretrained_folder import HuggingFaceFolder

T = TypeVar("T")

MODEL_FILE = "model.yaml"

# Tokens of a training sample, where the model takes as many: its own window may want more memory than there is.
_LONGEST_SAMPLE = 1024
_TOKENIZERS = (SENTENCEPIECE, TOKENIZER, "tokenizer.model")
_HEADER = "# For --config: {source} as it was imported, its tokenizer, samples that fit it. The rest is the defaults.\n"


@dataclass(frozen=True)
class Imported:
    """What there is now.

    Attributes:
        checkpoint: for --resume; config: for --config; tokenizer: for data.tokenizer.
        notes: what megalm does otherwise with texts than these files say, a line each.
    """

    checkpoint: Path
    config: Path
    tokenizer: Tokenizer
    parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Stored:
    """A whole parameter that is read when it is written."""

    key: FragmentKey
    read: Callable[[str], Tensor]
    tell: Callable[[], None]

    @property
    def tensor(self) -> Tensor:
        self.tell()
        return self.read(self.key.name).reshape(-1)


def import_model(source: HuggingFaceFolder, target: Path, tokenizer: Path | None, tell: Callable[[], None]) -> Imported:
    """Write the folder `target`: checkpoints/step-00000000, model.yaml and the tokenizer's files.

    Args:
        tokenizer: a file or a folder, where it is not the model's own one.
        tell: called for each parameter.

    Raises:
        ConfigError: `target` is not free.
        DataError: a tensor or the tokenizer cannot be used, or the disk is too full.
    """
    shape = source.shape
    own = _find_tokenizer(tokenizer or source.folder)
    found = load_tokenizer(own)
    _refuse_other_vocabulary(found, shape.vocab_size)
    final = target.resolve()
    keys = (FragmentKey(name, "master", size, 0, math.prod(size)) for name, size in shape.parameters().items())
    stored = [_Stored(key, source.read, tell) for key in keys]

    def fill(folder: Path) -> None:
        for path in (own, own.with_name(TOKENIZER_CONFIG)) if own.suffix == ".json" else (own,):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        place = str(final / own.name)
        samples = min(shape.max_position_embeddings, _LONGEST_SAMPLE)
        content = {"model": section_of(shape), "data": {"tokenizer": place, "sequence_length": samples}}
        text = _HEADER.format(source=source.folder.name) + to_yaml(content)
        (folder / MODEL_FILE).write_text(text, encoding="utf-8")
        facts = {**_facts(source, target, found), "tokenizer": place}
        try:
            save_checkpoint(
                folder / "checkpoints", 0, stored, facts, [folder / MODEL_FILE], SingleProcessCommunicator()
            )
        except TrainingError as error:  # its words are about training
            raise (error.__cause__ or error) from None

    complete_folder(target, bytes_needed(stored) + own.stat().st_size, fill)
    kept = load_tokenizer(target / own.name)
    checkpoint = target / "checkpoints" / folder_name(0)
    return Imported(checkpoint, target / MODEL_FILE, kept, shape.parameter_count(), tuple(_notes(source, kept)))


def _find_tokenizer(folder: Path) -> Path:
    """The file itself; of a folder the SentencePiece model that megalm exported, or tokenizer.json, or another one."""
    if folder.is_file():
        return folder
    if not folder.exists():
        raise DataError(f"{folder}: no such tokenizer; give a tokenizer.json, a .model, or the folder that holds one")
    for name in _TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder} has none of {', '.join(_TOKENIZERS)}; save its tokenizer with transformers "
        "(AutoTokenizer.from_pretrained(...).save_pretrained), or name one with --tokenizer"
    )


def _notes(source: HuggingFaceFolder, tokenizer: Tokenizer) -> Iterator[str]:
    if added := added_around(tokenizer):
        yield f"its tokenizer puts {' '.join(added)} around a text; megalm puts nothing, in training and in generation"
    stated = source.config.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    if stated is not None and tokenizer.eod_id not in ends:
        yield f"config.json has eos_token_id={stated}; here a document ends with id {tokenizer.eod_id}"


def _refuse_other_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises: DataError: the model has no row for an id, or nothing ends a document."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{Path(tokenizer.spec).name} has {tokenizer.vocab_size:,} ids, the model's vocabulary is {vocab_size:,}; "
            "name the model's own with --tokenizer"
        )
    assert tokenizer.eod_id < vocab_size


def _facts(source: HuggingFaceFolder, target: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest says: a model, and nothing of training."""
    return {
        "holds": WEIGHTS,
        "imported_from": source.folder.resolve().name,
        "tokens": 0,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": target.resolve().name,
        "parameters": source.shape.parameter_count(),
        "validation_loss": None,
        "validation_tokens": None,
        "counters": {"optimizer_step": 0, "skipped_steps": 0, "loss_scaler": {}},
        "model": asdict(source.shape),
        "data": {},
        "fingerprints": {"tokenizer": tokenizer.fingerprint},
        "attempt": 1,
    }
