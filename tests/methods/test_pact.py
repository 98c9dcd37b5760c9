"""PACT: its rule in float64, and LSQ without the rounding residual."""

from __future__ import annotations

import pytest
import torch

from nulsq_cli.errors import UsageError
from nulsq_cli.initializers import measure
from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.methods.dorefa import DoReFa
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import Bits, QuantSpec


def made(bits: int = 3, signed: bool = False, alpha: float = 1.7, **options):
    return make_quantizer("pact", QuantSpec(bits, signed), alpha=alpha, **options).train()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_rounded_forward_and_clipped_backward(bits):
    quantizer = made(bits).double()
    torch.manual_seed(0)
    x, g = torch.randn(400, dtype=torch.float64) * 2, torch.randn(400, dtype=torch.float64)
    x[:2] = torch.tensor([0.0, quantizer.alpha.item()], dtype=torch.float64)  # 0 is inside, alpha is not
    leaf = x.clone().requires_grad_()
    y = quantizer.quantize(leaf)
    a, gaps = quantizer.alpha.detach(), 2**bits - 1
    torch.testing.assert_close(y.detach(), (x.clamp(0, float(a)) * gaps / a).round() * a / gaps)
    y.backward(g)
    torch.testing.assert_close(leaf.grad, g * ((x >= 0) & (x < a)))
    torch.testing.assert_close(quantizer.alpha.grad, (g * (x >= a)).sum().view(1))


@pytest.mark.parametrize("signed", (False, True))
def test_it_is_lsq_without_the_residual(signed):
    quantizer = made(3, signed).double()
    low, high = -quantizer.spec.negative, quantizer.spec.positive
    torch.manual_seed(1)
    x, g = torch.randn(500, dtype=torch.float64) * 2, torch.randn(500, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = (quantizer.alpha.detach() / high).requires_grad_()
    y, lsq = quantizer.quantize(mine), quantize_to_grid(theirs, step, low, high)
    y.backward(g)
    lsq.backward(g)
    torch.testing.assert_close(y, lsq)
    torch.testing.assert_close(mine.grad, theirs.grad)
    inside = theirs.grad != 0
    residual = (g * (x / step).round().sub(x / step) * inside).sum()
    torch.testing.assert_close(quantizer.alpha.grad, (step.grad - residual).detach() / high)


def test_the_penalty_is_weight_decay_on_alpha_and_can_be_left_out():
    quantizer = made(penalty=0.02)
    quantizer.penalty().backward()
    torch.testing.assert_close(quantizer.alpha.grad, 0.02 * quantizer.alpha.detach())
    assert made(penalty=0).penalty() is None


def test_starts():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).relu()
    quantizer = made(3, alpha=7.0)
    quantizer.initialize(measure(x), "lsq")
    torch.testing.assert_close(quantizer.alpha.detach(), (2 * x.mean() * 7**0.5).view(1))
    quantizer.initialize(measure(x), "paper")
    assert quantizer.alpha.item() == 7
    quantizer.alpha.data.fill_(-3)
    quantizer.after_step()
    assert 0 < quantizer.alpha.item() < 1e-2


def test_weights_are_those_of_dorefa_and_options_are_checked():
    assert isinstance(make_quantizer("pact", QuantSpec(3, True, "weight"), alpha=6.0), DoReFa)
    for option in ({"alpha": 0.0}, {"alpha": float("nan")}, {"penalty": -1.0}):
        with pytest.raises(UsageError, match="alpha must be positive"):
            made(**option)
    assert METHODS["pact"].complaint(Bits(4, 32), "tensor", None)
    assert METHODS["pact"].complaint(Bits(4, 4), "channel", None)
    assert METHODS["pact"].complaint(Bits(32, 4), "channel", None) is None
