"""A model with every way to read a ReLU, and its copy that was paired, for several tests."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import evaluating, quant_layers, standing_still
from nulsq_cli.pairing import one_operation, pair
from nulsq_cli.rectified import QuantAct
from nulsq_cli.values import Bits


class Net(nn.Module):
    """Every way to read a ReLU: alone, with a shortcut, by two layers and a shortcut, not in place, twice, by nobody."""

    act = nn.ReLU

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if k == 0 else 16, 16, 3, padding=1, bias=False) for k in range(9))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(6))
        self.acts = nn.ModuleList(self.act(inplace=k != 3) for k in range(5))
        self.twice, self.head = self.act(inplace=True), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.acts[0](self.norms[0](self.convs[0](x)))  # alone
        x = self.acts[1](self.norms[1](self.convs[1](x)))  # one layer and a shortcut
        x = self.acts[2](self.norms[2](self.convs[2](x)) + x)  # two layers and a shortcut
        x = self.acts[3](self.norms[3](self.convs[3](x) + self.convs[4](x)) + x)  # alone, not in place
        x = self.twice(self.norms[4](self.convs[5](x)))
        x = self.twice(self.norms[5](self.convs[6](x)))
        x = self.convs[8](self.acts[4](self.convs[7](x)))  # without a BatchNorm
        return self.head(x.mean((2, 3)))


class Net6(Net):
    act = nn.ReLU6


def quantized(method: str = "nulsq-wa", bits: int = 2, *, of: type[nn.Module] = Net, grid: str = "float",
              **options: object) -> nn.Module:  # fmt: skip
    torch.manual_seed(0)
    model = of()
    policy = Policy(Bits(bits, bits), method, grid=grid, options=options)
    convert(model, make_plan(model, policy, (3, 6, 6)))
    return started(model)


def started(model: nn.Module) -> nn.Module:
    """With steps that fit to normalized inputs and to the weights, and BatchNorms that were trained: then gradients flow."""
    for layer in quant_layers(model).values():
        for quantizer, size in ((layer.weight_quantizer, layer.weight.detach().std()), (layer.input_quantizer, 1.0)):
            for p in quantizer.parameters():
                p.data.mul_(3 * size / 2**quantizer.spec.bits)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model.train()


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def pairs(model: nn.Module) -> dict[str, str]:
    names = {m: n for n, m in model.named_modules()}
    return {names[m]: names[m.reader] for m in model.modules() if isinstance(m, QuantAct)}


def paired_and_plain() -> tuple[nn.Module, nn.Module]:
    """The same model twice."""
    paired, plain = quantized(), quantized()
    pair(paired, IMAGES)
    return paired, plain


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As the engine does, if the model is paired."""
    with one_operation(model, x) if hasattr(model, "_nulsq_paired") else nullcontext():
        return model(x)


def everything(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """The output in training; that in evaluation and what BatchNorm has seen; gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(model, x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad(), evaluating(model), standing_still(model):
        evaluated = run(model, x)
    return [y], [evaluated, *model.buffers()], [x.grad, *grads]


def same(paired: nn.Module, plain: nn.Module, images: torch.Tensor, *, bits: bool = True) -> None:
    """Outputs in training are equal, bit for bit if wanted; the rest is to the rounding of sums, and no gradient is 0."""
    (outputs, others, grads), (truth, theirs, exact) = everything(paired, images), everything(plain, images)
    torch.testing.assert_close(outputs, truth, **({"rtol": 0, "atol": 0} if bits else {"rtol": 1e-4, "atol": 1e-4}))
    torch.testing.assert_close(others, theirs, rtol=1e-4, atol=1e-4)
    sizes = [float(grad.norm()) for grad in exact]
    assert min(sizes) > 0
    for one, other, size in zip(grads, exact, sizes, strict=True):
        assert float((one - other).norm()) <= 1e-4 * size
