"""Experts: several MLPs in the place of one, of which a router gives each token a few (Shazeer et al., 2017).

Whatever the experts' load, the rows of all tokens are sorted by expert, and one grouped product multiplies each stretch
of them by its own expert's matrix. No token is dropped, unless training states a capacity: what an expert gets of a
sequence beyond it then has the weight 0.

Shapes: B batch, T sequence, or the part of it that is held here, N = B x T tokens, H hidden, E experts, of which L are
held here, K experts of a token, R = N x K rows, A rows for the experts held here, I the inner size of an expert, or the
part of it that is held here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.layer_factory import LayerFactory, WholeSequence
from megalm.model.model_config import ModelConfig
from megalm.model.modules import ACTIVATIONS
from megalm.model.recomputation import in_backward
from megalm.model.weight_gradients import SplitGroupedProduct

# What `MixtureOfExperts.statistics` has behind the experts.
STATISTICS = ("dropped", "entropy", "balance_loss", "z_loss")

_ROUNDING = 1e-9  # of a product that would be whole
_TINY = 1e-20  # a sum of sigmoids can be 0


@dataclass(frozen=True)
class Routing:
    """Where the router sends tokens.

    Attributes:
        logits: [B, T, E], fp32.
        probabilities: [B, T, E], fp32; each token's add up to 1.
        experts: [B, T, K], the numbers of each token's experts.
        weights: [B, T, K], fp32, of their outputs.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    weights: Tensor

    def counts(self) -> Tensor:
        """Tokens of each expert in each sequence, fp32 [B, E]."""
        chosen = self.experts.flatten(1)
        zeros = torch.zeros_like(self.probabilities[:, 0])
        return zeros.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=zeros.dtype))

    def within_capacity(self, factor: float, sequence: WholeSequence) -> Tensor:
        """Whether each choice is among the first ceil(factor x K x T / E) of its expert in the sequence, [B, T, K].

        Args:
            sequence: how ranks hold a sequence; T in the formula is all of it.
        """
        length, count = self.probabilities.shape[1:]
        capacity = math.ceil(factor * self.experts.shape[2] * length * sequence.parts / count - _ROUNDING)
        chosen = torch.zeros_like(self.probabilities, dtype=torch.int32).scatter_(2, self.experts, 1)
        return sequence.running_totals(chosen).gather(2, self.experts) <= capacity

    def balance_losses(self, counts: Tensor) -> Tensor:
        """[B, E] -> [B]: E x the sum over experts of (share of tokens) x (mean probability), K at perfect balance.

        That of Switch Transformers (Fedus et al., 2021) and of transformers' `load_balancing_loss_func`, of each
        sequence by itself: so it does not depend on which sequences a micro-batch or a rank holds.
        """
        length, experts = self.probabilities.shape[1:]
        return experts * (counts / length * self.probabilities.mean(1)).sum(1)

    def z_losses(self) -> Tensor:
        """[B]: the mean of log(Z)^2, Z the sum that a softmax of the logits divides by (Zoph et al., 2022)."""
        return self.logits.logsumexp(-1).square().mean(1)

    def entropies(self) -> Tensor:
        """Nats [B, T] of each token's probabilities; log(E) if all are equal."""
        return torch.special.entr(self.probabilities).sum(-1)


class Router(nn.Module):
    """Scores the experts for each token, in fp32, and takes the K best.

    Attributes:
        expert_bias: fp32 [E], added to the scores when the best are chosen, not to the weights (Wang et al., 2024,
            "Auxiliary-Loss-Free Load Balancing"); None: no bias. It is no buffer of torch's, which would be rounded to
            the model's precision.
    """

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        assert shape.num_experts is not None
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size))
        self.top = shape.num_experts_per_token
        self.sigmoid = shape.router_scores == "sigmoid"
        self.normalized = shape.norm_topk_prob
        self.scale = shape.routed_scaling_factor
        self.expert_bias: Tensor | None = None

    def forward(self, hidden: Tensor) -> Routing:  # [B, T, H]
        logits = functional.linear(hidden.float(), self.weight.float())
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        probabilities = scores / (scores.sum(-1, keepdim=True) + _TINY) if self.sigmoid else scores
        if self.expert_bias is None:
            weights, experts = scores.topk(self.top, dim=-1)
        else:
            experts = (scores.detach() + self.expert_bias).topk(self.top, dim=-1).indices
            weights = scores.gather(-1, experts)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return Routing(logits, probabilities, experts, weights * self.scale)


def routers(model: nn.Module) -> dict[str, Router]:
    """Canonical name of the expert bias -> router."""
    named = model.named_modules()
    return {f"{name}.expert_bias": module for name, module in named if isinstance(module, Router)}


