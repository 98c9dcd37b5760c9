import pytest
import torch

from nulsq_cli.ops import companding


def straight_through_reference(x, clip, slopes, heights, gaps, signed):
    """The method's sentences as plain autograd in float64: knots and codes are looked up, the rest differentiates itself."""
    x, clip = x.view(len(clip), -1), clip[:, None]
    sign = x.sign() if signed else (x > 0).double()
    place = x.abs() / clip
    inside = (place < 1) & ((x >= 0) | signed)
    knots = slopes.shape[1]
    fixed = place.detach().clamp(max=1)
    knot = (fixed * knots).long().clamp(max=knots - 1)
    compressed = slopes.gather(1, knot) * (fixed - knot / knots) + heights.gather(1, knot)
    rounded = compressed + ((compressed * gaps).round() / gaps - compressed).detach()
    above = (torch.searchsorted(heights.detach().contiguous(), rounded.detach().contiguous(), right=True) - 1).clamp(0, knots - 1)
    expanded = (rounded - heights.gather(1, above)) / slopes.gather(1, above) + above / knots
    held = torch.where(inside, expanded + place - place.detach(), torch.ones(()).double())
    return sign * clip * held


@pytest.mark.parametrize(("signed", "rows"), [(True, 1), (True, 3), (False, 1)])
@pytest.mark.parametrize("gaps", [3, 7, 127])
def test_outputs_and_gradients_are_those_of_the_formula(signed, rows, gaps):
    torch.manual_seed(gaps)
    x, grad = torch.randn(3, 500), torch.randn(3, 500)
    leaves = x, torch.rand(rows) + 1, torch.randn(rows, 16)
    results = []
    for quantize, dtype in ((companding.compand, torch.float32), (straight_through_reference, torch.float64)):
        x, clip, theta = (t.to(dtype, copy=True).requires_grad_() for t in leaves)
        y = quantize(x, clip, *companding.curve(theta), gaps, signed).view(x.shape)
        y.backward(grad.to(dtype))
        results.append([t.double() for t in (y.detach(), x.grad, clip.grad, theta.grad)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=2e-5 * float(truth.abs().max()))


def test_a_curve_of_four_intervals_by_hand():
    clip, theta = torch.tensor([2.0]), torch.tensor([[1, 0, -1, 0.5]])
    slopes, heights = companding.curve(theta)
    torch.testing.assert_close(slopes, torch.tensor([[1.89596, 0.69749, 0.25659, 1.14996]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(heights, torch.tensor([[0, 0.47399, 0.64836, 0.71251]]), rtol=2e-5, atol=0)
    levels, thresholds = companding.tables(clip, slopes, heights, 3, False)
    torch.testing.assert_close(levels, torch.tensor([[0, 0.35162, 1.14267, 2]]), rtol=2e-5, atol=0)
    torch.testing.assert_close(thresholds, torch.tensor([[0.17581, 0.57458, 1.71013]]), rtol=2e-5, atol=0)
    x = torch.tensor([0.6, 0.1, -0.7, 2.2], requires_grad=True)
    y = companding.compand(x, clip, slopes, heights, 3, True)
    torch.testing.assert_close(y.detach(), torch.tensor([1.14267, 0, -1.14267, 2]), rtol=2e-5, atol=0)
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0]


def test_expanding_undoes_compressing():
    slopes, heights = companding.curve(torch.randn(2, 16, dtype=torch.float64))
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    v = companding.expand(u, slopes, heights)
    assert (v.diff(dim=1) > 0).all() and v[0, 0] == 0
    knot = (v * 16).long().clamp(max=15)
    torch.testing.assert_close(slopes.gather(1, knot) * (v - knot / 16) + heights.gather(1, knot), u.expand(2, -1))


def test_signed_tables_are_mirrored_at_one_zero():
    slopes, heights = companding.curve(torch.randn(1, 16))
    levels, thresholds = companding.tables(torch.tensor([1.5]), slopes, heights, 7, True)
    assert levels.shape == (1, 15) and thresholds.shape == (1, 14)
    assert levels[0, 7] == 0 and levels[0, -1] == 1.5
    assert torch.equal(levels, -levels.flip(1)) and torch.equal(thresholds, -thresholds.flip(1))
