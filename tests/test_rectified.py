"""ReLUs that quantize what they hand on: the bits, the gradients and what anybody else sees are those of one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import evaluating, quant_layers, standing_still
from nulsq_cli.methods import base
from nulsq_cli.methods.lsq import LSQ
from nulsq_cli.methods.nulsq import NuLSQ
from nulsq_cli.models import create_float_model
from nulsq_cli.ops import fast, relu
from nulsq_cli.rectified import QuantReLU, pair
from nulsq_cli.values import Bits, QuantSpec

pytestmark = pytest.mark.usefixtures("loops")


class Net(nn.Module):
    """Every way to read a ReLU: alone, with a shortcut, by two layers and a shortcut, not in place, twice, by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.acts = nn.ModuleList(nn.ReLU(inplace=k != 3) for k in range(5))
        self.twice, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.acts[0](self.norms[0](self.convs[0](x)))  # alone
        x = self.acts[1](self.norms[1](self.convs[1](x)))  # one layer and a shortcut
        x = self.acts[2](self.norms[2](self.convs[2](x)) + x)  # two layers and a shortcut
        x = self.acts[3](self.norms[3](self.convs[3](x) + self.convs[4](x)) + x)  # alone, not in place
        x = self.twice(self.norms[4](self.convs[5](x)))
        x = self.twice(self.norms[5](self.convs[6](x)))
        return self.head(self.acts[4](self.convs[7](x)).mean((2, 3)))


def quantized(method: str = "nulsq-wa", bits: int = 2, *, grid: str = "float", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    policy = Policy(Bits(bits, bits), method, grid=grid, options=options)
    convert(model, make_plan(model, policy, (3, 6, 6)))
    for layer in quant_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            for p in quantizer.parameters():
                p.data.mul_(0.2)
    return model.train()


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def pairs(model: nn.Module) -> dict[str, str]:
    names = {m: n for n, m in model.named_modules()}
    return {names[m]: names[m.reader] for m in model.modules() if type(m) is QuantReLU}


def everything(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients, what BatchNorm has seen, and the output in evaluation."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad(), evaluating(model), standing_still(model):
        evaluated = model(x)
    return [y, x.grad, *grads, *model.buffers(), evaluated]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("method", "bits", "more"), [
    ("nulsq-wa", 2, {}), ("nulsq-wa", 4, {}), ("nulsq-wa", 5, {}), ("nulsq-wa", 3, {"grid": "int8"}), ("nulsq-a", 3, {}),
    ("nulsq-wa", 3, {"grad_scale": "lsq"}), ("lsq", 2, {}), ("lsq", 8, {}), ("lsq", 3, {"grad_scale": "lsq"}),
    ("uniq", 3, {}), ("llsq", 3, {}), ("pact", 3, {}),
])  # fmt: skip
def test_everything_has_the_bits_of_one_after_the_other(method, bits, more, layout):
    plain = quantized(method, bits, **more).to(memory_format=layout)
    paired, images = copy.deepcopy(plain), IMAGES.to(memory_format=layout)
    pair(paired, images)
    assert len(pairs(paired)) == 4 and not pairs(plain)
    for one, other in zip(everything(paired, images), everything(plain, images), strict=True):
        assert torch.equal(one, other)


def test_who_reads_what_is_seen_in_one_small_pass():
    model = quantized()
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    pair(model, IMAGES)
    assert pairs(model) == {"acts.0": "convs.1", "acts.1": "convs.2", "acts.2": "convs.3", "acts.3": "convs.5"}
    assert [model.acts[k].alone for k in range(4)] == [True, False, False, False]
    assert model.training and list(model.state_dict()) == keys
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [2, 5])
def test_the_fast_way_is_taken(bits, monkeypatch):
    calls = []
    for name in ("relu_and_quantize", "relu_and_lookup"):
        plain = getattr(relu, name)
        watch = lambda *args, plain=plain, name=name, **named: (calls.append((name, plain(*args, **named) is not None)), None)[1]  # noqa: E731
        monkeypatch.setattr(base, name, watch)
    model = quantized(bits=bits)
    pair(model, IMAGES)
    for act in (a for a in model.acts if type(a) is QuantReLU):
        act.inplace = False  # watching computes both
    model(IMAGES)
    assert calls == [("relu_and_quantize", bits == 2)] * 4  # 32 levels are too many for the loops, in training
    calls.clear()
    with torch.no_grad(), evaluating(model):
        model(IMAGES)
    assert calls == [("relu_and_lookup", True)] * 4