class Experts(nn.Module):
    """The experts of a layer: MLPs without biases, whose matrices are stacked in one parameter a projection."""

    def __init__(self, shape: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        count, inner, hidden = shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
        assert count is not None
        assert inner is not None
        self.activation = ACTIVATIONS[shape.hidden_act]
        self._held, self._gradients = layers.experts, layers.weight_gradients
        self.gate = layers.stacked((count, inner, hidden), divided=1) if shape.gated_mlp else None
        self.up = layers.stacked((count, inner, hidden), divided=1)  # [L, I, H]
        self.down = layers.stacked((count, hidden, inner), divided=2)  # [L, H, I]

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [N, H]; where I is a part, an addend of it.

        Args:
            tokens: [N, H].
            experts, weights: [N, K].
            counts: [E] rows of each expert.
        """
        top = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # [R]: the row of `experts` at each place
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sorted_rows = Rows.apply(tokens, order // top, place, top)  # type: ignore[no-untyped-call]  # torch: untyped
        rows, held, combine = self._held.dispatch(sorted_rows, counts)
        ends = held.cumsum(0).to(torch.int32)  # [L]
        inner = self._grouped(rows, self.up, ends)
        if self.gate is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(self._grouped(rows, self.gate, ends)) * inner
        outputs = Rows.apply(combine(self._grouped(inner, self.down, ends)), place, order, 1)  # type: ignore[no-untyped-call]  # torch: untyped
        # A product, which adds up in fp32.
        outputs = outputs.view(*experts.shape, -1)
        return torch.bmm(weights.to(outputs.dtype).unsqueeze(1), outputs).squeeze(1)

    def _grouped(self, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """[A, in], [L, out, in] -> [A, out]: rows up to the first of `ends` [L] by the first matrix, and so on."""
        if self._gradients is not None:
            return SplitGroupedProduct.apply(rows, matrices, ends, self._gradients)  # type: ignore[no-untyped-call]  # torch: untyped
        return functional.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


class Rows(torch.autograd.Function):
    """tensor[index], where each row of the tensor is taken `copies` times; `places` are the copies' rows in turn.

    The gradient is gathered as well: the one of indexing adds rows up in an order that changes on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        gathered = gradients[0].index_select(0, places)
        if ctx.copies > 1:
            gathered = gathered.view(-1, ctx.copies, gathered.shape[-1]).sum(1)
        return gathered, None, None, None


class MixtureOfExperts(nn.Module):
    """A router and its experts in the place of an MLP.

    Args:
        shared: the MLP of every token, if the model has one.

    Attributes:
        losses_factor: multiplies the gradient of the router's losses, which are summed over sequences; the engine makes
            it a mean over the sequences of the global batch.
        statistics: fp64 [E + STATISTICS], to which each forward pass of training adds: tokens of each expert, how many
            of them are dropped, the entropies of tokens, and the balance and z losses of sequences. None: nothing.
    """

    def __init__(self, shape: ModelConfig, layers: LayerFactory, shared: nn.Module | None) -> None:
        super().__init__()
        self.router = layers.replicated(Router(shape), sharded=True)
        self.experts = Experts(shape, layers)
        self.shared = shared
        self.losses_factor = 0.0
        self.statistics: Tensor | None = None
        self._stream = layers.stream()
        self._losses = layers.router_losses
        self._sequence = layers.sequence
        self._capacity_factor = layers.expert_capacity_factor

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] of the residual stream -> the same
        # First, so that a recomputation, which ends with the last input that the backward pass reads, spares nothing.
        shared = None if self.shared is None else self.shared(hidden)
        # Each rank of a tensor group routes all tokens, and has a part of each expert: gradients of the router and of
        # its input are sums over the ranks.
        whole = self._stream.whole(hidden)
        routing = self.router(whole)
        counts = routing.counts()  # [B, E]
        weights, dropped = routing.weights, counts.new_zeros(())
        if self._capacity_factor is not None and self.training:
            kept = routing.within_capacity(self._capacity_factor, self._sequence)
            weights, dropped = weights * kept, (~kept).sum()
        chosen = (routing.experts.flatten(0, 1), weights.flatten(0, 1))
        addend = self.experts(whole.flatten(0, 1), *chosen, counts.sum(0)).view_as(whole)
        if self.training and torch.is_grad_enabled():
            addend = self._with_losses(addend, routing, counts, dropped)
        joined = self._stream.join(addend)
        return joined if shared is None else joined + shared

    def _with_losses(self, addend: Tensor, routing: Routing, counts: Tensor, dropped: Tensor) -> Tensor:
        # This rank's addends of the losses of whole sequences.
        parts = self._sequence.parts
        balance = routing.balance_losses(self._sequence.total(counts)).sum() / parts**2
        z = routing.z_losses().sum() / parts
        if self.statistics is not None and not in_backward():
            with torch.no_grad():
                others = torch.stack([dropped, routing.entropies().sum(), balance, z])
                self.statistics += torch.cat([counts.sum(0), others])
        loss = self._losses.balance * balance + self._losses.z * z
        return _WithLoss.apply(addend, loss, self.losses_factor / self._stream.ranks)  # type: ignore[no-untyped-call]  # torch: untyped


class _WithLoss(torch.autograd.Function):
    """`tensor`, with whose gradient the one of factor x `loss` is computed; the loss itself is added to nothing.

    So it needs no way to the model's end, which may be on another stage of a pipeline.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, factor: float) -> Tensor:
        ctx.factor, ctx.like = factor, loss.new_empty(0)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.like.new_full((), ctx.factor), None
