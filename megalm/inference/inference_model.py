"""Loads a checkpoint as a plain model in this process, without an engine or process group.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import MANIFEST, Manifest, read_manifest, shape_of
from megalm.data.sampling.batch_loader import MicroBatch
from megalm.data.sampling.samples import IGNORE_INDEX, PackingKind
from megalm.data.tokenizers.tokenizer import AUTO, Tokenizer, load_tokenizer, tokenizer_of
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.import_model import manifest_facts
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.huggingface.vocabulary_change import find_tokenizer
from megalm.model.model_config import ModelConfig
from megalm.model.moe import routers
from megalm.model.transformer import LanguageModel
from megalm.train.multiple_choice import Encoding

COMPUTES_NAN = "the model computes NaN; training had diverged by this step, choose an earlier checkpoint"


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint's manifest, model configuration and tokenizer, without weights."""

    path: Path
    manifest: Manifest
    shape: ModelConfig
    tokenizer: Tokenizer

    @property
    def sequence_length(self) -> int:
        """The sequence length of training."""
        longest = self.shape.max_position_embeddings
        return min(self.manifest.data.get("data.sequence_length") or longest, longest)

    @property
    def document_mask(self) -> bool:
        """Whether attention was confined to one document, so that no document follows an end-of-document token."""
        return bool(self.manifest.data.get("data.document_mask", False))

    @property
    def encoding(self) -> Encoding:
        """How the model reads multiple-choice questions."""
        return Encoding(self.tokenizer, self.sequence_length, self.document_mask)

    @property
    def packing(self) -> PackingKind:
        return "best_fit" if self.manifest.data.get("data.packing") == "best_fit" else "stream"

    @property
    def run_folder(self) -> Path | None:
        """The run folder that holds it; None for a checkpoint that was copied elsewhere."""
        checkpoints = self.path.resolve().parent
        return checkpoints.parent if checkpoints.name == "checkpoints" else None


def read_facts(path: Path, tokenizer: str | None = None) -> CheckpointFacts:
    """Read the facts of a checkpoint folder.

    Args:
        path: a checkpoint, or the folder of a model in Hugging Face format.
        tokenizer: the tokenizer's path, if it has moved since training.

    Raises:
        CheckpointError: no checkpoint, a damaged manifest, or a tokenizer that is not the checkpoint's.
        DataError: the tokenizer is missing; or megalm has no such model.
    """
    if is_pretrained(path):
        return _pretrained_facts(HuggingFaceFolder(path), tokenizer)
    manifest = read_manifest(path)
    ends = manifest.bos_id, manifest.eod_id
    used = tokenizer_of(path, manifest.tokenizer, manifest.fingerprints.tokenizer, ends, tokenizer)
    return CheckpointFacts(path, manifest, shape_of(path, manifest), used)


def is_pretrained(path: Path) -> bool:
    """Whether a folder holds a model in Hugging Face format instead of a checkpoint."""
    return (path / "config.json").is_file() and not (path / MANIFEST).exists()


def _pretrained_facts(source: HuggingFaceFolder, tokenizer: str | None) -> CheckpointFacts:
    used = load_tokenizer(find_tokenizer(Path(tokenizer) if tokenizer else source.folder), bos_token=AUTO)
    facts = manifest_facts(source, source.folder.resolve().name, used)
    tensors = {name: {"shape": size, "fragments": []} for name, size in source.shape.parameters().items()}
    manifest = Manifest.model_validate({"step": 0, "files": {}, "tensors": tensors, **facts})
    return CheckpointFacts(source.folder, manifest, source.shape, used)


def verify_checkpoint(reader: CheckpointReader) -> None:
    """Raises: CheckpointError: a file is damaged."""
    if problem := reader.verify():
        raise CheckpointError(problem)


