"""Cross-entropy of a language model without the whole batch's logits.

Shapes: N tokens of the micro-batch, C tokens of a chunk, H hidden, V vocabulary.

The forward pass computes the gradients of hidden states and of the projection chunk by chunk, while the chunk's logits
exist; the backward pass only scales them. That takes three matrix products a chunk, one fewer than recomputing the
logits, and holds C x V logits instead of N x V. Its cost is a [V, H] gradient held from forward to backward, which the
backward pass would allocate anyway. A frozen projection has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ChunkLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]

IGNORE = -100  # the label of a token that no loss counts, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class LogitRule:
    """What becomes of the products of hidden states and the vocabulary's weight.

    Attributes:
        softcap: logits are softcap x tanh(product / softcap), as in Gemma 2; None: the products.
        z_loss: coefficient of log(Z)^2, the square of the logarithm of the softmax's sum, which training minimises
            beside the cross-entropy (PaLM: Chowdhery et al., 2022). It is in the gradients and not in the losses, so
            that those of training and validation compare.
    """

    softcap: float | None = None
    z_loss: float = 0.0

    def capped(self, products: Tensor) -> Tensor:
        return products if self.softcap is None else self.softcap * torch.tanh(products / self.softcap)

    def slope(self, capped: Tensor) -> Tensor | float:
        """The derivative of `capped`, from its result."""
        return 1.0 if self.softcap is None else 1 - (capped / self.softcap).square()

    def gradient_factor(self, log_sums: Tensor) -> Tensor | float:
        """What multiplies the probabilities in the logits' gradient: 1 + the derivative of the z-loss by log(Z)."""
        return 1 + 2 * self.z_loss * log_sums if self.z_loss else 1.0


PLAIN = LogitRule()


def chunk_loss(products: Tensor, labels: Tensor, gradient: bool, rule: LogitRule = PLAIN) -> tuple[Tensor, Tensor]:
    """Losses [C] of a chunk [C, V], 0 where a label is IGNORE; with `gradient` that of their sum in the products' type.

    Without, the products stand in its place.
    """
    logits = rule.capped(products)
    valid = (labels != IGNORE).unsqueeze(1)
    targets = labels.clamp(min=0).unsqueeze(1)
    # Exponentials are taken once, for their sum and for the gradient: a log-softmax takes them twice.
    highest = logits.amax(-1, keepdim=True).float()
    shifted = logits.sub(highest).float()  # in fp32, without an fp32 copy of the logits beside it
    target = shifted.gather(1, targets)
    exponentials = shifted.exp_()
    total = exponentials.sum(-1, keepdim=True)
    log_total = total.log()
    losses = ((log_total - target) * valid).squeeze(1)
    if not gradient:
        return losses, products
    factor = rule.gradient_factor(log_total + highest)
    at_target = (target.exp() / total * factor - 1) * valid
    gradients = exponentials.mul_(valid / total * factor)
    if rule.softcap is None:
        return losses, gradients.to(products.dtype).scatter_(1, targets, at_target.to(products.dtype))
    return losses, gradients.scatter_(1, targets, at_target).mul_(rule.slope(logits.float())).to(products.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    chunk: ChunkLoss = chunk_loss,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Sum of cross-entropies of `hidden @ weight.T` against `labels`.

    Args:
        hidden: [N, H], any floating type, which the logits have too; the softmax is computed in fp32.
        weight: [V, H], the same type.
        labels: [N] int64 in [0, V) or IGNORE.
        chunk_tokens: C, the number of tokens whose logits are held at once.
        chunk: `chunk_loss`, compiled or not.
        observe: takes the losses [N] of a forward pass.

    Returns:
        fp32 scalar, a sum: divide by the number of labels of the *global* batch.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_tokens, chunk, observe)  # type: ignore[no-untyped-call]  # torch: untyped
    parts = [chunk(hidden[rows] @ weight.t(), labels[rows], False)[0] for rows in _chunks(len(hidden), chunk_tokens)]
    if observe is not None:
        observe(torch.cat(parts))
    return torch.stack([part.sum() for part in parts]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        chunk: ChunkLoss,
        observe: Callable[[Tensor], None] | None,
    ) -> Tensor:
        parts = []
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over chunks in fp32: in bf16 each further chunk would lose low bits.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), chunk_tokens):
            losses, logits_grad = chunk(hidden[rows] @ weight.t(), labels[rows], True)
            total += losses.sum()
            parts.append(losses)
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                _add_product(weight_grad, logits_grad.t(), hidden[rows])
            del logits_grad  # it would stay beside the next chunk's logits
        if observe is not None:
            observe(torch.cat(parts))
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        (scale,) = outer
        # Scale before narrowing: in fp16 the loss scale keeps small values above the type's smallest number. In place:
        # another fp32 gradient beside this one would be the largest tensor of the step.
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad.mul_(scale).to(ctx.weight_dtype),
            *(None, None, None, None),
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; a GPU adds products of bf16 or fp16 to an fp32 total unrounded, a CPU rounds them."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":  # it has no such product
        total += left @ right
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
