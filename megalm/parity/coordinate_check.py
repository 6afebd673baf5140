"""The coordinate check of the maximal-update parametrisation (Yang et al., 2022, "Tensor Programs V", appendix D.1).

A small model with the run's settings takes a few steps at several widths. If learning rate and initial weights
transfer, neither the size of an activation nor its change depends on the width. Shapes: B batch, T sequence, N heads, D
head dimension.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megalm.config.schema import ModelSection
from megalm.data.sampling.samples import Samples
from megalm.engine.optimizer.build_optimizer import build_optimizer, parameter_groups
from megalm.engine.optimizer.muon import Muon
from megalm.engine.optimizer.optimizer_state import OwnedRange
from megalm.model.layer_factory import shard_of
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.transformer import Block, LanguageModel, initialize
from megalm.parallel.process_groups import AxisGroup, ParallelGroups
from megalm.planning.resolve import ResolvedRun
from megalm.topology import Topology
from megalm.utils.formatting import table
from megalm.utils.plotting import new_plot, save_plot

WIDTHS = (64, 128, 256, 512)
STEPS = 4
LENGTH = 64  # tokens of a sequence
TOLERANCE = 0.3  # of a slope; a scaling left out changes one by 0.5 or more
_BATCH = 4  # sequences of a step
_PROBE = 2  # sequences whose activations are compared
_LAYERS, _HEADS = 2, 4

Span = tuple[float, float]
# Activation -> the slopes over the width, of its size before the first step and of its change. Queries are independent
# of keys at first, and the head of the hidden states: such sums over D terms, divided by D, fall as 1/sqrt(D), and stay
# once the two have learned from each other.
EXPECTED: Mapping[str, tuple[Span, Span]] = {
    **dict.fromkeys(("embedding", "attention", "mlp", "residual stream"), ((0.0, 0.0), (0.0, 0.0))),
    **dict.fromkeys(("scores", "logits"), ((-0.5, -0.5), (-0.5, 0.0))),
}


@dataclass(frozen=True)
class Coordinate:
    """The mean absolute value of an activation by width.

    Attributes:
        moment: "initial", before the first step, or "change", between then and after the last one.
        expected: lowest and highest slope, without the tolerance.
    """

    activation: str
    moment: str
    sizes: tuple[float, ...]
    slope: float
    expected: Span

    @property
    def passes(self) -> bool:
        lowest, highest = self.expected
        return lowest - TOLERANCE <= self.slope <= highest + TOLERANCE

    @property
    def allowed(self) -> str:
        lowest, highest = self.expected
        return f"{lowest - TOLERANCE:+.1f} .. {highest + TOLERANCE:+.1f}"

    @property
    def name(self) -> str:
        return f"{self.activation}, {self.moment}"


@dataclass(frozen=True)
class CoordinateCheck:
    """What was measured, for each activation twice."""

    widths: tuple[int, ...]
    coordinates: tuple[Coordinate, ...]

    @property
    def setting(self) -> str:
        widths = ", ".join(map(str, self.widths))
        size = f"{_HEADS} heads, at most {_LAYERS} layers"
        return f"hidden_size {widths}; {size}; {STEPS} steps of {_BATCH} x {LENGTH} tokens"

    @property
    def failures(self) -> list[Coordinate]:
        return [it for it in self.coordinates if not it.passes]

    def text(self) -> str:
        rows = [
            [
                it.name,
                *(f"{size:.2e}" for size in it.sizes),
                f"{it.slope:+.2f}",
                it.allowed,
                "yes" if it.passes else "NO",
            ]
            for it in self.coordinates
        ]
        return table(["mean absolute value", *map(str, self.widths), "slope", "expected", "holds"], rows)

    def draw(self, path: Path) -> None:
        """Plot the changes over the width, both logarithmic.

        Raises:
            ConfigError: the file's suffix names no picture format, or the file cannot be written.
        """
        figure, axes = new_plot("hidden_size", "mean absolute change")
        for it in self.coordinates:
            if it.moment == "change":
                axes.plot(self.widths, it.sizes, marker="o", label=f"{it.activation} ({it.slope:+.2f})")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(self.widths, [str(width) for width in self.widths])
        axes.legend(title="slope")
        save_plot(figure, path)


def check_coordinates(
    run: ResolvedRun,
    samples: Samples,
    vocab_size: int,
    widths: Sequence[int] = (),
    advance: Callable[[float], None] = lambda part: None,
) -> CoordinateCheck:
    """Train the run's model in small at each width, with its optimizer, rates by parameter and peak learning rate.

    Args:
        samples: of at least `LENGTH` tokens, with ids below `vocab_size`.
        widths: by default `WIDTHS`; the first is the base width of a run with `model.mup_base_width`.
        advance: called with the share of the work that is done since the last call.
    """
    widths, measured = widths or WIDTHS, []
    for width in widths:
        shape, part = shape_at(run, width, widths[0], vocab_size), width / sum(widths) / STEPS
        measured.append(_sizes(run, shape, samples, partial(advance, part)))
    coordinates = []
    for activation, expected in EXPECTED.items():
        for moment, name in enumerate(("initial", "change")):
            sizes = tuple(each[activation][moment] for each in measured)
            coordinates.append(Coordinate(activation, name, sizes, slope(widths, sizes), expected[moment]))
    return CoordinateCheck(tuple(widths), tuple(coordinates))


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The exponent of the width in `sizes`; 0 of what never changes, not a number of what is not finite."""
    if not all(map(math.isfinite, sizes)):
        return math.nan
    if not any(sizes):
        return 0.0
    logarithms = [math.log(max(size, 1e-30)) for size in sizes]
    return statistics.linear_regression([math.log(width) for width in widths], logarithms).slope


