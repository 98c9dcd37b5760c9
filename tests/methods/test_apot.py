import pytest
import torch

from nulsq_cli.initializers import INITIALIZERS, measure
from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.methods.apot import unit_levels
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import Bits, QuantSpec
from tests.methods import golden


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_forward_and_gradients_are_those_of_the_authors(shared, role, bits, seed):
    case = golden.load(shared, f"apot_{'weight' if role == 'weight' else 'act'}_b{bits}_s{seed}")
    quantizer = make_quantizer("apot", QuantSpec(bits, role == "weight", role))
    golden.check(quantizer, case, {"clip": "alpha"})
    magnitudes = quantizer.unit[quantizer.unit >= 0]
    torch.testing.assert_close(magnitudes, case["levels"].sort().values)


def test_the_tables_are_those_of_the_paper():
    assert unit_levels(2, False).tolist() == [0, 1 / 4, 1 / 2, 1]
    assert unit_levels(2, True).tolist() == [-1, 0, 1]
    torch.testing.assert_close(unit_levels(3, False).float(), torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]))
    four = [0, 1 / 48, 2 / 48, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 3 / 16, 1 / 4, 1 / 3, 3 / 8, 1 / 2, 2 / 3, 11 / 16, 3 / 4, 1]
    torch.testing.assert_close(unit_levels(4, False).float(), torch.tensor(four))
    for bits, highest in ((5, 25 / 32), (6, 7 / 8)):
        sums = unit_levels(bits, False) * highest
        assert len(sums.unique()) == 2**bits
        torch.testing.assert_close((sums * 2**9).round(), sums * 2**9, rtol=0, atol=1e-9)  # shifts and adds make them
    assert torch.equal(unit_levels(7, True)[63:], unit_levels(6, False)) and len(unit_levels(7, True)) == 127


@pytest.mark.parametrize(("role", "signed", "bits"), [("activation", False, 2), ("activation", True, 2)])
def test_hand_examples(role, signed, bits):
    quantizer = make_quantizer("apot", QuantSpec(bits, signed, role))
    quantizer.clip.data.fill_(2)
    examples = {  # x: y, dx, da
        False: [(0.3, 0.5, 1, 0.1), (0.9, 1, 1, 0.05), (1.7, 2, 1, 0.15), (2.5, 2, 0, 1)],
        True: [(-4, -2, 0, -1), (0.8, 0, 1, -0.4), (1.6, 2, 1, 0.2), (2.5, 2, 0, 1)],
    }[signed]
    for value, y, to_x, to_clip in examples:
        x = torch.tensor([float(value)], requires_grad=True)
        quantizer.clip.grad = None
        out = quantizer(x)
        out.backward()
        got = torch.tensor([out.item(), x.grad.item(), quantizer.clip.grad.item()])
        torch.testing.assert_close(got, torch.tensor([y, to_x, to_clip], dtype=torch.float32))


@pytest.mark.parametrize("weight_gradient", ["identity", "clipped"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_get_the_gradient_of_either_release(bits, weight_gradient):
    torch.manual_seed(0)
    w, grad = (torch.randn(6, 2, 3, 3) * 0.2 + 0.1), torch.randn(6, 2, 3, 3)
    quantizer = make_quantizer("apot", QuantSpec(bits, True, "weight"), weight_gradient=weight_gradient)
    quantizer.clip.data.fill_(1.2)
    mine, theirs = w.clone().requires_grad_(), w.double().requires_grad_()
    quantizer(mine).backward(grad)
    normal = (theirs - theirs.mean()) / theirs.std()
    if weight_gradient == "identity":
        normal = theirs / w.double().std()
    # At 2 bits the ImageNet code too passes all of it, through mean and deviation.
    passed = normal.clamp(-1.2, 1.2) if weight_gradient == "clipped" and bits > 2 else normal
    passed.backward(grad.double())
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_an_even_table_is_lsq():
    spec = QuantSpec(3, False)
    quantizer = make_quantizer("apot", spec)
    quantizer.unit.copy_(torch.arange(8) / 7)
    quantizer.clip.data.fill_(2.1)
    x, grad = torch.randn(2, 3000) * 2
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = torch.tensor([0.3], requires_grad=True)
    outputs = quantizer(mine), quantize_to_grid(theirs, step, 0, 7)
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(*(y.detach() for y in outputs), rtol=1e-6, atol=0)
    assert torch.equal(mine.grad, theirs.grad)
    torch.testing.assert_close(quantizer.clip.grad, step.grad / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", INITIALIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_rule_starts_near_the_normalised_weights(rule, bits, granularity):
    w = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [0.4], [1]]) + 0.3
    rows = 3 if granularity == "channel" else 1
    quantizer = make_quantizer("apot", QuantSpec(bits, True, "weight", granularity, rows))
    quantizer.initialize(measure(w, rows), rule)
    flat = w.view(rows, -1)
    normal = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
    for training in (True, False):
        error = (quantizer.train(training)(w).view(rows, -1) - normal).square().mean()
        assert error < {2: 0.45, 3: 0.2, 4: 0.15, 7: 0.1}[bits]


def test_the_authors_constants():
    for role, clip in (("weight", 3), ("activation", 8)):
        quantizer = make_quantizer("apot", QuantSpec(3, True, role))
        quantizer.initialize(measure(torch.randn(100)), "paper")
        assert quantizer.clip.item() == clip


def test_widths_without_a_table_are_refused():
    line = METHODS["apot"]
    assert line.complaint(Bits(7, 6), "tensor", None) is None
    assert "at most 7 bits" in line.complaint(Bits(8, 4), "tensor", None)
    assert "at most 6 bits" in line.complaint(Bits(4, 7), "tensor", None)


def test_an_unknown_gradient_is_refused():
    from nulsq_cli.errors import UsageError

    with pytest.raises(UsageError, match="identity or clipped"):
        make_quantizer("apot", QuantSpec(3, True, "weight"), weight_gradient="straight")
