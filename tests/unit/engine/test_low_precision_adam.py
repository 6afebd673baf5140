"""Moments in fewer bytes: what rounding may change, what it may not, and where a tensor is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.engine.optimizer.low_precision_adam import LowPrecisionAdam, Moment
from megalm.engine.optimizer.moment_codecs import BLOCK, Bf16Codec, EightBitCodec, MomentCodec, random_bits

CODECS: dict[str, MomentCodec] = {
    "bf16": Bf16Codec(),
    "8bit mean": EightBitCodec(signed=True),
    "8bit square": EightBitCodec(signed=False),
}
# Half the distance of two neighbours, as a part of the lower one: 8 bits of mantissa, or 12 levels in an octave.
PRECISION = {"bf16": 2.0**-8, "8bit mean": 1 / 24, "8bit square": 1 / 24}
# The lowest level, as a part of the block's largest value: 126 or 255 levels below it.
LOWEST = {"bf16": 0.0, "8bit mean": 2.0**-10.3, "8bit square": 2.0**-21}
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")


def _values(name: str, blocks: int = 64) -> Tensor:
    """Blocks of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(blocks, BLOCK, generator=generator) * 10.0 ** torch.arange(-32, 32)[:blocks, None] * 0.1
    values[5] = 0.0
    values[6, 7] = 0.0
    return values.square().clamp(max=1e30) if name == "8bit square" else values.clamp(-1e30, 1e30)


def _rounded(codec: MomentCodec, values: Tensor, random: Tensor | None = None) -> Tensor:
    stored = codec.zeros(len(values), values.device)
    codec.encode(values, stored, random)
    return codec.decode(stored)


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("at_random", [False, True])
def test_a_decoded_block_is_encoded_as_the_same_bits(name: str, at_random: bool) -> None:
    values = _values(name)
    bits = random_bits(values, 3)[0] if at_random else None
    once = _rounded(CODECS[name], values, bits)
    assert torch.equal(_rounded(CODECS[name], once), once)
    assert not once[5].any()


@pytest.mark.parametrize("name", list(CODECS))
def test_the_relative_precision_is_the_same_for_small_values(name: str) -> None:
    values = _values(name)
    largest = values.abs().amax(dim=1, keepdim=True)
    covered = (values.abs() > LOWEST[name] * largest) & (largest > 2.0**-94)
    rounded = _rounded(CODECS[name], values)
    error = (rounded - values).abs()[covered] / values.abs()[covered]
    assert 0.9 * PRECISION[name] < error.max() <= PRECISION[name]
    if name == "8bit square":  # never zero where the block is not: Adam divides by its root
        assert (rounded > 0).all(dim=1).tolist() == (largest[:, 0] >= 2.0**-94).tolist()


@pytest.mark.parametrize("name", list(CODECS))
def test_random_rounding_has_the_value_as_its_mean(name: str) -> None:
    values = torch.full((200, BLOCK), 0.4321)
    values[:, 0] = 1.0
    noise = torch.randn(200, BLOCK, generator=torch.Generator().manual_seed(1))
    found = _rounded(CODECS[name], values, random_bits(noise, 1)[0])[:, 1:]
    assert len(found.unique()) == 2
    assert float(found.mean()) == pytest.approx(0.4321, rel=1e-3)


