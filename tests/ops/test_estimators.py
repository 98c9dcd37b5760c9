"""The rules about gradients against plain autograd, in float64."""

from __future__ import annotations

import torch

from nulsq_cli.ops import estimators

torch.manual_seed(0)
X, G = torch.randn(6, 40, dtype=torch.float64) * 2, torch.randn(6, 40, dtype=torch.float64)


def ends(low: float, high: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (low, high))


def leaf() -> torch.Tensor:
    return X.clone().requires_grad_()


def test_clip_gives_each_end_what_it_holds_back():
    x, (low, high) = leaf(), ends(-1.2, 0.7)
    truth = torch.where(x < low, low, torch.where(x >= high, high, x))
    y = estimators.clip(x, low, high)
    assert torch.equal(y, truth)
    torch.testing.assert_close(torch.autograd.grad(y, (x, low, high), G), torch.autograd.grad(truth, (x, low, high), G))


def test_clip_at_its_ends_and_at_nan():
    x, (low, high) = torch.tensor([-1.0, 2.0, float("nan")], dtype=torch.float64, requires_grad=True), ends(-1, 2)
    y = estimators.clip(x, low, high)
    y.sum().backward()
    assert y[:2].tolist() == [-1, 2] and y[2].isnan()
    assert x.grad[:2].tolist() == [1, 0] and (low.grad.item(), high.grad.item()) == (0, 1)


def test_to_unit_is_the_affine_map_inside_and_still_outside():
    x, (low, high) = leaf(), ends(-1.2, 0.7)
    place = (x - low) / (high - low)
    truth = torch.where(place < 0, 0.0, torch.where(place > 1, 1.0, place))
    y = estimators.to_unit(x, low, high)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(torch.autograd.grad(y, (x, low, high), G), torch.autograd.grad(truth, (x, low, high), G))


def test_to_unit_counts_its_ends_as_inside():
    x, (low, high) = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True), ends(-1, 2)
    estimators.to_unit(x, low, high).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 3))


def test_straight_through_takes_the_value_here_and_the_gradient_there():
    value, surrogate = leaf(), leaf()
    y = estimators.straight_through(value.round(), 3 * surrogate)
    y.backward(G)
    assert torch.equal(y, X.round()) and value.grad is None and torch.equal(surrogate.grad, 3 * G)
