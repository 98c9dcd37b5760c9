from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.ops import codebook

steps = st.lists(st.floats(0.25, 2, width=32), min_size=1, max_size=15).map(torch.tensor)
values = st.lists(st.floats(-4, 40, width=32), min_size=1, max_size=64).map(torch.tensor)


def table(steps):
    return torch.nn.functional.pad(steps.cumsum(0), (1, 0)) - 1


@given(values, steps)
def test_the_result_is_the_nearest_level_and_a_tie_goes_down(x, steps):
    levels = table(steps)
    y = codebook.quantize_to_levels(x, levels)
    distance = (x.double()[:, None] - levels.double()).abs()
    assert torch.isin(y, levels).all()
    # The midpoint itself is rounded to float32, so "nearest" holds to one rounding of it.
    assert ((y.double() - x.double()).abs() <= distance.min(1).values + 1e-5).all()
    assert torch.equal(codebook.quantize_to_levels(codebook.midpoints(levels), levels), levels[:-1])


@given(values, steps)
def test_the_gradient_is_the_straight_through_one_written_with_rounding(x, steps):
    """The same gradient by autograd through L[k-1] + gap * round(u), with d round(u) := du."""
    x, levels = x.double(), table(steps).double()
    leaves = x.clone().requires_grad_(), levels.clone().requires_grad_()
    ours = torch.autograd.grad(codebook.quantize_to_levels(*leaves).sum(), leaves)

    leaves = x.clone().requires_grad_(), levels.clone().requires_grad_()
    low_end, high_end = leaves[1][0], leaves[1][-1]
    clipped = torch.where(x < levels[0], low_end, torch.where(x > levels[-1], high_end, leaves[0]))
    upper = torch.searchsorted(levels, clipped.detach()).clamp(1, len(levels) - 1)
    low, gap = leaves[1][upper - 1], leaves[1][upper] - leaves[1][upper - 1]
    u = (clipped - low) / gap
    rounded = u + ((u > 0.5).double() - u).detach()
    theirs = torch.autograd.grad((low + gap * rounded).sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@given(values, steps)
def test_codes_and_levels_are_inverse(x, steps):
    levels = table(steps)
    codes = codebook.encode(x, codebook.midpoints(levels))
    assert torch.equal(codebook.decode(codes, levels), codebook.quantize_to_levels(x, levels))
    assert torch.equal(codebook.encode(levels, codebook.midpoints(levels)), torch.arange(len(levels)).byte())


def test_worked_example_of_the_unsigned_method():
    """Levels 0, 1, 1.5, 3.5; the numbers are worked out by hand from the definition."""
    levels = torch.tensor([0, 1, 1.5, 3.5], requires_grad=True)
    x = torch.tensor([-0.3, 0.2, 0.6, 1.1, 1.3, 2.0, 2.6, 4.0], requires_grad=True)
    y = codebook.quantize_to_levels(x, levels)
    assert y.tolist() == [0, 0, 1, 1, 1.5, 1.5, 3.5, 3.5]
    y.backward(torch.arange(1.0, 9))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]
    gaps = levels.grad.flip(0).cumsum(0).flip(0)[1:]  # a gap moves all levels above it
    torch.testing.assert_close(gaps, torch.tensor([8.8, 9.2, 9.65]))


def test_nan_stays_nan_and_infinities_go_to_the_ends():
    levels = torch.tensor([-1.0, 0, 2])
    y = codebook.quantize_to_levels(torch.tensor([float("nan"), float("inf"), float("-inf")]), levels)
    assert y[0].isnan() and y[1:].tolist() == [2, -1]


def test_per_channel_tables_are_the_per_tensor_op_row_by_row():
    torch.manual_seed(0)
    x, levels = torch.randn(3, 4, 5), torch.randn(3, 4).sort(1).values
    grad = torch.randn_like(x)
    leaves = x.clone().requires_grad_(), levels.clone().requires_grad_()
    codebook.quantize_to_levels(*leaves).backward(grad)
    for c in range(3):
        row = x[c].clone().requires_grad_(), levels[c].clone().requires_grad_()
        codebook.quantize_to_levels(*row).backward(grad[c])
        torch.testing.assert_close((leaves[0].grad[c], leaves[1].grad[c]), (row[0].grad, row[1].grad))


def test_the_middle_of_every_bin_and_outer_bins_as_wide_as_their_neighbours():
    thresholds = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    assert codebook.middles(thresholds).tolist() == [[-1.5, -0.5, 1.0, 3.0], [-0.5, 0.5, 1.5, 2.5]]
    even = torch.arange(-4, 4) * 0.3
    torch.testing.assert_close(codebook.middles(codebook.midpoints(even)), even)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_decoding_gives_each_level_the_gradient_of_its_entries(shape):
    torch.manual_seed(0)
    levels = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    codes = torch.randint(0, 4, (3, 40), dtype=torch.uint8)  # code 4 is empty
    assert torch.equal(codebook.decode_with_gradient(codes, levels), codebook.decode(codes, levels))
    assert torch.autograd.gradcheck(lambda t: codebook.decode_with_gradient(codes, t), (levels,))
    counts = codebook.sum_by_code(codes, torch.ones(3, 40), levels.shape)
    rows = codes if len(shape) == 2 else codes.view(1, -1)
    assert counts.view(len(rows), 5).tolist() == [[float((row == k).sum()) for k in range(5)] for row in rows]


@pytest.mark.parametrize("negative", [0, 1, 3, 4])
def test_gaps_add_up_on_both_sides_of_zero(negative):
    gaps = (torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(negative)) + 0.1).requires_grad_()
    levels = codebook.levels_around_zero(gaps, negative)
    assert (levels[:, negative] == 0).all()
    torch.testing.assert_close(levels.diff(dim=1), gaps)
    assert torch.autograd.gradcheck(lambda g: codebook.levels_around_zero(g, negative), (gaps,))
    assert torch.autograd.gradgradcheck(lambda g: codebook.levels_around_zero(g, negative) ** 2, (gaps,))