class InferenceModel:
    """The model of a checkpoint, on the GPU if there is one.

    Args:
        path: a checkpoint folder, or that of a model in Hugging Face format.
        dtype: of weights and activations; the loss is always fp32.
        verify: checks every file before the weights are read; a caller can show its progress.
        watched: iterates over the parameters' names while they are loaded; a caller can show their progress.
        ema: take the moving average of the weights.

    Raises:
        CheckpointError: no checkpoint, damaged files, or weights that are not finite; or no average.
        DataError: the tokenizer is missing.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: str | None = None,
        dtype: torch.dtype = torch.float32,
        verify: Callable[[CheckpointReader], None] = verify_checkpoint,
        watched: Callable[[Sequence[str]], Iterable[str]] = iter,
        ema: bool = False,
    ) -> None:
        self.path = path
        self.device = _device()
        if is_pretrained(path):
            if ema:
                raise CheckpointError(f"{path} is in Hugging Face format, which has no average; leave out --ema")
            source = HuggingFaceFolder(path)
            self.facts = _pretrained_facts(source, tokenizer)
            network = _load(lambda name, _: source.read(name), source.shape, watched, self.device, dtype)
        else:
            reader = CheckpointReader(path, ema)
            verify(reader)
            self.facts = read_facts(path, tokenizer)
            network = _load(reader.read_finite, self.facts.shape, watched, self.device, dtype)
            reader.close()
        self.shape, self.tokenizer = self.facts.shape, self.facts.tokenizer
        self.network = network

    @torch.inference_mode()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """The sum of losses in nats, as an engine computes it; logits exist for one chunk of tokens at a time.

        Raises:
            DataError: a token is not in the model's vocabulary.
        """
        total = 0.0
        for batch in micro_batches:
            loss, _ = self.network(*self._tensors(batch))
            total += float(loss)
        return total

    @torch.inference_mode()
    def row_losses(self, batch: MicroBatch) -> npt.NDArray[np.float64]:
        """The sum of losses in nats of each row, fp64 [B]; rows are single texts.

        Raises:
            CheckpointError: one is NaN.
            DataError: a token is not in the model's vocabulary.
        """
        return self.score_rows(batch)[0]

    @torch.inference_mode()
    def score_rows(
        self, batch: MicroBatch, greedy: bool = False
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """The same as `row_losses`, and with `greedy` whether each target of a row is the likeliest token, [B]."""
        tokens, labels, documents = self._tensors(batch)
        assert tokens is not None
        assert labels is not None
        hidden = self.network.hidden_states(tokens, documents)
        rows = list(zip(hidden.split(1), labels.split(1), strict=True))
        losses = torch.stack([self.network.head(*row)[0] for row in rows]).double().cpu().numpy()
        if np.isnan(losses).any():  # the largest of several would be a NaN
            raise CheckpointError(f"{self.path}: {COMPUTES_NAN}")
        likeliest = [self._is_likeliest(*row) for row in rows] if greedy else []
        return losses, np.array(likeliest, dtype=np.bool_)

    def _is_likeliest(self, hidden: Tensor, labels: Tensor) -> bool:
        """Whether each target of a row, [1, T, H] and [1, T], is the likeliest token."""
        is_target = labels != IGNORE_INDEX
        logits = self.network.head(hidden[is_target][None])
        assert isinstance(logits, Tensor)
        return bool((logits.argmax(-1)[0] == labels[is_target]).all())

    def _tensors(self, batch: MicroBatch) -> tuple[Tensor | None, ...]:
        largest = max(int(batch.tokens.max()), int(batch.labels.max()))
        if largest >= self.shape.vocab_size:
            raise DataError(
                f"token {largest} is not in the model's vocabulary of {self.shape.vocab_size:,}; build the dataset "
                "with the checkpoint's tokenizer"
            )
        arrays = (batch.tokens, batch.labels, batch.documents)
        return tuple(None if array is None else torch.from_numpy(array).to(self.device) for array in arrays)


def _device() -> torch.device:
    """The GPU if there is one, unless DeepSpeed's own variable chooses the CPU, as in training."""
    wanted = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")


def _load(
    read: Callable[[str, tuple[int, ...]], Tensor],
    shape: ModelConfig,
    watched: Callable[[Sequence[str]], Iterable[str]],
    device: torch.device,
    dtype: torch.dtype,
) -> LanguageModel:
    """Load the model, for evaluation; on the CPU one parameter at a time is in memory twice."""
    model = LanguageModel(shape)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in watched(list(parameters)):
            parameter = parameters[name]
            parameter.copy_(read(name, tuple(parameter.shape)))
    model = model.to(device, dtype).eval()
    found = routers(model)
    for name, size in shape.expert_biases().items():
        found[name].expert_bias = read(name, size).to(device)
    return model