def test_a_copy_has_readers_of_its_own():
    model = quantized()
    pair(model, IMAGES)
    other = copy.deepcopy(model)
    assert pairs(other) == pairs(model) and other.acts[0].reader is other.convs[1]


def test_hooks_see_a_relu_and_stay():
    model, seen = quantized(), []
    model.acts[0].register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    model.convs[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    plain = copy.deepcopy(model)
    pair(model, IMAGES)
    seen.clear()
    with torch.no_grad(), evaluating(model), standing_still(model):
        model(IMAGES)
    paired = list(seen)
    seen.clear()
    with torch.no_grad(), evaluating(plain), standing_still(plain):
        plain(IMAGES)
    assert len(paired) == 2 and all(torch.equal(a, b) for a, b in zip(paired, seen, strict=True))


def test_hooks_of_a_quantizer_run():
    model, seen = quantized(), []
    pair(model, IMAGES)
    model.convs[1].input_quantizer.register_forward_hook(lambda m, args, y: seen.append(y))
    model(IMAGES)
    assert len(seen) == 1


class Reads(nn.Module):
    """One convolution behind a ReLU in place, and a way in which somebody else may read along."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.conv = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 1),
        )
        self.how, self.head = how, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.norm(self.first(x))
        if self.how == "a view of what it overwrites":
            before = before.view(before.shape)
        after = self.act(before)
        y = self.conv(after)
        if self.how == "later":
            y = y + after.mean()
        if self.how == "what it overwrote":
            y = y + before.mean()
        if self.how == "perhaps" and float(y.sum()) > 1e30:
            y = y + after.mean()
        if self.how == "changed on the way":
            y = self.conv(after.mul_(2))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(("how", "alone"), [
    ("alone", True), ("later", False), ("what it overwrote", False), ("perhaps", False), ("a view of what it overwrites", False),
    ("changed on the way", False),
])  # fmt: skip
def test_a_result_is_overwritten_only_where_nobody_else_can_read_it(how, alone):
    torch.manual_seed(0)
    model = Reads(how)
    convert(model, make_plan(model, Policy(Bits(2, 2), "lsq"), (3, 5, 5)))
    for layer in quant_layers(model).values():
        layer.input_quantizer.step.data.fill_(0.3)
        layer.weight_quantizer.step.data.fill_(0.1)
    plain = copy.deepcopy(model)
    pair(model, IMAGES)
    assert type(model.act) is QuantReLU and model.act.alone is alone
    for mode in (True, False):
        with torch.no_grad(), standing_still(model), standing_still(plain):
            assert torch.equal(model.train(mode)(IMAGES), plain.train(mode)(IMAGES))


def test_nothing_prepared_stays_behind():
    model, made = quantized(), []
    pair(model, IMAGES)
    model.acts[1].register_forward_hook(lambda m, args, y: made.append(y))
    model(IMAGES)
    assert len(made) == 1 and not hasattr(made[0], "_nulsq_ready")


def test_a_method_with_another_formula_has_not_its_bases_fast_way():
    class Doubled(LSQ):
        """LSQ on twice the input."""

        def quantize(self, x: torch.Tensor) -> torch.Tensor:
            return super().quantize(2 * x)

    x = torch.rand(9, requires_grad=True)
    assert Doubled(QuantSpec(2, False)).behind_relu(x, inplace=False) is None
    assert LSQ(QuantSpec(2, False)).behind_relu(x, inplace=False) is not None


def test_a_method_may_build_on_another_ones_formula():
    class Doubled(NuLSQ):
        """nuLSQ on twice the input."""

        def quantize(self, x: torch.Tensor) -> torch.Tensor:
            return super().quantize(2 * x)

    x, spec = torch.rand(9), QuantSpec(2, False)
    assert torch.equal(Doubled(spec)(x), NuLSQ(spec)(2 * x))


def test_what_was_not_trained_asks_for_no_gradient():
    quantizer = LSQ(QuantSpec(2, False))
    assert quantizer.behind_relu(torch.rand(9), inplace=False) is None  # else its shortcut would
    y, quantized = quantizer.requires_grad_(False).behind_relu(torch.rand(9), inplace=False)
    assert not y.requires_grad and not quantized.requires_grad


@pytest.mark.parametrize("kind", [None, 0, (0, 3)])
def test_a_derivative_of_the_derivative(kind):
    x = torch.randn(60, generator=torch.Generator().manual_seed(2), requires_grad=True)
    table = {None: [0.0, 0.4, 0.9, 1.5], 0: [[0.4, 0.5, 0.6]], (0, 3): [0.4]}[kind]
    table = torch.tensor(table, requires_grad=True)
    found = []
    for way in (True, False):
        fast.use(way)
        if way:
            both = relu.relu_and_quantize(x, table, kind)
        else:
            y = x.relu()
            ops = {None: relu.codebook.quantize_to_levels, 0: relu.codebook.quantize_by_gaps, (0, 3): relu.grid.quantize_to_grid}
            more = () if kind is None else kind if isinstance(kind, tuple) else (kind,)
            both = y, ops[kind](y, table, *more)
        loss = (both[0] * both[1].sin()).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), (x, table))])
    fast.use(True)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_change_in_place_is_one_for_autograd():
    x = torch.randn(50, requires_grad=True)
    before = x.exp()  # keeps its result for backward
    y, _ = relu.relu_and_quantize(before, torch.tensor([0.5]), (0, 3), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert relu.relu_and_quantize(x.exp()[10:], torch.tensor([0.5]), (0, 3), inplace=True) is None  # a view


def test_under_autocast_nothing_changes():
    plain = quantized()
    paired = copy.deepcopy(plain)
    pair(paired, IMAGES)
    for model in (plain, paired):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IMAGES).float().square().sum().backward()
    for one, other in zip(paired.parameters(), plain.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_a_real_network():
    torch.manual_seed(0)
    model = create_float_model("resnet20_cifar")
    convert(model, make_plan(model, Policy(Bits(3, 3), "nulsq-wa"), (3, 32, 32)))
    pair(model, torch.randn(2, 3, 32, 32))
    found = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert sum(type(m) is QuantReLU for m in found) == 18 and len(found) == 19  # all but the one before the pool
    assert sum(m.alone for m in found if type(m) is QuantReLU) == 9  # one in each block


@pytest.mark.parametrize(("name", "paired", "alone"), [("resnet18", 15, 8), ("regnetx_002", 39, 26), ("mnasnet_050", 34, 34)])
def test_timm_networks_have_the_bits_of_one_after_the_other(name, paired, alone):
    torch.manual_seed(0)
    plain = create_float_model(name)
    convert(plain, make_plan(plain, Policy(Bits(3, 3), "nulsq-wa"), (3, 64, 64)))
    for layer in quant_layers(plain).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            for p in quantizer.parameters():
                p.data.mul_(0.1)
    fused, images = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    pair(fused, images)
    relus = [m for m in fused.modules() if type(m) is QuantReLU]
    assert (len(relus), sum(m.alone for m in relus)) == (paired, alone)
    for one, other in zip(everything(fused.train(), images), everything(plain.train(), images), strict=True):
        assert torch.equal(one, other)
