from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.layers import evaluating
from nulsq_cli.ops import codebook
from nulsq_cli.stabilizers.freezing import Freezer
from tests.stabilizers.cases import CASES, layer, stabilizer


def code(*values):
    return torch.tensor(values, dtype=torch.uint8)


def test_a_tracker_worked_by_hand():
    freezer = Freezer(code(0))
    frequencies, kept, frozen = [0.0], [0], [False]
    for value in (1, 0, 1, 0, 1, 1, 1):
        freezer.observe(code(value), 0.25, 0.1)
        frequencies.append(float(freezer.frequency))
        kept.append(int(freezer.code))
        frozen.append(bool(freezer.frozen))
    assert frequencies == pytest.approx([0, 0, 0.1, 0.19, 0.271, 0.2439, 0.21951, 0.197559], abs=1e-6)
    assert kept == [0, 1, 0, 1, 0, 0, 0, 0]
    assert frozen == [False] * 4 + [True] * 4


def test_it_keeps_the_code_where_the_weight_mostly_was_and_counts_slow_returns():
    freezer = Freezer(code(3, 3))
    for one, two in ((2, 3), (3, 3), (3, 4), (3, 4), (2, 4), (3, 3), (3, 3)):
        freezer.observe(code(one, two), 0.0, 0.1)
    # Weight 0: down, up, down, up are three returns; weight 1: up, three updates at rest, down is one.
    after = [0, 0.1, 0.09, 0.081, 0.1729, 0.25561, 0.230049], [0, 0, 0, 0, 0, 0.1, 0.09]
    assert freezer.frequency.tolist() == pytest.approx([after[0][-1], after[1][-1]], abs=1e-6)
    assert not freezer.frozen.any()
    freezer.observe(code(2, 4), 0.2, 0.1)
    assert freezer.frozen.tolist() == [True, False] and freezer.code.tolist() == [3, 4]


class Slow:
    """The same tracker for one weight, in words."""

    def __init__(self, start):
        self.code, self.last, self.f, self.mean, self.frozen = start, 0, 0.0, float(start), False

    def observe(self, now, threshold, m):
        now = self.code if self.frozen else now
        change = (now > self.code) - (now < self.code)
        self.f = m * (change * self.last == -1) + (1 - m) * self.f
        self.last = change or self.last
        if threshold > 0 and self.f > threshold and not self.frozen:
            self.frozen, now = True, round(self.mean)
        self.mean = m * now + (1 - m) * self.mean
        self.code = now


@given(
    st.lists(st.lists(st.integers(0, 15), min_size=3, max_size=3), min_size=2, max_size=25), st.sampled_from([0.05, 0.125, 0.5])
)
def test_the_vectorised_tracker_is_the_one_in_words(sequence, m):
    freezer, slow = Freezer(code(*sequence[0])), [Slow(v) for v in sequence[0]]
    for step, values in enumerate(sequence[1:]):
        # A threshold that no frequency meets: rounding must not decide.
        threshold = 0.0 if step < 3 else 2.37 * m * (1 - m)
        freezer.observe(code(*values), threshold, m)
        for one, value in zip(slow, values, strict=True):
            one.observe(value, threshold, m)
    assert freezer.frozen.tolist() == [s.frozen for s in slow]
    assert freezer.frequency.tolist() == pytest.approx([s.f for s in slow], abs=1e-5)
    if all(abs(s.mean % 1 - 0.5) > 1e-4 for s in slow):
        assert freezer.code.tolist() == [s.code for s in slow]


def half_frozen(method, granularity="tensor"):
    """A layer whose every other weight is frozen one code away from where it is."""
    one = layer(method, granularity=granularity)
    made = stabilizer("freezing", one, begin=0)
    freezer = one.weight_freezer
    tables, before = one.weight_codes()
    freezer.frozen.view(-1)[::2] = True
    top = tables.levels.shape[-1] - 1
    freezer.code.copy_(torch.where(freezer.frozen, torch.where(before < top, before + 1, before - 1), before))
    return one, made, freezer, before


