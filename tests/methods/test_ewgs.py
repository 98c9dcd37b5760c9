"""EWGS: its discretizer against vectors of the authors' own code, its interval by plain autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open

from nulsq_cli.errors import UsageError
from nulsq_cli.initializers import measure
from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.ops.estimators import round_unit
from nulsq_cli.values import Bits, QuantSpec

SPECS = [QuantSpec(3, True, "weight"), QuantSpec(3, False), QuantSpec(3, True)]


def made(spec: QuantSpec, **options):
    quantizer = make_quantizer("ewgs", spec, **options).train()
    quantizer.lower.data.fill_(-0.8 if spec.signed else 0.1)
    quantizer.upper.data.fill_(1.1)
    if spec.role == "weight":
        quantizer.output_scale.data.fill_(-1.3)
    return quantizer


def straight(quantizer, x):
    """The formula by plain autograd, rounding by the straight-through rule."""
    place = ((x - quantizer.lower) / (quantizer.upper - quantizer.lower)).clamp(0, 1)
    rounded = place + ((place * 7).round() / 7 - place).detach()
    y = 2 * rounded - 1 if quantizer.spec.signed else rounded
    return y * quantizer.output_scale.abs() if quantizer.spec.role == "weight" else y


@pytest.mark.parametrize("seed", (1, 2))
@pytest.mark.parametrize("delta", (0, 2))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_discretizer_is_that_of_the_authors(shared, bits, delta, seed):
    with safe_open(shared / "golden" / f"ewgs_discretizer_b{bits}_d{delta}_s{seed}.safetensors", "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
    x = t["x"].clone().requires_grad_()
    y = round_unit(x, 2**bits - 1, torch.tensor(delta / 10))
    assert torch.equal(y.detach(), t["y"])
    y.backward(t["grad_output"])
    torch.testing.assert_close(x.grad, t["grad_x"], rtol=3e-7, atol=0)


@pytest.mark.parametrize(("place", "grad", "expected"), [(0.2, 1, 0.96), (0.2, -1, -1.04), (0.4, 1, 1.02), (0.6, 2, 1.96)])
def test_worked_examples(place, grad, expected):
    x = torch.tensor([place], requires_grad=True)
    round_unit(x, 3, torch.tensor(0.3)).backward(torch.tensor([float(grad)]))
    torch.testing.assert_close(x.grad, torch.tensor([expected]))


@pytest.mark.parametrize("spec", SPECS)
def test_without_scaling_all_gradients_are_the_straight_through_ones(spec):
    quantizer = made(spec, delta=0).double()
    torch.manual_seed(0)
    x, g = torch.randn(4, 100, dtype=torch.float64), torch.randn(4, 100, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    parameters = (leaf, *quantizer.parameters())
    assert len(parameters) == (4 if spec.role == "weight" else 3)
    y, truth = quantizer.quantize(leaf), straight(quantizer, leaf)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(torch.autograd.grad(y, parameters, g), torch.autograd.grad(truth, parameters, g))


@pytest.mark.parametrize("spec", SPECS)
def test_the_scaling_acts_on_what_reaches_the_interval(spec):
    delta = 0.4
    plain, scaled = made(spec, delta=0).double(), made(spec, delta=delta).double()
    torch.manual_seed(1)
    x, g = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    place = ((x - plain.lower) / (plain.upper - plain.lower)).clamp(0, 1).detach()
    factor = 1 + delta * g.sign() * (place - (place * 7).round() / 7)
    leaf = x.clone().requires_grad_()
    mine = torch.autograd.grad(scaled.quantize(leaf), (leaf, scaled.lower, scaled.upper), g)
    theirs = torch.autograd.grad(plain.quantize(leaf), (leaf, plain.lower, plain.upper), g * factor)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("spec", SPECS)
def test_the_tables_compute_what_training_computes(spec):
    quantizer = made(spec)
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    tables = quantizer.codebook(x)
    near = (x[:, None] - tables.thresholds).abs().amin(1) < 1e-6
    torch.testing.assert_close(quantizer.eval()(x)[~near], straight(quantizer, x)[~near].detach(), rtol=0, atol=3e-7)
    assert float(tables.levels[-1]) == pytest.approx(1.3 if spec.role == "weight" else 1)


def test_starts():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 0.7
    weights, inputs, signed = (make_quantizer("ewgs", spec) for spec in SPECS)
    weights.initialize(measure(x), "paper")
    signed.initialize(measure(x), "paper")
    inputs.initialize(measure(x.relu() + 0.01), "paper")
    ends = [(q.lower.item(), q.upper.item()) for q in (weights, inputs, signed)]
    three = 3 * float(x.std())
    assert ends[0] == ends[2] == pytest.approx((-three, three), rel=1e-6)
    assert ends[1] == pytest.approx((0.01, 3 * float(x.relu().std()) / math.sqrt(1 - 2 / math.pi)), rel=1e-6)
    assert weights.output_scale.item() == pytest.approx(three, rel=1e-6)
    # An even rule puts the thresholds one of its steps apart, from half a step above 0 or symmetric around it.
    for quantizer, data in ((weights, x), (inputs, x.relu())):
        quantizer.initialize(measure(data), "lsq")
        step = 2 * data.abs().mean() / quantizer.spec.positive**0.5
        first = -3 * step if quantizer.spec.signed else step / 2
        torch.testing.assert_close(quantizer.thresholds().detach(), first + step * torch.arange(7))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ends", [(2.0, -1.0), (0.0, 0.0), (5.0, 5.0), (-3.0, -9.0), (1e-12, -1e-12)])
def test_the_interval_stays_open_and_the_scale_positive(spec, ends):
    quantizer = made(spec)
    quantizer.lower.data.fill_(ends[0])
    quantizer.upper.data.fill_(ends[1])
    quantizer.after_step()
    assert quantizer.lower.item() == pytest.approx(ends[0]) and (quantizer.upper > quantizer.lower).all()
    assert (quantizer.thresholds().diff() >= 0).all() and (quantizer.levels().diff() > 0).all()
    if spec.role == "weight":
        assert quantizer.output_scale.item() == pytest.approx(1.3)


def test_what_it_cannot_do_is_said():
    for options in ({"delta": -0.1}, {"delta": float("nan")}, {"delta": "hesse"}, {"every": 0}, {"batches": 0}):
        with pytest.raises(UsageError, match="ewgs"):
            make_quantizer("ewgs", SPECS[0], **options)
    assert "in float" in METHODS["ewgs"].complaint(Bits(32, 4), "tensor", None)
    assert METHODS["ewgs"].complaint(Bits(4, 32), "tensor", None) is None


def test_delta_follows_the_curvature_as_scheduled_or_is_what_it_is_set_to():
    measured, fixed = make_quantizer("ewgs", SPECS[0]), make_quantizer("ewgs", SPECS[0], delta=0.2)
    often = make_quantizer("ewgs", SPECS[0], every=1, batches=10)
    asked = [[q.curvature_batches(epoch) for epoch in (0, 1, 10, 15, 20)] for q in (measured, often, fixed)]
    assert asked == [[0, 0, 3, 0, 3], [0, 10, 10, 10, 10], [0] * 5]
    assert measured.delta == 0 and fixed.delta == pytest.approx(0.2)
    measured.follow_curvature(0.6)
    assert measured.delta == pytest.approx(0.2)
    again = make_quantizer("ewgs", SPECS[0])
    again.load_state_dict(measured.state_dict())  # so a continued run has it
    assert again.delta == measured.delta
    measured.follow_curvature(-5.0)
    assert measured.delta == 0
