"""A checkpoint as a plain model in this process: no engine, no process group.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import first_whole
from megalm.checkpoint.manifest import MANIFEST, Manifest, read_manifest, shape_of
from megalm.data.sampling.batch_loader import MicroBatch
from megalm.data.tokenizers.tokenizer import Tokenizer, tokenizer_of
from megalm.errors import CheckpointError, DataError
from megalm.model.model_config import ModelConfig
from megalm.model.transformer import LanguageModel

T = TypeVar("T")
OfflinePrecision = Literal["fp32", "bf16"]

NOT_NUMBERS = "what it computes is not a number; the run had gone wrong by then, choose an earlier checkpoint"

_DTYPES: dict[OfflinePrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says of itself, and its tokenizer; no weights."""

    path: Path
    manifest: Manifest
    shape: ModelConfig
    tokenizer: Tokenizer

    @property
    def sequence_length(self) -> int:
        """Tokens of the samples that it was trained on."""
        longest = self.shape.max_position_embeddings
        return min(self.manifest.data.get("data.sequence_length") or longest, longest)

    @property
    def document_mask(self) -> bool:
        """Whether documents in one sample were kept from each other: none then follows an end-of-document token."""
        return bool(self.manifest.data.get("data.document_mask", False))

    @property
    def run_folder(self) -> Path | None:
        """The run that it lies in; None for one that was copied elsewhere."""
        checkpoints = self.path.resolve().parent
        return checkpoints.parent if checkpoints.name == "checkpoints" else None

    @property
    def mark(self) -> str:
        """`marked bad (REASON)`, or suspect; "" for a good one."""
        return self.manifest.mark


def read_facts(place: Path, tokenizer: str | None = None) -> CheckpointFacts:
    """The account of a checkpoint folder, or of what `--resume auto` would take of a run.

    Args:
        tokenizer: where the checkpoint's tokenizer is now, if it moved.

    Raises:
        CheckpointError: nothing to load there, a damaged manifest, or another tokenizer than the checkpoint's.
        DataError: its tokenizer is gone.
    """
    path = _checkpoint(place)
    manifest = read_manifest(path)
    used = tokenizer_of(path, manifest.tokenizer, manifest.fingerprints.tokenizer, tokenizer)
    return CheckpointFacts(path, manifest, shape_of(path, manifest), used)


def verify_in_silence(reader: CheckpointReader) -> None:
    """Raises: CheckpointError: a file is damaged."""
    if problem := reader.verify():
        raise CheckpointError(problem)


class InferenceModel:
    """The model of a checkpoint, on the GPU if there is one.

    Args:
        place: a checkpoint folder, or a run folder, whose newest checkpoint is taken.
        precision: of weights and activations; the loss is fp32 in any case.
        verify: looks at every file before it is used, so that somebody can watch.
        watched: is given the names of the parameters and hands them on one by one, so that somebody can count them.

    Raises:
        CheckpointError: nothing to load there, damaged files, or weights that are not finite.
        DataError: its tokenizer is gone.
    """

    def __init__(
        self,
        place: Path,
        tokenizer: str | None = None,
        precision: OfflinePrecision = "fp32",
        verify: Callable[[CheckpointReader], None] = verify_in_silence,
        watched: Callable[[Sequence[str]], Iterable[str]] = iter,
    ) -> None:
        self.path = _checkpoint(place)
        reader = CheckpointReader(self.path)
        verify(reader)
        self.facts = read_facts(self.path, tokenizer)
        self.shape, self.tokenizer = self.facts.shape, self.facts.tokenizer
        self.device = _device()
        self.network = _load(reader, self.shape, watched).to(self.device, _DTYPES[precision]).eval()

    @torch.inference_mode()
    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """[B, T] tokens, [B] positions -> fp32 logits [B, V] of what follows each position."""
        logits = self.network(
            torch.from_numpy(tokens).to(self.device), positions=torch.from_numpy(positions).to(self.device)
        )
        assert isinstance(logits, Tensor)
        return logits.float().cpu().numpy()

    @torch.inference_mode()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Sum of losses in nats, as of an engine; logits exist for one chunk of tokens at a time.

        Raises:
            DataError: a token that the model does not have.
        """
        total = 0.0
        for batch in micro_batches:
            loss, _ = self.network(*self._tensors(batch))
            total += float(loss)
        return total

    @torch.inference_mode()
    def row_losses(self, batch: MicroBatch) -> npt.NDArray[np.float64]:
        """Sum of losses in nats of each sample, fp64 [B].

        Raises:
            DataError: a token that the model does not have.
        """
        tokens, labels, documents = self._tensors(batch)
        assert tokens is not None
        assert labels is not None
        assert documents is None, "rows are texts of their own"
        embedding, *blocks, final_norm, head = self.network.stages()
        hidden = embedding(tokens, None)
        for block in blocks:
            hidden = block(hidden, None)
        hidden = final_norm(hidden)  # [B, T, H]
        losses = [head(hidden[row : row + 1], labels[row : row + 1])[0] for row in range(len(labels))]
        return torch.stack(losses).double().cpu().numpy()

    def _tensors(self, batch: MicroBatch) -> tuple[Tensor | None, ...]:
        largest = max(int(batch.tokens.max()), int(batch.labels.max()))
        if largest >= self.shape.vocab_size:
            raise DataError(
                f"token {largest} is not in the model's vocabulary of {self.shape.vocab_size:,}; the dataset was "
                "built with another tokenizer than the checkpoint's"
            )
        arrays = (batch.tokens, batch.labels, batch.documents)
        return tuple(None if array is None else torch.from_numpy(array).to(self.device) for array in arrays)


def _checkpoint(place: Path) -> Path:
    if (place / MANIFEST).is_file():
        return place
    newest, _ = first_whole(place / "checkpoints", "auto")
    if newest is None:
        raise CheckpointError(
            f"{place} is no checkpoint and has none in {place / 'checkpoints'}; give a run or one of its checkpoints"
        )
    return newest


def _device() -> torch.device:
    """DeepSpeed's own variable decides where there is a choice, as in training."""
    wanted = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")


def _load(
    reader: CheckpointReader, shape: ModelConfig, watched: Callable[[Sequence[str]], Iterable[str]]
) -> LanguageModel:
    """The fp32 model; one parameter is in memory twice at a time."""
    model = LanguageModel(shape)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in watched(list(parameters)):
            parameter = parameters[name]
            parameter.copy_(reader.read_finite(name, tuple(parameter.shape)))
    reader.close()
    return model
