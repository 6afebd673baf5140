"""Text as it is drawn, piece by piece: only what no later token can change."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import SampleSection
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.train.text_samples import Predictor, extend

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no whole character yet


def stream(
    model: Predictor, tokenizer: Tokenizer, prompt: str, settings: SampleSection, sequence_length: int, seed: int
) -> Iterator[str]:
    """The prompt and its continuation in pieces; joined they are what `generate` gives for this prompt alone.

    Args:
        settings: its prompts are not looked at.
    """
    tokens = list(tokenizer.encode_batch([prompt])[0]) or [tokenizer.eod_id]
    grown = extend(model, SingleProcessCommunicator(), [tokens], tokenizer.eod_id, settings, sequence_length, seed)
    shown = ""
    for _ in chain([None], grown):
        # All of it each time: a character may take several tokens, and decoders look at what stands before a token.
        text = tokenizer.decode(tokens).rstrip(_UNFINISHED)
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(tokens)
    same = next((place for place, pair in enumerate(zip(shown, text, strict=False)) if pair[0] != pair[1]), len(shown))
    if rest := text[same:]:
        yield rest
