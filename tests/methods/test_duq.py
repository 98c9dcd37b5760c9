import pytest
import torch
from torch.nn.functional import softplus

from nulsq_cli.initializers import measure
from nulsq_cli.methods import make_quantizer
from nulsq_cli.methods.duq import inverse_softplus
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import QuantSpec
from tests.methods import golden


def quantizer_of(spec: QuantSpec, scale_in: float, scale_out: float):
    quantizer = make_quantizer("duq", spec)
    quantizer.raw_scale_in.data.copy_(inverse_softplus(torch.tensor([scale_in], dtype=torch.float64)))
    quantizer.raw_scale_out.data.copy_(inverse_softplus(torch.tensor([scale_out], dtype=torch.float64)))
    return quantizer


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_forward_and_gradients_are_those_of_the_authors(shared, role, bits, seed):
    case = golden.load(shared, f"duq_{'weight' if role == 'weight' else 'act'}_b{bits}_s{seed}")
    quantizer = make_quantizer("duq", QuantSpec(bits, role == "weight", role))
    golden.check(quantizer, case, {"raw_scale_in": "a", "raw_scale_out": "c"}, rectify=role == "activation")


def test_hand_examples():
    assert quantizer_of(QuantSpec(2, True), 1, 1.5).levels().tolist() == pytest.approx([-1.5, 0, 1.5])
    quantizer = quantizer_of(QuantSpec(2, False), 1, 1.5)
    for value, *wanted in (
        (0.2, 0.5, 1.5, -0.189636, 0.258957), (0.6, 1.0, 1.5, -0.568909, 0.517913), (1.3, 1.5, 0, 0, 0.776870),
    ):  # fmt: skip
        x = torch.tensor([value], requires_grad=True)
        quantizer.zero_grad()
        y = quantizer(x)
        y.backward()
        got = [y.item(), x.grad.item(), quantizer.raw_scale_in.grad.item(), quantizer.raw_scale_out.grad.item()]
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (2, False), (4, False)])
def test_scales_that_differ_get_the_gradients_of_the_formula(bits, signed):
    x, grad = torch.randn(2, 1000)
    quantizer = quantizer_of(QuantSpec(bits, signed), 1.3, 0.7)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y = quantizer(mine)
    y.backward(grad)
    a, c = (raw.detach().double().requires_grad_() for raw in (quantizer.raw_scale_in, quantizer.raw_scale_out))
    most = quantizer.spec.positive
    place = (theirs / softplus(a)).clamp(-1 if signed else 0, 1)
    truth = softplus(c) * (place + ((place * most).round() / most - place).detach())
    truth.backward(grad.double())
    torch.testing.assert_close(y.detach().double(), truth.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-6, atol=1e-7)
    for raw, wanted in ((quantizer.raw_scale_in, a), (quantizer.raw_scale_out, c)):
        torch.testing.assert_close(raw.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_one_scale_for_both_is_lsq():
    x, grad = torch.randn(2, 2000)
    quantizer = quantizer_of(QuantSpec(3, False), 1.4, 1.4)
    mine, theirs, step = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.tensor([0.2], requires_grad=True)
    outputs = quantizer(mine), quantize_to_grid(theirs, step, 0, 7)
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(*(y.detach() for y in outputs), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)
    slope = torch.sigmoid(quantizer.raw_scale_in.detach())
    both = (quantizer.raw_scale_in.grad + quantizer.raw_scale_out.grad) / slope
    torch.testing.assert_close(both, step.grad / 7, rtol=1e-4, atol=1e-4)


def test_the_authors_start():
    weights = make_quantizer("duq", QuantSpec(4, True, "weight"))
    weights.initialize(measure(torch.tensor([0.5, -2.0, 1])), "paper")
    assert weights.levels()[-1].item() == pytest.approx(1.8)
    for signed, x in ((False, torch.arange(-100, 101).clamp(min=0)), (True, torch.arange(-100, 101))):
        inputs = make_quantizer("duq", QuantSpec(4, signed))
        inputs.initialize(measure(x), "paper")
        assert inputs.levels()[-1].item() == pytest.approx(95)
        assert inputs.thresholds()[-1].item() == pytest.approx(95 * (inputs.spec.positive - 0.5) / inputs.spec.positive)


def test_scales_of_any_size_survive_the_softplus():
    for value in (1e-6, 0.5, 40.0, 3e4):
        assert quantizer_of(QuantSpec(3, False), value, 1).thresholds()[0].item() == pytest.approx(value / 14, rel=1e-4)
    quantizer = quantizer_of(QuantSpec(3, False), 1, 1)
    for p in quantizer.steps():
        p.data.fill_(-1e4)
    quantizer.after_step()
    assert (quantizer.levels().diff() > 0).all() and quantizer(torch.ones(3)).isfinite().all()