def shape_at(run: ResolvedRun, width: int, base: int, vocab_size: int) -> ModelConfig:
    """The run's model in small: 2 layers and 4 heads, whose dimension grows with the width, as that of the MLP does."""
    own = run.config.model
    whole = build_model_config(own, vocab_size, LENGTH)
    shared = whole.num_attention_heads / whole.num_key_value_heads
    head_dim = width // _HEADS
    rotated = 2 * max(1, int(head_dim * own.partial_rotary_factor / 2))
    section: ModelSection = own.model_copy(
        update={
            "hidden_size": width,
            "mup_base_width": None if own.mup_base_width is None else base,
            "num_hidden_layers": min(_LAYERS, own.num_hidden_layers),
            "num_attention_heads": _HEADS,
            "num_key_value_heads": max(groups for groups in (1, 2, 4) if groups == 1 or groups * shared <= _HEADS),
            "head_dim": head_dim,
            "partial_rotary_factor": rotated / head_dim,
            "intermediate_size": round(width * whole.intermediate_size / whole.hidden_size),
            "max_position_embeddings": LENGTH,
            "vocab_size": vocab_size,
            "vocab_multiple": None,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
    )
    return build_model_config(section, vocab_size, LENGTH)


def train_steps(
    run: ResolvedRun, model: LanguageModel, shape: ModelConfig, samples: Samples, rates: Sequence[float]
) -> Iterator[float]:
    """Take a step in fp32 at each of the learning rates, by the run's optimizer; yield the step's loss per token."""
    train = run.config.train.model_copy(update={"optimizer_state": "fp32"})
    run = replace(run, config=run.config.model_copy(update={"train": train}))
    groups = parameter_groups(model, run, shape.width_multiplier)
    optimizer = build_optimizer(groups, run, offload=False)
    if isinstance(optimizer, Muon):
        _lay_out(optimizer, model)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]
        tokens, labels = _batch(samples, step * _BATCH, _BATCH)
        total, count = model(tokens, labels)
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def _lay_out(optimizer: Muon, model: nn.Module) -> None:
    """One rank holds every matrix whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    alone = AxisGroup((0,), 0, None)  # type: ignore[arg-type]  # one rank sends nothing
    layout = ParallelGroups(Topology(1), Topology(1).coordinate(0), *[alone] * 8)
    units = []
    for group in optimizer.param_groups:
        if "momentum_buffer" in group["moments"]:
            flats = group["params"]
            owned = [OwnedRange(names[id(flat)], shard_of(flat), 0, flat.numel(), flat, 0) for flat in flats]
            units.append((flats, [owned]))
    optimizer.lay_out(units, layout, is_copied=True)


def _batch(samples: Samples, first: int, count: int) -> tuple[Tensor, Tensor]:
    """[B, T] tokens and labels."""
    rows = [samples.sample(index) for index in range(first, first + count)]
    tokens, labels = (torch.from_numpy(np.stack([row[part][:LENGTH] for row in rows])).long() for part in (0, 1))
    return tokens, labels


def _sizes(
    run: ResolvedRun, shape: ModelConfig, samples: Samples, advance: Callable[[], None]
) -> dict[str, tuple[float, float]]:
    """Activation -> its mean absolute value before the first step, and that of its change."""
    model = LanguageModel(shape)
    initialize(model, shape, run.config.train.seed)
    tokens, _ = _batch(samples, STEPS * _BATCH, _PROBE)
    before = activations(model, shape, tokens)
    for _ in train_steps(run, model, shape, samples, [run.schedule.peak_learning_rate] * STEPS):
        advance()
    after = activations(model, shape, tokens)
    return {
        name: (float(values.abs().mean()), float((after[name] - values).abs().mean()))
        for name, values in before.items()
    }


@torch.no_grad()
def activations(model: LanguageModel, shape: ModelConfig, tokens: Tensor) -> dict[str, Tensor]:
    """Activation -> its values in all blocks, for the names of `EXPECTED`; scores are those before rotation."""
    seen: dict[str, list[Tensor]] = {}
    blocks = [block for block in model.layers if isinstance(block, Block)]
    places: dict[str, list[nn.Module]] = {
        "embedding": [model.embedding],
        "attention": [block.attention for block in blocks],
        "mlp": [block.mlp for block in blocks],
        "residual stream": list(blocks),
        "query": [block.attention.query_norm for block in blocks],
        "key": [block.attention.key_norm for block in blocks],
    }

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, given, result: seen.setdefault(name, []).append(result)

    hooks = [module.register_forward_hook(keep(name)) for name, modules in places.items() for module in modules]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    scale = shape.attention_scale or 1 / math.sqrt(shape.head_dim)
    heads = [[each.view(*tokens.shape, -1, shape.head_dim) for each in seen.pop(name)] for name in ("query", "key")]
    shared = shape.num_attention_heads // shape.num_key_value_heads
    seen["scores"] = [
        scale * torch.einsum("btnd,bsnd->bnts", query, key.repeat_interleave(shared, dim=2))
        for query, key in zip(*heads, strict=True)
    ]
    return {name: torch.stack(values) for name, values in seen.items()} | {"logits": logits}
