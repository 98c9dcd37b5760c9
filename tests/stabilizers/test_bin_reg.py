from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.ops import codebook
from nulsq_cli.stabilizers.bin_reg import spread
from tests.stabilizers.cases import CASES, at_targets, layer, nearest, stabilizer, targets_and_codes

WORKED = torch.tensor([-0.9, -0.6, -0.45, -0.1, 0.05, 0.2, 0.4, 0.55], dtype=torch.float64)
LEVELS = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=torch.float64)
values = st.lists(st.floats(-3, 3), min_size=1, max_size=40).map(lambda x: torch.tensor(x, dtype=torch.float64))


def codes_of(weight, levels):
    return codebook.encode(weight, codebook.midpoints(levels))


def test_an_example_worked_by_hand():
    codes = codes_of(WORKED, LEVELS)
    assert codes.tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    assert float(spread(WORKED, codes, LEVELS)) == pytest.approx(0.04, abs=1e-12)


@given(values, st.lists(st.floats(0.1, 2), min_size=2, max_size=8))
def test_it_is_the_paper_s_mean_term_plus_its_variance_term(weight, gaps):
    levels = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0) - sum(gaps) / 2
    codes = codes_of(weight, levels)
    total = 0.0
    for code, level in enumerate(levels):
        members = weight[codes == code]
        if len(members):
            total += float((members.mean() - level) ** 2 + members.var(correction=0))
    assert float(spread(weight, codes, levels)) == pytest.approx(total, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_gradients_are_those_of_finite_differences_and_of_the_formula(channels):
    torch.manual_seed(0)
    weight = torch.randn(channels, 30, dtype=torch.float64, requires_grad=True)
    levels = (torch.randn(channels, 4, dtype=torch.float64).sort(1).values if channels > 1 else LEVELS.clone()).requires_grad_()
    codes = codes_of(weight.detach(), levels.detach())
    assert torch.autograd.gradcheck(lambda w, t: spread(w, codes, t), (weight, levels))
    to_weight, to_levels = torch.autograd.grad(spread(weight, codes, levels), (weight, levels))
    for c, row in enumerate(weight):
        for code, level in enumerate(levels.view(channels, -1)[c]):
            mine = codes[c] == code
            if mine.any():
                expected = 2 * (row[mine] - level) / mine.sum() / channels
                torch.testing.assert_close(to_weight[c][mine], expected)
                torch.testing.assert_close(to_levels.view(channels, -1)[c, code], 2 * (level - row[mine].mean()) / channels)


@pytest.mark.parametrize(("method", "granularity"), CASES)
def test_of_every_method_the_bins_tighten_and_the_levels_follow_where_they_can(method, granularity):
    one = layer(method, granularity=granularity)
    term = stabilizer("bin-reg", one, begin=0).penalty(0.5)
    points, codes = targets_and_codes(one)
    rows = one.weight.detach().reshape(len(points), -1)
    expected = sum(
        float((row[code == k] - point[k]).double().square().mean())
        for row, code, point in zip(rows, codes, points, strict=True) for k in code.unique()
    )  # fmt: skip
    assert float(term.detach()) == pytest.approx(expected / len(points), rel=1e-5)
    term.backward()
    pull = one.weight.grad * (one.weight.detach() - at_targets(one))
    assert (pull >= 0).all() and pull.sum() > 0
    learned = [p for p in one.weight_quantizer.steps() if p.grad is not None and p.grad.abs().sum() > 0]
    assert bool(learned) == one.weight_quantizer.targets(one.weight).requires_grad
    assert learned or method not in ("lsq", "uniq", "llsq", "nulsq-a", "nulsq-w", "nulsq-wa")


@pytest.mark.parametrize(("method", "granularity"), [c for c in CASES if nearest(layer(*c[:1], granularity=c[1]))])
def test_it_is_zero_on_the_levels_and_its_gradient_too(method, granularity):
    one = layer(method, granularity=granularity)
    one.weight.data.copy_(at_targets(one))
    term = stabilizer("bin-reg", one, begin=0).penalty(0)
    term.backward()
    assert float(term.detach()) == 0 and not one.weight.grad.any()


def test_it_is_scheduled_computed_in_float32_and_the_same_twice():
    one = layer("nulsq-wa")
    made = stabilizer("bin-reg", one, begin=0.5, first=1.0, last=3.0)
    assert made.penalty(0.49) is None
    whole = made.penalty(1.0)
    assert float(whole.detach()) == pytest.approx(3 * float(made.penalty(0.5).detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.penalty(1.0), whole) and whole.dtype == torch.float32
