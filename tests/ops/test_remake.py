"""Quantized tensors that are made again in the backward pass: the same bits, from what is kept anyway."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nulsq_cli.models  # noqa: F401 registers the CIFAR networks
from nulsq_cli import layers
from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.models import create_float_model
from nulsq_cli.ops import codebook, grid, remake
from nulsq_cli.pairing import one_operation, pair
from nulsq_cli.values import Bits


def quantized(model: nn.Module, size: int, method: str = "nulsq-wa", granularity: str = "tensor") -> nn.Module:
    convert(model, make_plan(model, Policy(Bits(3, 3), method, granularity=granularity), (3, size, size)))
    for quantizer in layers.quantizers(model).values():
        for p in quantizer.steps():
            p.data.mul_(0.1)
    return model.train()


def backward(model: nn.Module, x: torch.Tensor, amp: bool = False) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        y = model(x)
    y.float().square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False)
        self.same = layers.Conv2dSame(8, 8, 3, stride=2, bias=False)
        self.tokens, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(F.relu(self.depthwise(F.relu(self.conv(x)))))
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).relu().mean(1))


@pytest.fixture(autouse=True)
def _also_small_ones(monkeypatch):
    monkeypatch.setattr(remake, "WORTH_MAKING_TWICE", 0)


@pytest.fixture
def plain(monkeypatch):
    """Call it, and layers keep what they always kept."""
    return lambda: monkeypatch.setattr(layers, "instead_of_keeping", lambda *tensors: contextlib.nullcontext())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("method", "granularity"), [("nulsq-wa", "tensor"), ("nulsq-wa", "channel"), ("lsq", "channel"),
                                                     ("uniq", "tensor")])  # fmt: skip
def test_gradients_have_the_same_bits(plain, method, granularity, layout, amp):
    torch.manual_seed(0)
    model = quantized(Mixed(), 12, method, granularity).to(memory_format=layout)
    x = torch.randn(2, 3, 12, 12).to(memory_format=layout)
    remade = backward(model, x, amp)
    plain()
    kept = backward(model, x, amp)
    assert len(kept) > 12 and all(torch.equal(a, b) for a, b in zip(remade, kept, strict=True))


def bytes_kept(model: nn.Module, x: torch.Tensor, monkeypatch) -> int:
    """Bytes of the storages that backward needs: what autograd keeps, and what is kept to make tensors again."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    plain_hooks = torch.autograd.graph.saved_tensors_hooks

    def noting(pack, unpack):
        def packed(tensor):
            found = pack(tensor)
            for t in found[0].arguments if isinstance(found, tuple) else [found]:
                if isinstance(t, torch.Tensor):
                    note(t)
            return found

        return plain_hooks(packed, unpack)

    with monkeypatch.context() as patch, plain_hooks(note, lambda tensor: tensor):
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", noting)
        with one_operation(model, x) if hasattr(model, "_nulsq_paired") else contextlib.nullcontext():
            y = model(x)
        y.sum().backward()
    return sum(storages.values())


@pytest.mark.parametrize("method", ["lsq", "nulsq-a", "nulsq-wa"])
def test_training_keeps_no_more_than_the_float_model(method, monkeypatch, plain):
    monkeypatch.undo()  # as it is
    torch.manual_seed(0)
    x = torch.randn(32, 3, 32, 32)
    exact = bytes_kept(create_float_model("resnet20_cifar").train(), x, monkeypatch)
    model = quantized(create_float_model("resnet20_cifar"), 32, method)
    paired = copy.deepcopy(model)
    pair(paired, x)
    assert bytes_kept(model, x, monkeypatch) <= 1.05 * exact
    assert bytes_kept(paired, x, monkeypatch) <= 0.85 * exact  # BatchNorm's results are not kept
    plain()
    assert bytes_kept(model, x, monkeypatch) > 1.3 * exact  # the measure sees what it should


@pytest.mark.parametrize("changed", ["x", "step"])
def test_a_tensor_changed_before_backward_is_noticed(changed):
    x, step, weight = torch.rand(8, 4), torch.tensor([0.2], requires_grad=True), torch.rand(4, 4, requires_grad=True)
    q = grid.quantize_to_grid(x, step, 0, 3)
    with remake.instead_of_keeping(q):
        y = F.linear(q, weight)
    {"x": x, "step": step.detach()}[changed].mul_(1)
    with pytest.raises(RuntimeError, match="in place"):
        y.sum().backward()


def test_backward_twice_over_one_graph():
    x, levels = torch.rand(8, 4, requires_grad=True), torch.tensor([0, 0.3, 0.9], requires_grad=True)
    weight = torch.rand(4, 4, requires_grad=True)
    q = codebook.quantize_to_levels(x, levels)
    with remake.instead_of_keeping(q):
        y = F.linear(q, weight)
    grads = [torch.autograd.grad(y.square().sum(), (x, levels, weight), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.testing.assert_close(grads[0][2], 2 * y.T @ q)


def test_without_a_gradient_nothing_is_noted():
    with torch.no_grad():
        q = codebook.quantize_to_levels(torch.rand(3), torch.tensor([0.0, 1]))
    assert not hasattr(q, "_nulsq_way")
