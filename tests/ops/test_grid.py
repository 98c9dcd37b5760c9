from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.ops import codebook, grid

values = st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=64).map(torch.tensor)


@given(values, st.floats(0.125, 3, width=32), st.integers(2, 8), st.booleans())
def test_the_gradient_is_the_straight_through_one(x, step, bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x, step = x.double().requires_grad_(), torch.tensor([step], dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(grid.quantize_to_grid(x, step, low, high).sum(), (x, step))
    place = x / step
    clipped = torch.where(place < low, torch.tensor(float(low)), torch.where(place > high, torch.tensor(float(high)), place))
    straight = clipped + (clipped.round() - clipped).detach()
    theirs = torch.autograd.grad((straight * step).sum(), (x, step))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@given(values, st.floats(0.125, 3, width=32), st.integers(2, 4))
def test_an_even_table_gives_the_same_gradient_away_from_ties(x, step, bits):
    """Moving one step moves every level by its code: the two ops agree on even levels."""
    count = 2**bits
    codes = torch.arange(count, dtype=torch.float64) - count // 2
    x, step = x.double(), torch.tensor([step], dtype=torch.float64)
    place = x / step
    away = ((place - place.floor() - 0.5).abs() > 1e-6) & ((place - place.round()).abs() > 1e-6)
    x = x[away].requires_grad_()
    step.requires_grad_()
    one = torch.autograd.grad(grid.quantize_to_grid(x, step, -(count // 2), count // 2 - 1).sum(), (x, step))
    two = torch.autograd.grad(codebook.quantize_to_levels(x, step * codes).sum(), (x, step))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def test_a_step_per_channel_is_the_op_row_by_row():
    torch.manual_seed(0)
    x, step, grad = torch.randn(4, 2, 3, 3), torch.rand(4, 1, 1, 1) + 0.1, torch.randn(4, 2, 3, 3)
    leaves = x.clone().requires_grad_(), step.clone().requires_grad_()
    grid.quantize_to_grid(*leaves, -2, 1).backward(grad)
    for c in range(4):
        row = x[c].clone().requires_grad_(), step[c].reshape(1).clone().requires_grad_()
        grid.quantize_to_grid(*row, -2, 1).backward(grad[c])
        torch.testing.assert_close((leaves[0].grad[c], leaves[1].grad[c].reshape(1)), (row[0].grad, row[1].grad))
