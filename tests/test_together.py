"""Weights that are quantized as one operation are those of one operation each, and so are their gradients."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import quant_layers, weights_together
from nulsq_cli.ops import codebook, grid, remake, together
from nulsq_cli.values import Bits

pytestmark = pytest.mark.usefixtures("loops")


class Net(nn.Module):
    """A layer that runs twice, one that runs once, one whose output nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.unused = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.first(x).relu())
        self.unused(x)
        return self.head(self.shared(x.relu()).mean((2, 3)))


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def quantized(method: str, bits: int = 3, granularity: str = "tensor") -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    convert(model, make_plan(model, Policy(Bits(bits, bits), method, granularity=granularity), (3, 6, 6)))
    for layer in quant_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            for p in quantizer.parameters():
                p.data.mul_(0.2)
    return model.train()


def results(model: nn.Module, inside) -> list[torch.Tensor | None]:
    model.zero_grad()
    with inside(model):
        y = model(IMAGES)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("small", [0, 1 << 16])
@pytest.mark.parametrize(("method", "bits", "granularity", "many"), [
    ("nulsq-wa", 3, "tensor", 4), ("nulsq-wa", 2, "channel", 4), ("lsq", 3, "tensor", 4), ("lsq", 8, "channel", 4),
    ("nulsq-wa", 5, "tensor", 2), ("uniq", 3, "tensor", 2), ("llsq", 3, "tensor", 2), ("ewgs", 3, "tensor", 2),
])  # fmt: skip
def test_together_and_apart_have_the_same_bits(method, bits, granularity, many, small, monkeypatch):
    monkeypatch.setattr(remake, "WORTH_MAKING_TWICE", small)
    model, seen = quantized(method, bits, granularity), []
    apart = results(copy.deepcopy(model), lambda _: nullcontext())
    plain = together.quantize_together
    monkeypatch.setattr("nulsq_cli.layers.quantize_together", lambda wanted: (seen.append(len(wanted)), plain(wanted))[1])
    for one, other in zip(results(model, weights_together), apart, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert seen == [many]  # the two ends are LSQ at 8 bits


def test_whoever_watches_or_freezes_a_weight_sees_it(monkeypatch):
    model, seen, wanted = quantized("lsq"), [], []
    model.shared.weight_quantizer.register_forward_hook(lambda *_: seen.append("called"))
    model.unused.weight_freezer = nn.Identity()
    plain = together.quantize_together
    monkeypatch.setattr("nulsq_cli.layers.quantize_together", lambda found: (wanted.extend(found), plain(found))[1])
    with weights_together(model):
        model.shared.quantized_weight()
    assert seen == ["called"] and {id(x) for x, *_ in wanted} == {id(model.first.weight), id(model.head.weight)}


def test_weights_that_do_not_learn_ask_for_no_gradient():
    model = quantized("lsq")
    model.first.weight.requires_grad_(False)
    model.first.weight_quantizer.requires_grad_(False)
    with weights_together(model):
        assert "_ready" not in vars(model.first) and "_ready" in vars(model.shared)


def test_nothing_stays_behind():
    model = quantized("lsq")
    with pytest.raises(ZeroDivisionError), weights_together(model):
        assert all("_ready" in vars(layer) for layer in quant_layers(model).values())
        raise ZeroDivisionError
    assert not any("_ready" in vars(layer) for layer in quant_layers(model).values())


@pytest.mark.parametrize("off", ["evaluation", "no gradient"])
def test_without_training_nothing_is_prepared(off):
    model = quantized("lsq").train(off != "evaluation")
    with torch.set_grad_enabled(off != "no gradient"), weights_together(model):
        assert not any("_ready" in vars(layer) for layer in quant_layers(model).values())


def test_a_derivative_of_the_derivative():
    draw = torch.Generator().manual_seed(3)
    x, w = (torch.randn(40, generator=draw, requires_grad=True) for _ in range(2))
    gaps, step = torch.tensor([[0.4, 0.5, 0.6]], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    found = []
    for one in (True, False):
        if one:
            a, b = together.quantize_together([(x, gaps, 1), (w, step, (-2, 1))])
        else:
            a, b = codebook.quantize_by_gaps(x, gaps, 1), grid.quantize_to_grid(w, step, -2, 1)
        loss = (x * a.sin()).sum() + (w * b.cos()).sum()
        first = torch.autograd.grad(loss, (x, w), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, gaps, step))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
