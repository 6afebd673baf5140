"""Imports a model as a checkpoint, which every layout loads: Hugging Face's, or a universal checkpoint of DeepSpeed."""

from __future__ import annotations

import datetime
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.checkpoint.discovery import folder_name
from megalm.checkpoint.save_transaction import bytes_needed, save_checkpoint
from megalm.checkpoint.shard_spec import WEIGHTS, WEIGHTS_AND_MOMENTS, Fragment, FragmentKey
from megalm.communicator import SingleProcessCommunicator
from megalm.config.validation import to_yaml
from megalm.data.tokenizers.tokenizer import AUTO, Tokenizer, load_tokenizer
from megalm.errors import DataError, TrainingError
from megalm.huggingface.config_json import section_of
from megalm.huggingface.export_tokenizer import BESIDE, added_around
from megalm.huggingface.output_folder import complete_folder
from megalm.huggingface.pretrained_folder import ModelSource, OptimizerFacts
from megalm.huggingface.universal_checkpoint import UniversalCheckpoint
from megalm.huggingface.vocabulary_change import NewRows, choose_vocabulary
from megalm.model.model_config import ModelConfig, model_settings

MODEL_FILE = "model.yaml"

# The largest data.sequence_length to propose: the model's own maximum may need too much memory.
_LONGEST_SAMPLE = 1024
_HEADER = (
    "# For --config: the model {source}, its tokenizer and a sequence length. All other keys have their defaults.\n"
)


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        checkpoint: for --resume; config: for --config; tokenizer: for data.tokenizer.
        notes: what became of the rows of a changed vocabulary; a line for each way in which megalm treats texts
            differently than these files specify.
        shape: of the model, as it is imported.
        optimizer: what is known of the training that the checkpoint continues; None: it holds weights alone.
    """

    checkpoint: Path
    config: Path
    tokenizer: Tokenizer
    notes: tuple[str, ...]
    shape: ModelConfig
    optimizer: OptimizerFacts | None = None


def import_model(
    source: ModelSource,
    target: Path,
    tokenizer: Path | None,
    advance: Callable[[], None],
    add_tokens: Path | None = None,
    new_rows: NewRows | None = None,
) -> Imported:
    """Write the folder `target`: checkpoints/step-N, model.yaml and the tokenizer's files.

    N is the step of a source with moments, else 0.

    Args:
        tokenizer: a file or a folder; None: the model's own. Rows go to another tokenizer's tokens by what these stand
            for, see `change_vocabulary`.
        advance: called for each tensor that is written, see `tensor_count`.
        add_tokens: a file with tokens to add, see `read_tokens`.
        new_rows: how rows of new tokens begin; None: as the mean.

    Raises:
        ConfigError: `target` is not free.
        CheckpointError: a file of a universal checkpoint is unusable.
        DataError: a tensor or the tokenizer is unusable, or the disk has too little space; or the rows of a source with
            moments would change.
    """
    if isinstance(source, UniversalCheckpoint):
        tokenizer = tokenizer or source.config_folder
    with tempfile.TemporaryDirectory() as scratch:
        chosen, found, changes = choose_vocabulary(source, tokenizer, add_tokens, new_rows, Path(scratch))
        if chosen is not source and source.optimizer is not None:
            raise DataError(
                "the tokenizer changes the rows of the vocabulary, and new rows have no moments; import the weights "
                "alone with --weights-only"
            )
        return _import(chosen, found, changes, target, advance)


def tensor_count(source: ModelSource) -> int:
    """How often `import_model` calls `advance`."""
    return len(source.shape.parameters()) * len(source.kinds)


def _values(source: ModelSource, key: FragmentKey, advance: Callable[[], None]) -> Tensor:
    advance()
    return source.read(key.name, key.kind).reshape(-1)


def _import(
    source: ModelSource,
    found: Tokenizer,
    changes: tuple[str, ...],
    target: Path,
    advance: Callable[[], None],
) -> Imported:
    shape, own = source.shape, Path(found.spec)
    # Reading `eod_id` refuses a tokenizer without an end-of-document token before anything is written.
    if max(found.vocab_size, found.eod_id + 1) > shape.vocab_size:
        raise DataError(
            f"{own.name} has {found.vocab_size:,} ids, but the model's vocabulary is {shape.vocab_size:,}; name the "
            "model's own tokenizer with --tokenizer"
        )
    keys = (
        FragmentKey(name, kind, size, 0, math.prod(size))
        for name, size in shape.parameters().items()
        for kind in source.kinds
    )
    stored = [Fragment(key, partial(_values, source, key, advance)) for key in keys]
    optimizer = source.optimizer
    step = 0 if optimizer is None else optimizer.step

    def fill(folder: Path) -> None:
        for path in (own, *map(own.with_name, BESIDE)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        place = str(target.resolve() / own.name)
        samples = min(shape.max_position_embeddings, _LONGEST_SAMPLE)
        content = {"model": section_of(shape), "data": {"tokenizer": place, "sequence_length": samples}}
        text = _HEADER.format(source=source.folder.name) + to_yaml(content)
        (folder / MODEL_FILE).write_text(text, encoding="utf-8")
        facts = {**manifest_facts(source, target.resolve().name, found), "tokenizer": place}
        if optimizer is not None:
            facts |= {"holds": WEIGHTS_AND_MOMENTS, "counters": optimizer.counters}
        copies, alone = [folder / MODEL_FILE], SingleProcessCommunicator()
        try:
            save_checkpoint(folder / "checkpoints", step, stored, facts, copies, alone)
        except TrainingError as error:  # its message is about training
            raise (error.__cause__ or error) from None

    complete_folder(target, bytes_needed(stored) + own.stat().st_size, fill)
    kept = load_tokenizer(target / own.name, found.eod_id if found.eod_is_chosen else None, AUTO)
    checkpoint = target / "checkpoints" / folder_name(step)
    notes = (*changes, *_notes(source, kept), *(() if optimizer is None else _training_notes(optimizer)))
    return Imported(checkpoint, target / MODEL_FILE, kept, notes, shape, optimizer)


def _notes(source: ModelSource, tokenizer: Tokenizer) -> Iterator[str]:
    if added := added_around(tokenizer):
        begin = f" but {tokenizer.bos_token} before it" if tokenizer.bos_token else ""
        yield f"the tokenizer adds {' '.join(added)} around a text; megalm adds none of its own{begin}"
    eos = source.config.get("eos_token_id")
    if eos is not None and tokenizer.eod_id not in (eos if isinstance(eos, list) else [eos]):
        yield (
            f"config.json has eos_token_id={eos}; megalm ends a document with id {tokenizer.eod_id} unless "
            "data.eod_token names another token"
        )


def _training_notes(optimizer: OptimizerFacts) -> Iterator[str]:
    skipped = optimizer.step - optimizer.updates
    yield (
        f"a run continues after step {optimizer.step:,} with AdamW's moments"
        f"{f' of {optimizer.updates:,} updates, for {skipped:,} were skipped' if skipped else ''}"
    )
    for settings in optimizer.settings:
        given = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        yield f"a parameter group of DeepSpeed's had {given}; state it in the DeepSpeed JSON and the schedule"
    yield "the learning-rate schedule and the position in the data are not imported: the run's own hold"


def manifest_facts(source: ModelSource, name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's fields: a model without training state.

    Args:
        name: of the run.
    """
    return {
        "holds": WEIGHTS,
        "imported_from": source.folder.resolve().name,
        "tokens": 0,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": name,
        "parameters": source.shape.parameter_count(),
        "validation_loss": None,
        "validation_tokens": None,
        "counters": {"optimizer_step": 0, "skipped_steps": 0, "loss_scaler": {}},
        "model": model_settings(source.shape),
        "data": {},
        "fingerprints": {"tokenizer": tokenizer.fingerprint},
        "eod_id": tokenizer.eod_id,
        "bos_id": tokenizer.bos_id,
        "attempt": 1,
    }
