"""A vocabulary whose rows the ranks divide: lookup, logits and loss without whole logits on any rank.

Shapes: C tokens of a chunk, N tokens, H hidden, V vocabulary, R rows of it held here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.layer_factory import WHOLE_SEQUENCE, VocabularyOutput, WholeSequence
from megalm.model.loss import IGNORE, LogitRule
from megalm.model.modules import uncompiled
from megalm.parallel import collectives
from megalm.parallel.collectives import ReplicatedResidual
from megalm.topology import DimRange, vocabulary_rows


class VocabParallelEmbedding(nn.Embedding):
    """Rows [R, H] of a lookup table; a token of another rank's rows adds zero here."""

    def __init__(self, part: DimRange, width: int, stream: ReplicatedResidual) -> None:
        super().__init__(part.size, width)
        self._part = part
        self._stream = stream

    @uncompiled
    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> the stream."""
        local, held = _local(tokens, self._part)
        return self._stream.join(functional.embedding(local, self.weight) * held.unsqueeze(-1))


class VocabParallelOutput(VocabularyOutput):
    """From the stream to logits or to the loss, on this rank's rows [R, H] of the vocabulary's weight.

    `loss` is the same on every rank. The gradient of the hidden states is this rank's part of it until the backward
    pass of `whole` sums it, once for all chunks.

    Args:
        vocab_size: V.
        rule: what becomes of the products with the weight.
        compiled: the element-wise work of a chunk runs compiled.
        sequence: how ranks hold a sample's sequence.
    """

    def __init__(
        self,
        vocab_size: int,
        rule: LogitRule,
        stream: ReplicatedResidual,
        compiled: bool,
        sequence: WholeSequence = WHOLE_SEQUENCE,
    ) -> None:
        super().__init__(rule, sequence=sequence)
        self.chunk = self._chunk
        self._vocab_size = vocab_size
        self._stream = stream
        self._group = stream.group
        self._part = vocabulary_rows(vocab_size, stream.group.size, stream.group.index)
        self._exponentials: Callable[..., tuple[Tensor, Tensor]] = _exponentials
        self._gradient: Callable[..., Tensor] = _gradient
        if compiled:
            self._exponentials = torch.compile(_exponentials, dynamic=False)
            self._gradient = torch.compile(_gradient, dynamic=False)

    def whole(self, hidden: Tensor) -> Tensor:
        return self._stream.whole(hidden)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., H], [R, H] -> [..., V]."""
        ranks = self._group.size
        sizes = [vocabulary_rows(self._vocab_size, ranks, index).size for index in range(ranks)]
        own = functional.pad(self.rule.capped(hidden @ weight.t()), (0, sizes[0] - self._part.size))
        gathered = collectives.gather(own, self._group)
        return torch.cat([each[..., :size] for each, size in zip(gathered, sizes, strict=True)], dim=-1)

    def _chunk(self, products: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """`megalm.model.loss.chunk_loss` on this rank's products [C, R]."""
        logits = self.rule.capped(products)
        maxima = collectives.maximum_over(logits.amax(dim=-1).float(), self._group)
        local, held = _local(labels.clamp(min=0), self._part)
        exponentials, sums = self._exponentials(logits, maxima, local, held)
        denominators, targets = collectives.sum_over(sums, self._group)
        valid = labels != IGNORE
        log_sums = denominators.log()
        losses = (log_sums - targets) * valid
        if not gradient:
            return losses, products
        factor = self.rule.gradient_factor(log_sums + maxima)
        gradients = self._gradient(exponentials, factor / denominators, local, held, valid)
        if self.rule.softcap is not None:
            gradients = gradients * self.rule.slope(logits.float())
        return losses, gradients.to(products.dtype)


def _local(tokens: Tensor, part: DimRange) -> tuple[Tensor, Tensor]:
    """Row of each token in this rank's part (any row for a token of another part), and whether it is of this part."""
    held = (tokens >= part.first) & (tokens < part.last)
    return (tokens - part.first).clamp(0, part.size - 1), held


def _exponentials(logits: Tensor, maxima: Tensor, local: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - maximum) [C, R] in fp32; this rank's part of their sums and of the targets' logits [2, C]."""
    shifted = logits.float() - maxima.unsqueeze(1)
    targets = shifted.gather(1, local.unsqueeze(1)).squeeze(1) * held
    exponentials = shifted.exp_()
    return exponentials, torch.stack((exponentials.sum(dim=-1), targets))


def _gradient(exponentials: Tensor, factors: Tensor, local: Tensor, held: Tensor, valid: Tensor) -> Tensor:
    """Gradient of the loss in this rank's logits [C, R]: probabilities, less one at a target in this rank's part."""
    probabilities = exponentials.mul_(factors.unsqueeze(1))
    return probabilities.scatter_add_(1, local.unsqueeze(1), -held.float().unsqueeze(1)).mul_(valid.unsqueeze(1))
