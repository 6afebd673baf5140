"""A checkpoint as a plain model in this process: no engine, no process group."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from megalm.checkpoint.layout import find_checkpoint
from megalm.checkpoint.load import CheckpointReader
from megalm.checkpoint.manifest import MANIFEST
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import CheckpointError
from megalm.model.shape import ModelShape
from megalm.model.transformer import LanguageModel

T = TypeVar("T")


class OfflineModel:
    """The fp32 model of a checkpoint, on the GPU if there is one.

    Args:
        place: a checkpoint folder, or a run folder, whose newest checkpoint is taken.

    Raises:
        CheckpointError: nothing to load there, or damaged files.
        DataError: its tokenizer is gone.
    """

    def __init__(self, place: Path, tokenizer: str | None = None) -> None:
        self.path = _checkpoint(place)
        reader = CheckpointReader(self.path)
        if problem := reader.verify():
            raise CheckpointError(problem)
        self.shape = ModelShape(**reader.manifest["model"])
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer or reader.manifest["tokenizer"])
        expected = reader.manifest["fingerprints"]["tokenizer"]
        if self.tokenizer.fingerprint != expected:
            raise CheckpointError(
                f"{self.tokenizer.spec} is not the tokenizer of {self.path}: "
                f"fingerprint {self.tokenizer.fingerprint[:12]}, "
                f"expected {expected[:12]}; name the right one with --tokenizer"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._load(reader)

    @torch.inference_mode()
    def next_token_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[B, T] tokens, [B] positions -> fp32 logits [B, V] of what follows each position."""
        logits = self._model(
            torch.from_numpy(tokens).to(self.device), positions=torch.from_numpy(positions).to(self.device)
        )
        assert isinstance(logits, torch.Tensor)
        return logits.float().cpu().numpy()

    def _load(self, reader: CheckpointReader) -> None:
        model = LanguageModel(self.shape)
        weights = reader.model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        self._model = model.to(self.device).eval()


class Alone:
    """The control channel of one process."""

    is_main = True

    def broadcast(self, value: T) -> T:
        return value


def _checkpoint(place: Path) -> Path:
    if (place / MANIFEST).is_file():
        return place
    newest = find_checkpoint(place / "checkpoints", "auto")
    if newest is None:
        raise CheckpointError(f"{place} is no checkpoint and has none in {place / 'checkpoints'}")
    return newest
