"""LLSQ: who moves its step, where to, and what the task's loss may touch."""

from __future__ import annotations

import pytest
import torch

from nulsq_cli.initializers import measure
from nulsq_cli.methods import make_quantizer
from nulsq_cli.values import QuantSpec

TENSOR = QuantSpec(3, True, "weight")
CHANNEL = QuantSpec(3, True, "weight", "channel", 4)


def made(spec: QuantSpec, step: float = 0.05, **options):
    quantizer = make_quantizer("llsq", spec, **options).train()
    quantizer.step.data.fill_(step)
    return quantizer


def pulled(quantizer, x: torch.Tensor) -> torch.Tensor:
    """The gradient of the step after one batch."""
    quantizer(x)
    quantizer.penalty().backward()
    return quantizer.step.grad


def errors(x: torch.Tensor, step: torch.Tensor, spec: QuantSpec, power: int = 2) -> torch.Tensor:
    """Mean errors of (a/2, a, 2a) by the definition, float64; (3, C)."""
    rows, found = x.double().reshape(spec.channels, -1), []
    for factor in (0.5, 1, 2):
        a = step.detach().double()[:, None] * factor
        found.append(((rows / a).round().clamp(-spec.negative, spec.positive) * a - rows).abs().pow(power).mean(1))
    return torch.stack(found)


def published(e: torch.Tensor) -> torch.Tensor:
    """The direction by the authors' case distinction: 1 (smaller), -1 (larger) or 0, for (3, C) errors."""
    one, two = e[1] - e[0], e[2] - e[1]
    g1, g2, g3 = one >= 0, two > 0, one + two >= 0
    larger = (~g1 & ~g2) | (g1 & ~g2 & ~g3)
    smaller = (g1 & g2) | (g1 & ~g2 & g3)
    return smaller.double() - larger.double()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL, QuantSpec(3, False), QuantSpec(3, True)])
def test_the_step_goes_where_the_authors_rule_sends_it(spec, power):
    torch.manual_seed(0)
    x = torch.randn(4, 50) * torch.tensor([[0.02], [0.3], [1.0], [8.0]])
    x = x if spec.signed else x.relu()
    seen = set()
    for step in (0.01, 0.05, 0.2, 0.4, 0.8, 1.5, 4.0, 30.0):
        quantizer = made(spec, step, error=f"l{power}")
        direction = published(errors(x, quantizer.step, spec, power))
        torch.testing.assert_close(pulled(quantizer, x), (direction * step**2).float())
        seen |= set(direction.tolist())
    assert seen == {-1.0, 0.0, 1.0}


def test_equal_errors_are_resolved_as_published(monkeypatch):
    quantizer, values = made(TENSOR), (0.0, 1.0, 2.0)
    for case in [(a, b, c) for a in values for b in values for c in values]:
        e = torch.tensor(case, dtype=torch.float64)
        monkeypatch.setattr(quantizer, "_error", lambda x, factor, e=e: e[[0.5, 1, 2].index(factor)].view(1))
        got = quantizer.simulated_gradient(torch.zeros(1)).sign().item()
        assert got == published(e[:, None]).item(), case


def test_the_task_moves_x_but_not_the_step():
    torch.manual_seed(0)
    x, grads = torch.randn(4, 50), []
    for slope in (1.0, -70.0):
        weights, inputs = made(TENSOR), made(QuantSpec(3, False))
        w, a = x.clone().requires_grad_(), x.clone().requires_grad_()
        (weights(w) * slope).sum().backward()
        (inputs(a) * slope).sum().backward()
        assert torch.equal(w.grad, torch.full_like(x, slope))  # identity, also beyond the ends
        assert torch.equal(a.grad, slope * ((x >= 0) & (x / 0.05 <= 7)))
        assert weights.step.grad is None and inputs.step.grad is None
        assert weights.penalty() == inputs.penalty() == 0
        for quantizer in (weights, inputs):
            quantizer.penalty().backward()
        grads.append((weights.step.grad, inputs.step.grad))
    assert grads[0] == grads[1] and all(g != 0 for g in grads[0])


def test_batches_that_share_an_update_are_averaged():
    quantizer, batches = made(TENSOR), (torch.randn(4, 50), torch.zeros(4, 50))
    single = []
    for x in batches:
        quantizer.step.grad = None
        single.append(pulled(quantizer, x).clone())
    quantizer.step.grad = None
    for x in batches:
        quantizer(x)
        (quantizer.penalty() / 2).backward()
    assert torch.equal(quantizer.step.grad, (single[0] + single[1]) / 2) and not torch.equal(*single)


def test_descent_finds_a_step_that_neither_half_nor_double_betters():
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    for start in (0.01, 20.0):
        quantizer = made(CHANNEL, start)
        optimizer = torch.optim.SGD(quantizer.steps(), lr=0.4 / start)
        for _ in range(3000):
            optimizer.zero_grad()
            pulled(quantizer, x)
            optimizer.param_groups[0]["lr"] = 0.1 / float(quantizer.step.detach().max())
            optimizer.step()
            quantizer.after_step()
            if not quantizer.step.grad.any():
                break
        assert not quantizer.step.grad.any()
        e = errors(x, quantizer.step, CHANNEL)
        assert (e[1] <= e[0]).all() and (e[1] <= e[2]).all()


def test_nothing_is_simulated_without_a_backward_pass(monkeypatch):
    quantizer = made(TENSOR)
    monkeypatch.setattr(quantizer, "simulated_gradient", None)
    with torch.no_grad():
        quantizer(torch.randn(5))
    quantizer.step.requires_grad_(False)
    quantizer(torch.randn(5, requires_grad=True)).sum().backward()
    assert quantizer.penalty() is None


def test_starts_of_the_authors():
    x = torch.tensor([[-8.0, 1, 2], [0.5, -1, 6], [0.0, 0.25, 0.5], [1, 1, -4]])
    top = torch.tensor([8, 6, 0.5, 4])
    cases = [(TENSOR, top[:1] / 4), (CHANNEL, top / 3), (QuantSpec(3, True), top[:1] / 6), (QuantSpec(4, True), top[:1] / 8),
             (QuantSpec(3, False), top[:1] / 14), (QuantSpec(4, False), top[:1] / 16)]  # fmt: skip
    for spec, expected in cases:
        quantizer = made(spec)
        quantizer.initialize(measure(x, spec.channels), "paper")
        torch.testing.assert_close(quantizer.step.detach(), expected)
    quantizer.initialize(measure(x.abs()), "lsq")
    torch.testing.assert_close(quantizer.step.detach(), (2 * x.abs().mean() / 15**0.5).view(1))