@pytest.mark.parametrize(("method", "granularity"), CASES)
def test_frozen_weights_stay_whatever_the_optimizer_does(method, granularity):
    one, made, freezer, _ = half_frozen(method, granularity)
    kept, frozen = freezer.code.clone(), freezer.frozen.clone()
    optimizer = torch.optim.SGD([one.weight], 0.05, momentum=0.9, weight_decay=0.1)
    moved = False
    for seed in range(4):
        free = one.weight_codes()[1]
        optimizer.zero_grad()
        one(torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        assert not one.weight.grad[frozen].any() and one.weight.grad[~frozen].any()
        optimizer.step()
        made.after_update(1.0)
        tables, codes = one.weight_codes()
        assert freezer.frozen[frozen].all() and torch.equal(codes[frozen], kept[frozen])
        moved |= not torch.equal(codes[~frozen], free[~frozen])
        expected = codebook.decode(codes, tables.levels)
        assert torch.equal(one.eval().quantized_weight(), expected)
        assert torch.equal(one.train().quantized_weight()[frozen], expected[frozen])
    assert moved


@pytest.mark.parametrize("method", ["lsq", "nulsq-w"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("grad_scale", ["none", "lsq"])
def test_the_levels_learn_from_frozen_weights(method, granularity, grad_scale):
    """With everything frozen the output is linear in the levels, so finite differences are exact."""
    one, _, freezer, _ = half_frozen(method, granularity)
    freezer.frozen.fill_(True)
    one.weight_quantizer.grad_scale = grad_scale
    one.double()
    (steps,) = one.weight_quantizer.steps()
    slope = torch.randn(one.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (one.quantized_weight() * slope).sum().backward()

    def total(values):
        steps.data.copy_(values)
        levels = one.weight_quantizer.levels().detach()
        return float((codebook.decode(freezer.code, levels) * slope).sum())

    start = steps.detach().clone()
    expected = torch.zeros_like(start)
    for i in range(start.numel()):
        delta = torch.zeros_like(start).view(-1)
        delta[i] = 1e-3
        delta = delta.view(start.shape)
        expected.view(-1)[i] = (total(start + delta) - total(start - delta)) / 2e-3
    if grad_scale == "lsq":
        shared, q = one.weight.numel() // one.weight_quantizer.spec.channels, one.weight_quantizer.spec
        sides = [q.negative] * q.negative + [q.positive] * q.positive if method == "nulsq-w" else [q.positive]
        expected *= (torch.tensor(sides, dtype=torch.float64) * shared) ** -0.5
    torch.testing.assert_close(steps.grad, expected, rtol=1e-6, atol=1e-9)


def jitter(one, k):
    """Another weight for every update, the same in every test."""
    one.weight.data.add_(0.03 * torch.randn(one.weight.shape, generator=torch.Generator().manual_seed(k)))


@pytest.mark.parametrize("method", ["lsq", "nulsq-wa"])
def test_the_state_is_the_state_dict_and_goes_on_exactly(method):
    options = {"begin": 0.2, "first": 0.3, "last": 0.1, "momentum": 0.1}
    one = layer(method)
    made = stabilizer("freezing", one, **options)
    for k in range(10):
        jitter(one, k)
        made.after_update((k + 1) / 20)
    saved = copy.deepcopy(one.state_dict())
    assert {k.split(".", 1)[1] for k in saved if k.startswith("weight_freezer.")} == {
        "code", "frozen", "direction", "frequency", "mean_code"}  # fmt: skip
    other = layer(method, seed=5)
    resumed = stabilizer("freezing", other, **options)
    other.load_state_dict(saved)
    for k in range(10, 20):
        for each, rule in ((one, made), (other, resumed)):
            jitter(each, k)
            rule.after_update((k + 1) / 20)
    assert 0 < one.weight_freezer.frozen.sum() < one.weight.numel()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_only_updates_are_counted():
    one = layer("nulsq-wa")
    made = stabilizer("freezing", one, begin=0)
    jitter(one, 0)
    made.after_update(0.1)
    before = copy.deepcopy(one.weight_freezer.state_dict())
    jitter(one, 1)
    x = torch.randn(1, 2, 8, 8)
    for _ in range(3):
        one(x)
        with evaluating(one):
            one(x)
            one.weight_codes()
    assert made.penalty(0.5) is None
    assert all(torch.equal(v, before[k]) for k, v in one.weight_freezer.state_dict().items())


def test_nothing_freezes_before_the_threshold_is_on():
    one = layer("lsq")
    made = stabilizer("freezing", one, momentum=0.5)
    for k in range(20):
        jitter(one, k)
        made.after_update(0.2)
    assert one.weight_freezer.frequency.max() > 0.1 and not one.weight_freezer.frozen.any()
    made.after_update(0.25)
    assert torch.equal(one.weight_freezer.frozen, one.weight_freezer.frequency > 0.1)
    assert one.weight_freezer.frozen.any()
