"""DoReFa: its formula in float64, and the tables into which it folds tanh."""

from __future__ import annotations

import pytest
import torch

from nulsq_cli.initializers import measure
from nulsq_cli.methods import make_quantizer
from nulsq_cli.values import QuantSpec


def made(bits: int, role: str, signed: bool):
    return make_quantizer("dorefa", QuantSpec(bits, signed, role)).train()


def test_a_worked_example_with_the_largest_tanh_held_constant():
    w = torch.tensor([-1, -0.2, 0.05, 0.6], requires_grad=True)
    y = made(2, "weight", True)(w)
    torch.testing.assert_close(y.detach(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    y.sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor([0.5514, 1.2619, 1.3098, 0.9343]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_weights(bits):
    torch.manual_seed(0)
    w = torch.randn(300, dtype=torch.float64)
    g = torch.randn(300, dtype=torch.float64)
    leaf, gaps = w.clone().requires_grad_(), 2**bits - 1
    y = made(bits, "weight", True).quantize(leaf)
    largest = w.tanh().abs().max()
    torch.testing.assert_close(y.detach(), 2 * ((w.tanh() / (2 * largest) + 0.5) * gaps).round() / gaps - 1)
    y.backward(g)
    torch.testing.assert_close(leaf.grad, g * (1 - w.tanh().square()) / largest)


@pytest.mark.parametrize("bits", (2, 4))
@pytest.mark.parametrize("signed", (False, True))
def test_activations(bits, signed):
    torch.manual_seed(0)
    x, low, gaps = torch.randn(300, dtype=torch.float64), -1 if signed else 0, 2**bits - 1
    x[:2] = torch.tensor([low, 1.0], dtype=torch.float64)  # the ends are inside
    leaf = x.clone().requires_grad_()
    y = made(bits, "activation", signed).quantize(leaf)
    width = 1 - low
    torch.testing.assert_close(y.detach(), ((x.clamp(low, 1) - low) / width * gaps).round() / gaps * width + low)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, ((x >= low) & (x <= 1)).double())


def test_thresholds_are_on_the_raw_weights_and_follow_them():
    quantizer = made(3, "weight", True)
    for width in (0.01, 1.0, 20.0):
        w = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * width
        tables = quantizer.codebook(w)
        codes = torch.bucketize(w, tables.thresholds)
        near = (w[:, None] - tables.thresholds).abs().amin(1) < 1e-5 * width
        assert near.float().mean() < 1e-3
        torch.testing.assert_close(tables.levels[codes][~near], quantizer(w)[~near], rtol=0, atol=1e-6)


def test_weights_that_are_all_zero_stay_finite():
    w = torch.zeros(8, requires_grad=True)
    quantizer = made(2, "weight", True)
    y = quantizer(w)
    assert y.isfinite().all() and quantizer.codebook(w).thresholds.isfinite().all()


def test_there_is_nothing_to_learn():
    quantizer = made(3, "activation", False)
    before = quantizer.levels()
    quantizer.initialize(measure(torch.rand(50) * 9), "nmse")
    assert quantizer.steps() == [] and torch.equal(quantizer.levels(), before)