def test_the_random_bits_are_uniform_and_differ_by_step() -> None:
    gradients = torch.randn(400, BLOCK, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    seen = [bits for step in (1, 2) for bits in random_bits(gradients, step)]
    for bits in seen:
        assert bits.min() >= 0
        assert bits.max() < 2**16
        assert float(bits.float().mean()) == pytest.approx(2**15, rel=0.02)
    correlations = torch.corrcoef(torch.stack([bits.float().view(-1) for bits in seen])) - torch.eye(4)
    assert correlations.abs().max() < 0.05


def _optimizer(flat: nn.Parameter, states: Any, decoupled: bool = True, decay: float = 0.1) -> LowPrecisionAdam:
    groups = [{"params": [flat], "weight_decay": decay}]
    return LowPrecisionAdam(groups, states, (0.9, 0.95), 1e-8, decoupled)


def _step(optimizer: torch.optim.Optimizer, flat: nn.Parameter, gradient: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    flat.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_the_first_update_is_torch_s_and_later_ones_stay_near(states: str, decoupled: bool) -> None:
    """The moments of the first update come from zero and are used before they are rounded."""
    generator = torch.Generator().manual_seed(0)
    start, count = torch.randn(1000, generator=generator), 1000
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = _optimizer(mine, states, decoupled)
    optimizer.lay_out(mine, [(0, 0, 300), (300, 40, 700)])
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(30):
        gradient = torch.randn(count, generator=generator) + 0.5
        _step(optimizer, mine, gradient.clone())
        _step(reference, theirs, gradient.clone())
        if step == 0:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    moved, apart = (theirs - start).abs().mean(), (mine - theirs).abs().mean()
    assert apart < (0.003 if states == "bf16" else 0.05) * moved


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_a_cut_on_a_block_s_edge_changes_nothing(states: str) -> None:
    """Whole, or in two tensors of two ranks, and with other parameters before it: the same weights and moments."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(1000, generator=generator), torch.randn(5, 1000, generator=generator)
    before = torch.ones(77)
    whole = nn.Parameter(torch.cat([before, start, torch.zeros(3)]))
    parts = [nn.Parameter(start[:512].clone()), nn.Parameter(start[512:].clone())]
    one = _optimizer(whole, states)
    one.lay_out(whole, [(77, 0, 1000), (0, 0, 77)])
    others = [_optimizer(part, states) for part in parts]
    others[0].lay_out(parts[0], [(0, 0, 512)])
    others[1].lay_out(parts[1], [(0, 512, 488)])
    for gradient in gradients:
        _step(one, whole, torch.cat([before, gradient, torch.zeros(3)]))
        _step(others[0], parts[0], gradient[:512].clone())
        _step(others[1], parts[1], gradient[512:].clone())
    assert torch.equal(whole[77:1077], torch.cat([*parts]))
    assert not whole[1077:].any()
    for moment in MOMENTS:
        halves = [other.read(part, 0, moment) for other, part in zip(others, parts, strict=True)]
        assert torch.equal(one.read(whole, 77, moment), torch.cat(halves))


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_written_moments_go_on_bit_equal(states: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 900, generator=generator)
    flat = nn.Parameter(torch.randn(900, generator=generator))
    optimizer = _optimizer(flat, states)
    optimizer.lay_out(flat, [(0, 100, 500), (500, 0, 400)])
    for gradient in gradients[:3]:
        _step(optimizer, flat, gradient.clone())
    again = nn.Parameter(flat.detach().clone())
    other = _optimizer(again, states)
    other.lay_out(again, [(0, 100, 500), (500, 0, 400)])
    other.clear(again, step=3)
    for offset in (0, 500):
        for moment in MOMENTS:
            other.write(again, offset, moment, optimizer.read(flat, offset, moment))
    for gradient in gradients[3:]:
        _step(optimizer, flat, gradient.clone())
        _step(other, again, gradient.clone())
    assert torch.equal(flat, again)


def test_a_tensor_that_is_not_laid_out_stays_as_it_is() -> None:
    """DeepSpeed may step while it builds its engine."""
    flat = nn.Parameter(torch.ones(4))
    optimizer = _optimizer(flat, "8bit")
    _step(optimizer, flat, torch.ones(4))
    assert torch.equal(flat, torch.ones(4))
    assert not optimizer.state


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_the_second_moment_falls_by_a_thousandth_a_step(states: str) -> None:
    """Rounded to the nearest, bf16 would keep it for ever."""
    flat = nn.Parameter(torch.zeros(2048))
    optimizer = LowPrecisionAdam([{"params": [flat]}], states, (0.9, 0.999), 1e-8, decoupled=True)  # type: ignore[arg-type]
    optimizer.lay_out(flat, [(0, 0, 2048)])
    optimizer.clear(flat, step=0)
    optimizer.write(flat, 0, "exp_avg_sq", torch.rand(2048, generator=torch.Generator().manual_seed(0)) + 0.1)
    before = optimizer.read(flat, 0, "exp_avg_sq").mean()
    for _ in range(400):
        _step(optimizer, flat, torch.zeros(2048))
    assert float(optimizer.read(flat, 0, "exp_avg_sq").mean() / before) == pytest.approx(0.999**400, rel=0.02)
