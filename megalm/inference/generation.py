"""Text generation that computes only the new tokens, and a stream of the text as it grows.

A text that does not continue the text before (another prompt, or a window that has moved) is computed from the first
different token, so any sequence of calls gives the right logits. Training samples from its engine instead.

Shapes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import SampleSection
from megalm.data.sampling.batch_loader import common_prefix
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import CheckpointError
from megalm.inference.inference_model import COMPUTES_NAN, InferenceModel
from megalm.model.attention import KeyValueCache
from megalm.train.text_samples import Predictor, extend, prompt_tokens

_INCOMPLETE = "\ufffd"  # decoders show the bytes of an incomplete character as this


class CachedModel:
    """A model that caches keys and values of the texts of its last call, row by row."""

    def __init__(self, model: InferenceModel) -> None:
        self._network, self._device, self._path = model.network, model.device, model.path
        self._rows: list[_CachedText] = []

    @torch.inference_mode()
    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """[B, T] tokens, [B] positions -> fp32 logits [B, V] of the token after each position.

        Raises:
            CheckpointError: a logit is NaN, although the weights are finite.
        """
        texts = [row[: position + 1].tolist() for row, position in zip(tokens, positions, strict=True)]
        new = [_CachedText(len(self._network.layers)) for _ in texts[len(self._rows) :]]
        self._rows = [*self._rows, *new][: len(texts)]
        rows = [self._logits(text, cached) for text, cached in zip(texts, self._rows, strict=True)]
        logits = torch.stack(rows).float().cpu().numpy()
        if np.isnan(logits).any():
            raise CheckpointError(f"{self._path}: {COMPUTES_NAN}")
        return logits

    def _logits(self, text: list[int], cached: _CachedText) -> Tensor:
        """[V] logits of the token after the text."""
        kept = min(common_prefix(text, cached.tokens), len(text) - 1)  # the last token is always computed
        # Ctrl-C can come at any line: caches may hold more than `tokens`, never less.
        cached.tokens = text[:kept]
        for cache in cached.layers:
            cache.truncate(kept)
        hidden = self._network.hidden_states(torch.tensor([text[kept:]], device=self._device), caches=cached.layers)
        cached.tokens = text
        logits = self._network.head(hidden[:, -1:])
        assert isinstance(logits, Tensor)
        return logits[0, 0]


class _CachedText:
    def __init__(self, layers: int) -> None:
        self.tokens: list[int] = []
        self.layers = [KeyValueCache() for _ in range(layers)]


def stream(
    model: Predictor, tokenizer: Tokenizer, prompt: str, settings: SampleSection, sequence_length: int, seed: int
) -> Iterator[str]:
    """Yield the prompt and its continuation in pieces that later tokens cannot change.

    The joined pieces equal the text of `generate` for this prompt alone.

    Args:
        settings: its prompts are ignored.
    """
    (tokens,) = prompt_tokens(tokenizer, [prompt])
    grown = extend(model, SingleProcessCommunicator(), [tokens], tokenizer, settings, sequence_length, seed)
    shown = ""
    for _ in chain([None], grown):
        # Decode everything: a character can take several tokens, and a token's text can depend on the one before.
        text = tokenizer.decode(tokens).rstrip(_INCOMPLETE)
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(tokens)
    if rest := text[common_prefix(shown, text) :]:
        yield rest
