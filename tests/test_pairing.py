"""Which modules do the work of others is found and proved, whatever a model does and whoever changes it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import quant_layers, standing_still
from nulsq_cli.models import create_float_model
from nulsq_cli.pairing import pair
from nulsq_cli.rectified import QuantAct, QuantNorm, QuantNormAct, QuantReLU
from nulsq_cli.values import Bits
from tests.paired import IMAGES, Net, pairs, quantized, run, same, started

pytestmark = pytest.mark.usefixtures("loops")


def test_who_reads_what_is_seen_in_one_small_pass():
    model = quantized()
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    pair(model, IMAGES)
    readers = {"acts.0": "convs.1", "acts.1": "convs.2", "acts.2": "convs.3", "acts.3": "convs.5", "acts.4": "convs.8"}
    assert pairs(model) == readers
    assert [act.alone for act in model.acts] == [True, False, False, True, True]
    assert [act.overwrites for act in model.acts] == [True, True, False, False, False]
    assert [type(norm) for norm in model.norms] == [QuantNorm] * 4 + [nn.BatchNorm2d] * 2
    assert [norm.adds for norm in model.norms[:4]] == [False, False, True, True]
    assert [norm.overwrites for norm in model.norms[:4]] == [True, True, True, False]
    assert model.training and list(model.state_dict()) == keys
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_copy_has_readers_of_its_own():
    model = quantized()
    pair(model, IMAGES)
    other = copy.deepcopy(model)
    assert pairs(other) == pairs(model) and other.acts[0].reader is other.convs[1]
    assert other.norms[0].relu is other.acts[0]


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
    assert type(model.act) is QuantReLU and (model.act.alone and model.act.overwrites) is alone
    assert isinstance(model.norm, QuantNorm) is (how in ("alone", "later", "changed on the way"))
    for mode in (True, False):
        with torch.no_grad(), standing_still(model), standing_still(plain):
            assert torch.equal(model.train(mode)(IMAGES), plain.train(mode)(IMAGES))


def test_finding_them_leaves_no_trace():
    """Tracing a model runs what it does to its own buffers in training, and may draw random numbers."""

    class Counts(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.seen = self.seen + torch.rand(())
            return super().forward(x)

    model = Counts()
    model.register_buffer("seen", torch.zeros(()))
    convert(model, make_plan(model, Policy(Bits(2, 2), "lsq"), (3, 6, 6)))
    before, state = copy.deepcopy(model.train().state_dict()), torch.get_rng_state()
    pair(model, IMAGES)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and type(model.norms[0]) is QuantNorm


def test_a_model_that_cannot_be_copied_goes_on_without():
    model = quantized()
    model.kept = model.convs[0].weight * 2  # torch copies no tensor that has a history
    pair(model, IMAGES)
    assert type(model.acts[0]) is QuantReLU and not model.acts[0].alone and type(model.norms[0]) is nn.BatchNorm2d


def test_paths_that_drop_out_are_no_obstacle():
    model = timm.create_model("resnet18", drop_path_rate=0.2)
    convert(model, make_plan(model, Policy(Bits(2, 2), "lsq"), (3, 32, 32)))
    plain, images = copy.deepcopy(started(model)), torch.randn(2, 3, 32, 32)
    pair(model, images)
    made = {name for name, m in model.named_modules() if type(m) is QuantNorm}
    assert len(made) == 12 and "layer1.0.bn2" in made and "layer1.1.bn2" not in made  # which a drop path reads
    found = []
    for one in (model, plain):
        torch.manual_seed(0)
        found.append(run(one, images))
    assert torch.equal(*found)


def test_a_model_that_is_changed_later_still_computes():
    """What stands between a BatchNorm and its sum then finds a tensor."""

    class Late(Net):
        between = staticmethod(lambda y: y)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.acts[0](self.norms[0](self.convs[0](x)))
            return self.convs[3](self.acts[2](self.between(self.norms[2](self.convs[2](x))) + x))

    model = Late()
    convert(model, make_plan(model, Policy(Bits(2, 2), "lsq"), (3, 6, 6)))
    plain = copy.deepcopy(model)
    pair(model, IMAGES)
    assert model.norms[2].adds
    for between in (lambda y: y, lambda y: 2 * y, lambda y: y * 2 - 1, lambda y: -y[:, :, :6] / 3, lambda y: 1 - y,
                    lambda y: torch.rand(1) + y + 1, lambda y: y.clone().add_(y.mean()), torch.sigmoid,
                    lambda y: torch.add(y, y, alpha=2)):  # fmt: skip
        model.between = plain.between = between
        torch.manual_seed(0)
        ours = run(model, IMAGES)
        torch.manual_seed(0)
        torch.testing.assert_close([ours, *model.buffers()], [plain(IMAGES), *plain.buffers()])


@pytest.mark.parametrize("name", ["acts.0", "acts.1", "acts.2", "acts.3", "convs.1", "convs.2", "convs.3", "convs.5"])
def test_what_was_exchanged_later_is_what_computes(name):
    model = quantized()
    plain = copy.deepcopy(model)
    pair(model, IMAGES)
    for one in (model, plain):
        torch.manual_seed(0)
        one.set_submodule(name, nn.Hardswish() if name.startswith("acts") else nn.Conv2d(16, 16, 3, padding=1, bias=False))
    same(model, plain, IMAGES)


@pytest.mark.parametrize("name", ["norms.0", "norms.2"])
def test_what_is_put_between_later_computes(name):
    model = quantized()
    plain = copy.deepcopy(model)
    pair(model, IMAGES)
    for one in (model, plain):
        one.set_submodule(name, nn.Sequential(one.get_submodule(name), nn.Hardtanh()))
    same(model, plain, IMAGES)


def test_outside_of_a_run_parts_of_a_model_are_as_they_were():
    model = nn.Sequential(*(m for k in range(3) for m in (nn.Conv2d(3 if k == 0 else 16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())))
    convert(model, make_plan(model, Policy(Bits(2, 2), "lsq"), (3, 6, 6)))
    plain = copy.deepcopy(started(model))
    pair(model, IMAGES)
    assert type(model[1]) is QuantNorm
    for part in (slice(0, 2), slice(0, 3), slice(0, 5)):
        torch.testing.assert_close(model[part](IMAGES), plain[part](IMAGES))


class Unusual(Net):
    """Ways in which a sum or a result is used that a trace may miss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        if self.how == "no gradient there":
            with torch.no_grad():
                h = self.norms[0](self.convs[0](x))
            h = self.acts[0](h + self.convs[1](x.mean(1, keepdim=True).expand(-1, 16, -1, -1)))
        elif self.how == "twice":
            h = self.norms[0](self.convs[0](x))
            h = self.acts[0](h + h)
        elif self.how == "its input changes":
            h = self.convs[0](x)
            h = self.acts[0](self.norms[0](h) + self.convs[1](self.twice(h)))
        else:  # a default that decides
            h = self.acts[0](self.norms[0](self.convs[0](x)))
        y = self.convs[3](h)
        return self.head((y + h if self.how == "a default" and more is None else y).mean((2, 3)))


