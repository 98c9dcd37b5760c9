"""UniQ against vectors that the authors' own code computed, and against LSQ half a step away."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from nulsq_cli.initializers import measure
from nulsq_cli.methods import make_quantizer
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import QuantSpec


@pytest.mark.parametrize("seed", (1, 2))
@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("side", ("act", "weight"))
def test_start_forward_and_gradients_are_those_of_the_authors(shared, side, bits, seed):
    with safe_open(shared / "golden" / f"uniq_{side}_b{bits}_s{seed}.safetensors", "pt") as file:
        signed = json.loads(file.metadata()["case"])["signed"]
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
    spec = QuantSpec(bits, signed, "weight" if side == "weight" else "activation")
    quantizer = make_quantizer("uniq", spec).train()
    quantizer.initialize(measure(t["x"]), "paper")
    torch.testing.assert_close(quantizer.step.detach(), t["delta"], rtol=1e-6, atol=0)

    quantizer.step.data.copy_(t["delta"])
    x = t["x"].clone().requires_grad_()
    y = quantizer(x)
    # Ties: on a threshold (the signed grid has one at 0) the authors' code falls either way by rounding; where the
    # unsigned grid starts it clips by torch.max, which halves the gradient at 0, and after ReLU makes no difference.
    tie = x.detach() == 0
    assert not torch.isin(x[~tie].detach(), quantizer.thresholds()).any()
    torch.testing.assert_close(y.detach()[~tie], t["y"][~tie], rtol=0, atol=2e-7 * float(t["y"].abs().max()))
    y.backward(t["grad_output"])
    torch.testing.assert_close(x.grad[~tie], t["grad_x"][~tie], rtol=3e-7, atol=0)
    fell = (t["grad_output"] * (t["y"] - y.detach()) / t["delta"])[tie].sum()
    scale = (x.numel() * (max(2 ** (bits - 1) - 1, 1) if signed else 2**bits - 1)) ** -0.5
    torch.testing.assert_close((quantizer.step.grad + fell) * scale, t["grad_delta"], rtol=2e-5, atol=2e-6)


def test_worked_examples_at_two_bits():
    quantizer = make_quantizer("uniq", QuantSpec(2, True, "weight")).train()
    rows = torch.tensor(
        [  # x, y, gradient to x, gradient to the step
            [-2, -1.5, 0, -1.5], [-1.2, -1.5, 1, -0.3], [-1, -1.5, 1, -0.5], [-0.4, -0.5, 1, -0.1], [0, 0.5, 1, 0.5],
            [0.3, 0.5, 1, 0.2], [1, 0.5, 1, -0.5], [1.4, 1.5, 1, 0.1], [1.6, 1.5, 0, 1.5],
        ]
    )  # fmt: skip
    for value, y, to_x, to_step in rows:
        x = value.view(1).requires_grad_()
        out = quantizer(x)
        got = torch.autograd.grad(out, (x, quantizer.step))
        torch.testing.assert_close(torch.cat((out.detach(), *got)), torch.stack((y, to_x, to_step)))


@pytest.mark.parametrize("granularity", ("tensor", "channel"))
def test_signed_is_lsq_on_a_grid_half_a_step_away(granularity):
    """Around the fixed shift c the two are one function; the step's gradient differs by that of moving the shift."""
    channels = 3 if granularity == "channel" else 1
    torch.manual_seed(0)
    quantizer = make_quantizer("uniq", QuantSpec(3, True, "weight", granularity, channels)).double().train()
    steps = torch.rand(channels, dtype=torch.float64) + 0.2
    quantizer.step.data.copy_(steps)
    w, g = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    leaf = w.clone().requires_grad_()
    y = quantizer.quantize(leaf)
    y.backward(g)

    other, step = w.clone().requires_grad_(), steps.view(-1, 1, 1, 1).clone().requires_grad_()
    shift = steps.view(-1, 1, 1, 1) / 2
    lsq = quantize_to_grid(other - shift, step, -4, 3) + shift
    lsq.backward(g)
    torch.testing.assert_close(y, lsq)
    torch.testing.assert_close(leaf.grad, other.grad)
    outside = (g * (leaf.grad == 0)).flatten(1).sum(1) / 2
    moved = outside if channels == 3 else outside.sum().view(1)
    torch.testing.assert_close(quantizer.step.grad, step.grad.flatten() + moved)


def test_gradient_scale_multiplies_the_step_alone():
    torch.manual_seed(0)
    w, grads = torch.randn(4, 5), []
    for mode in ("none", "lsq"):
        quantizer = make_quantizer("uniq", QuantSpec(3, True, "weight"), grad_scale=mode).train()
        x = w.clone().requires_grad_()
        quantizer(x).square().sum().backward()
        grads.append((x.grad, quantizer.step.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[1][1], grads[0][1] * (20 * 3) ** -0.5)
