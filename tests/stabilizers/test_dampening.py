from __future__ import annotations

import pytest
import torch

from nulsq_cli.errors import UsageError
from nulsq_cli.ops import codebook
from nulsq_cli.stabilizers.dampening import squared_distance
from tests.stabilizers.cases import CASES, at_targets, layer, nearest, stabilizer

LEVELS = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=torch.float64)
WEIGHT = torch.tensor([[-1.4, -0.9, -0.3], [0.1, 0.6, 0.45]], dtype=torch.float64)


def codes_of(weight, levels=LEVELS):
    return codebook.encode(weight, codebook.midpoints(levels))


def test_an_example_worked_by_hand_with_clipped_weights():
    expected = torch.tensor([[0.0, 0.01, 0.04], [0.01, 0.0, 0.0025]], dtype=torch.float64)
    torch.testing.assert_close(squared_distance(WEIGHT, codes_of(WEIGHT), LEVELS), expected)


def test_the_gradient_is_that_of_finite_differences_stops_at_the_ends_and_never_reaches_levels():
    weight, levels = WEIGHT.clone().requires_grad_(), LEVELS.clone().requires_grad_()
    codes = codes_of(WEIGHT)
    assert torch.autograd.gradcheck(lambda w: squared_distance(w, codes, LEVELS), (weight,))
    squared_distance(weight, codes, levels).sum().backward()
    clipped = WEIGHT.clamp(LEVELS[0], LEVELS[-1]) != WEIGHT
    assert levels.grad is None and clipped.sum() == 2
    torch.testing.assert_close(weight.grad, torch.where(clipped, 0.0, 2 * (WEIGHT - LEVELS[codes.int()])))


@pytest.mark.parametrize("aggregate", ["kernel_mean", "mean", "sum"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_mean_is_the_plain_mean_squared_distance_and_kernel_mean_sums_channels(aggregate, granularity):
    one = layer("lsq", granularity=granularity)
    weight = one.weight.detach().double()
    levels = one.weight_quantizer.levels().detach().double().view(-1, 8)
    ends = levels.view(-1, 8, 1, 1, 1)
    squares = (weight.clamp(ends[:, 0], ends[:, -1]) - at_targets(one).double()).square()
    expected = squares.sum() * {"mean": 1 / 200, "sum": 1, "kernel_mean": 4 / 200}[aggregate]
    term = stabilizer("dampening", one, aggregate=aggregate).penalty(1.0)
    assert float(term.detach()) == pytest.approx(0.1 * float(expected), rel=1e-5)


@pytest.mark.parametrize(("method", "granularity"), CASES)
def test_of_every_method_it_pulls_weights_to_their_level_and_leaves_the_quantizer_alone(method, granularity):
    one = layer(method, granularity=granularity)
    made = stabilizer("dampening", one)
    made.penalty(1.0).backward()
    pull = one.weight.grad * (one.weight.detach() - at_targets(one))
    assert (pull >= 0).all() and pull.sum() > 0
    assert all(p.grad is None for p in one.weight_quantizer.steps())
    if nearest(one):
        one.weight.data.copy_(at_targets(one))
        assert float(made.penalty(1.0).detach()) == 0


def test_it_starts_late_from_nothing_and_only_with_layers_that_it_may_touch():
    one = layer("nulsq-wa", bits=4)
    made = stabilizer("dampening", one)
    assert made.penalty(0.0) is None and made.penalty(0.25) is None and 0 < made.penalty(0.3) < made.penalty(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.penalty(1.0), stabilizer("dampening", one).penalty(1.0))
    with pytest.raises(UsageError, match="at most 3 bits"):
        stabilizer("dampening", one, widest=3)
    with pytest.raises(UsageError, match="no option of dampening called 'momentun'"):
        stabilizer("dampening", one, momentun=3)
    with pytest.raises(UsageError, match="did you mean 'kernel_mean'"):
        stabilizer("dampening", one, aggregate="kernelmean")