@pytest.mark.parametrize(("how", "training"), [
    *((how, training) for how in ("no gradient there", "twice", "a default") for training in (True, False)),
    ("its input changes", False),  # in training torch refuses it
])  # fmt: skip
def test_unusual_ways_through_a_model(how, training):
    torch.manual_seed(0)
    model = Unusual(how)
    convert(model, make_plan(model, Policy(Bits(2, 2), "lsq"), (3, 6, 6)))
    plain = copy.deepcopy(started(model))
    pair(model, IMAGES)
    found = []
    for one in (model, plain):
        one.train(training)
        with torch.set_grad_enabled(training):
            y = run(one, IMAGES)
        if training:
            y.square().sum().backward()
        found.append([y, *one.buffers(), *(p.grad for p in one.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_nothing_prepared_stays_behind():
    model, made = quantized(), []
    pair(model, IMAGES)
    model.acts[1].register_forward_hook(lambda m, args, y: made.append(y))
    model(IMAGES)
    assert len(made) == 1 and not hasattr(made[0], "_nulsq_ready")


def test_a_real_network():
    torch.manual_seed(0)
    model = create_float_model("resnet20_cifar")
    convert(model, make_plan(model, Policy(Bits(3, 3), "nulsq-wa"), (3, 32, 32)))
    pair(model, torch.randn(2, 3, 32, 32))
    found = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert sum(type(m) is QuantReLU for m in found) == 18 and len(found) == 19  # all but the one before the pool
    assert sum(m.alone for m in found if type(m) is QuantReLU) == 9  # one in each block


@pytest.mark.parametrize(("name", "paired", "alone", "norms", "adds"), [
    ("resnet18", 15, 8, 15, 7), ("regnetx_002", 39, 26, 39, 12), ("mnasnet_050", 34, 34, 34, 0), ("repvgg_a0", 21, 0, 4, 4),
    ("mobilenetv2_050", 34, 34, 34, 0),
])  # fmt: skip
def test_in_timm_networks_everything_is_that_of_one_after_the_other(name, paired, alone, norms, adds):
    torch.manual_seed(0)
    plain = create_float_model(name)
    convert(plain, make_plan(plain, Policy(Bits(3, 3), "nulsq-wa"), (3, 64, 64)))
    started(plain)
    fused, images = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    pair(fused, images)
    relus = [m for m in fused.modules() if isinstance(m, QuantAct)]
    made = [m for m in fused.modules() if isinstance(m, (QuantNorm, QuantNormAct))]
    assert (len(relus), sum(m.alone for m in relus), len(made), sum(m.adds for m in made)) == (paired, alone, norms, adds)
    same(fused, plain, images)
