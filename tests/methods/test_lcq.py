import pytest
import torch

from nulsq_cli.errors import UsageError
from nulsq_cli.initializers import measure
from nulsq_cli.methods import make_quantizer
from nulsq_cli.ops import companding
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import QuantSpec
from tests.methods import golden


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("signed", "bits"), [(False, 2), (False, 3), (False, 4), (True, 3), (True, 4)])
def test_forward_and_gradients_are_those_of_the_released_code(shared, signed, bits, seed):
    case = golden.load(shared, f"lcq_{'signed' if signed else 'unsigned'}_b{bits}_s{seed}")
    golden.check(make_quantizer("lcq", QuantSpec(bits, signed)), case, {"clip": "alpha", "theta": "theta"})


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (4, True), (2, False), (4, False)])
def test_a_straight_curve_is_lsq_with_odd_levels(bits, signed):
    spec = QuantSpec(bits, signed)
    quantizer = make_quantizer("lcq", spec)
    quantizer.clip.data.fill_(1.7)
    x, grad = torch.randn(2, 2000)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = torch.tensor([1.7 / spec.positive], requires_grad=True)
    outputs = quantizer(mine), quantize_to_grid(theirs, step, -spec.positive if signed else 0, spec.positive)
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(*(y.detach() for y in outputs), rtol=1e-6, atol=1e-7)
    assert torch.equal(mine.grad, theirs.grad)
    torch.testing.assert_close(quantizer.clip.grad, step.grad / spec.positive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_are_normalised_with_gradients_through_mean_and_deviation(granularity):
    torch.manual_seed(0)
    rows = 4 if granularity == "channel" else 1
    quantizer = make_quantizer("lcq", QuantSpec(3, True, "weight", granularity, rows))
    quantizer.theta.data.normal_()
    quantizer.clip.data.fill_(2)
    w, grad = torch.randn(4, 3, 5, 5) * 0.2 + 0.05, torch.randn(4, 3, 5, 5)
    mine, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    quantizer(mine).backward(grad)
    flat = theirs.reshape(rows, -1)
    mean, std = flat.mean(1, keepdim=True), flat.var(1, keepdim=True).sqrt()
    clip, theta = (p.detach().clone().requires_grad_() for p in (quantizer.clip, quantizer.theta))
    y = companding.compand((flat - mean) / std, clip, *companding.curve(theta), 3, True) * std
    y.backward(grad.view_as(y))
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.theta.grad, theta.grad, rtol=1e-4, atol=1e-5)
    assert (mine.grad.view(rows, -1).sum(1).abs() < 1e-4).all()  # the mean takes out what all weights share
    tables = quantizer.codebook(w)
    torch.testing.assert_close(tables.levels.view(rows, -1)[:, -1:], 2 * std.detach())


@pytest.mark.parametrize("signed", [True, False])
def test_levels_of_few_bits_are_integers_of_one_scale_and_change_no_gradient(signed):
    torch.manual_seed(0)
    rough, exact = (make_quantizer("lcq", QuantSpec(4, signed), level_bits=n).train() for n in (6, None))
    theta = torch.randn(1, 16)
    for quantizer in (rough, exact):
        quantizer.theta.data.copy_(theta)
        quantizer.clip.data.fill_(1.3)
    largest = 31 if signed else 63
    integers = rough.levels().detach() / 1.3 * largest
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
    assert (rough.levels() - exact.levels()).abs().max() <= 1.3 / largest / 2 + 1e-6
    assert torch.equal(rough.thresholds(), exact.thresholds()) and rough.levels()[-1] == exact.levels()[-1]
    grad, found = torch.randn(500), []
    for quantizer in (rough, exact):
        x = torch.linspace(-2, 2, 500, requires_grad=True)
        y = quantizer(x)
        found.append(torch.autograd.grad(y, (x, quantizer.clip, quantizer.theta), grad))
        assert torch.equal(y.detach(), quantizer.eval()(x.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(UsageError, match="level_bits"):
        make_quantizer("lcq", QuantSpec(4, signed), level_bits=3)


def test_two_bit_signed_tables_have_nothing_to_learn_but_the_clip():
    quantizer = make_quantizer("lcq", QuantSpec(2, True, "weight"))
    assert [name for name, _ in quantizer.named_parameters()] == ["clip"]
    assert quantizer.levels().tolist() == [-1, 0, 1] and quantizer.thresholds().tolist() == [-0.5, 0.5]


def test_no_interval_of_the_curve_becomes_flat():
    quantizer = make_quantizer("lcq", QuantSpec(4, False))
    quantizer.theta.data[0, :3] = torch.tensor([30.0, -40, 5])
    quantizer.after_step()
    rise = quantizer.theta.softmax(1)
    assert 0.9e-4 < rise.min() < 1.1e-4
    assert (quantizer.levels().diff() > 0).all() and (quantizer.thresholds().diff() > 0).all()


def test_the_authors_constants_and_the_best_clip():
    x = torch.randn(3000) * 0.1 + 0.2
    weights, inputs = make_quantizer("lcq", QuantSpec(3, True, "weight")), make_quantizer("lcq", QuantSpec(3, False))
    for quantizer, clip in ((weights, 3), (inputs, 8)):
        quantizer.initialize(measure(x), "paper")
        assert quantizer.clip.item() == clip and not quantizer.theta.any()
    weights.initialize(measure(x), "mse")  # 7 even levels on a unit normal: 3 steps of 0.65077
    assert weights.clip.item() == pytest.approx(3 * 0.65077, rel=0.06)


def test_the_gradient_scale_multiplies_clip_and_curve():
    x, grads = torch.randn(4, 8, 3), []
    for mode in ("none", "lsq"):
        quantizer = make_quantizer("lcq", QuantSpec(3, True), grad_scale=mode)
        quantizer(x).square().sum().backward()
        grads.append([p.grad for p in quantizer.steps()])
    for plain, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled, plain * (3 / 24) ** 0.5)
