"""nuLSQ and LSQ against vectors that the authors' own code computed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from nulsq_cli.methods import make_quantizer
from nulsq_cli.values import QuantSpec

CASES = [
    f"{method}_{sign}_b{bits}_{scale}_s{seed}"
    for method in ("lsq", "nulsq") for sign in ("signed", "unsigned") for bits in (2, 3, 4)
    for scale in ("raw", "gs") for seed in (1, 2)
]  # fmt: skip


def outward(steps: torch.Tensor, negative: int) -> torch.Tensor:
    """From the files' order (from zero outwards on each side) to ours (lowest gap first), and back."""
    return torch.cat((steps[:negative].flip(0), steps[negative:]))


def scale_of(case: dict) -> torch.Tensor:
    """The factor that the authors' code puts on each step's gradient, from the file's own notes."""
    bits, n = case["bits"], case["num_elements"]
    low, high = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    if case["grad_scale"] != "LSQ_grad_scale":
        return torch.ones(1)
    if case["method"] == "lsq":
        return torch.tensor([(n * (high if case["signed"] else 2**bits - 1)) ** -0.5])
    if not case["signed"]:
        return torch.tensor([(n * (2**bits - 1)) ** -0.5])
    return torch.tensor([2 * (n * low) ** -0.5] * low + [2 * (n * high) ** -0.5] * high)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_those_of_the_authors(shared, name):
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
    spec = QuantSpec(case["bits"], case["signed"])
    quantizer = make_quantizer("lsq" if case["method"] == "lsq" else "nulsq-wa", spec).train()
    (steps,) = quantizer.steps()
    nulsq = case["method"] == "nulsq"
    ours = outward(t["steps"], spec.negative) if nulsq else t["steps"]
    steps.data.copy_(ours.view_as(steps))

    x = t["x"].clone().requires_grad_()
    y = quantizer(x)
    tables = quantizer.codebook(t["x"])
    at_threshold = torch.isin(x.detach(), tables.thresholds)
    assert at_threshold.float().mean() < 0.01
    torch.testing.assert_close(y.detach()[~at_threshold], t["y"][~at_threshold], rtol=0, atol=2e-7 * float(t["y"].abs().max()))

    y.backward(t["grad_output"])
    # LSQ's code passes half the gradient where x is exactly on a clip bound; after ReLU it makes no difference.
    compared = (x.detach() != 0) if not nulsq else torch.ones_like(x, dtype=torch.bool)
    # Their LSQ divides by the step and multiplies again, which moves a gradient by a rounding.
    torch.testing.assert_close(x.grad[compared], t["grad_x"][compared], rtol=0 if nulsq else 3e-7, atol=0)
    got = outward(steps.grad.flatten(), spec.negative) if nulsq else steps.grad
    torch.testing.assert_close(got * scale_of(case), t["grad_steps"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", [QuantSpec(3, False), QuantSpec(2, True), QuantSpec(3, True, "weight", "channel", 4)], ids=str)
def test_nulsq_with_equal_gaps_is_lsq(spec):
    torch.manual_seed(0)
    x, grad = torch.randn(4, 500), torch.randn(4, 500)  # no entry is on a threshold, where the two part
    nulsq, lsq = make_quantizer("nulsq-wa", spec).train(), make_quantizer("lsq", spec).train()
    nulsq.gaps.data.fill_(0.3)
    lsq.step.data.fill_(0.3)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = nulsq(inputs[0]), lsq(inputs[1])
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(*(y.detach() for y in outputs), rtol=1e-6, atol=0)
    assert torch.equal(inputs[0].grad, inputs[1].grad) and inputs[0].grad.eq(0).any()
    torch.testing.assert_close(nulsq.gaps.grad.sum(1), lsq.step.grad, rtol=1e-5, atol=1e-4)


def test_the_gradient_scale_of_lsq_counts_weights_or_features_not_the_batch():
    spec = QuantSpec(3, True, "weight")
    for shape, role, shared_by in (((4, 3, 2, 2), "weight", 48), ((7, 5, 6), "activation", 30)):
        spec = QuantSpec(3, True, role)
        torch.manual_seed(0)
        x, grads = torch.randn(shape), []
        for mode in ("none", "lsq"):
            quantizer = make_quantizer("lsq", spec, grad_scale=mode).train()
            quantizer(x).sum().backward()
            grads.append(quantizer.step.grad)
        torch.testing.assert_close(grads[1], grads[0] * (shared_by * 3) ** -0.5)
