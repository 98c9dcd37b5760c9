"""ReLUs, and BatchNorms before them, that quantize what they hand on: all that anybody sees is that of one after the other."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn

from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import evaluating, quant_layers, standing_still
from nulsq_cli.methods import base
from nulsq_cli.methods.lsq import LSQ
from nulsq_cli.methods.nulsq import NuLSQ
from nulsq_cli.models import create_float_model
from nulsq_cli.ops import fast, relu
from nulsq_cli.ops.native import NO_TOP
from nulsq_cli.rectified import QuantAct, QuantNorm, QuantNormAct, QuantReLU, one_operation, pair
from nulsq_cli.values import Bits, QuantSpec
from tests.ops.test_norm import rectified

pytestmark = pytest.mark.usefixtures("loops")


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("method", "bits", "more"), [
    ("nulsq-wa", 2, {}), ("nulsq-wa", 4, {}), ("nulsq-wa", 5, {}), ("nulsq-wa", 3, {"grid": "int8"}), ("nulsq-a", 3, {}),
    ("nulsq-wa", 3, {"grad_scale": "lsq"}), ("lsq", 2, {}), ("lsq", 8, {}), ("lsq", 3, {"grad_scale": "lsq"}),
    ("uniq", 3, {}), ("llsq", 3, {}), ("pact", 3, {}), ("nulsq-wa", 4, {"of": Net6}), ("lsq", 2, {"of": Net6}),
])  # fmt: skip
def test_everything_is_that_of_one_after_the_other(method, bits, more, layout):
    plain = quantized(method, bits, **more).to(memory_format=layout)
    paired, images = copy.deepcopy(plain), IMAGES.to(memory_format=layout)
    pair(paired, images)
    assert len(pairs(paired)) == 5 and not pairs(plain)
    same(paired, plain, images, bits=layout is torch.contiguous_format)


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


@pytest.mark.parametrize("bits", [2, 5])
def test_the_fast_way_is_taken(bits, monkeypatch):
    calls = []
    for name in ("norm_and_quantize", "relu_and_quantize", "norm_and_lookup", "relu_and_lookup"):
        plain = getattr(base, name)
        watch = lambda *args, plain=plain, name=name, **named: (calls.append((name, plain(*args, **named) is not None)), None)[1]  # noqa: E731
        monkeypatch.setattr(base, name, watch)
    model = quantized(bits=bits)
    pair(model, IMAGES)
    for module in model.modules():
        if type(module) in (QuantReLU, QuantNorm):
            module.inplace = module.overwrites = False  # watching computes both
    run(model, IMAGES)
    few = bits == 2  # 32 levels are too many for the loops, in training; then the ReLU behind the BatchNorm tries as well
    assert calls.count(("norm_and_quantize", few)) == 4 and calls.count(("relu_and_quantize", few)) == 5 and len(calls) == 9
    calls.clear()
    with torch.no_grad(), evaluating(model):
        run(model, IMAGES)
    assert calls.count(("norm_and_lookup", True)) == 4 and calls.count(("relu_and_lookup", True)) == 5 and len(calls) == 9


def test_a_copy_has_readers_of_its_own():
    model = quantized()
    pair(model, IMAGES)
    other = copy.deepcopy(model)
    assert pairs(other) == pairs(model) and other.acts[0].reader is other.convs[1]
    assert other.norms[0].relu is other.acts[0]


HOOKS = {
    "before": lambda m, see: m.register_forward_pre_hook(lambda m, args: see(args[0])),
    "after": lambda m, see: m.register_forward_hook(lambda m, args, y: see(y)),
    "around": lambda m, see: m.register_forward_hook(lambda m, args, y: see(args[0])),
    "backward": lambda m, see: m.register_full_backward_hook(lambda m, grad, out: see(out[0])),
}


@pytest.mark.parametrize("how", HOOKS)
@pytest.mark.parametrize("watched", [
    "", *(f"acts.{k}" for k in range(5)), *(f"norms.{k}" for k in range(4)), *(f"convs.{k}" for k in (0, 1, 2, 3, 5, 8)),
])  # fmt: skip
def test_hooks_see_what_they_would(watched, how):
    """Whatever it is, also when they keep it without a copy."""
    found = []
    for paired in (True, False):
        model, seen = quantized(), []
        if how == "backward":
            for act in model.acts:
                act.inplace = False  # torch wants it so
        if paired:
            pair(model, IMAGES)
        HOOKS[how](model.get_submodule(watched), seen.append)
        for mode in (True, False):
            with torch.set_grad_enabled(mode), standing_still(model):
                y = run(model.train(mode), IMAGES)
                if mode:
                    y.square().sum().backward()
        found.append(seen)
    assert len(found[0]) == len(found[1]) > 0
    torch.testing.assert_close(*found)


def test_hooks_of_all_modules_see_what_they_would():
    found = []
    for model in paired_and_plain():
        seen: list[torch.Tensor] = []
        kinds = (nn.BatchNorm2d, nn.ReLU, nn.Conv2d)
        see = lambda m, _, y, seen=seen, kinds=kinds: seen.append(y.detach().clone()) if isinstance(m, kinds) else None  # noqa: E731
        hook = nn.modules.module.register_module_forward_hook(see)
        run(model, IMAGES)
        hook.remove()
        found.append(seen)
    torch.testing.assert_close(*found)


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


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("frozen", [False, True])
def test_batchnorms_of_all_kinds(momentum, frozen):
    plain = quantized()
    for norm in plain.norms:
        norm.momentum = 1.0  # for one batch: what is frozen then has seen one
    plain(IMAGES)
    for norm in plain.norms:
        norm.momentum = momentum
        norm.train(not frozen)
    paired = copy.deepcopy(plain)
    pair(paired, IMAGES)
    for model in (paired, plain):
        run(model, IMAGES)
    assert [norm.training for norm in paired.norms] == [not frozen] * 6
    same(paired, plain, IMAGES)
    assert int(paired.norms[0].num_batches_tracked) == (1 if frozen else 3)


def test_statistics_are_measured_by_quantized_inputs():
    """As when they are re-estimated: BatchNorm in training, all else in evaluation."""
    found = []
    for model in paired_and_plain():
        model.eval()
        for norm in model.norms:
            norm.train().momentum = 1.0
        with torch.no_grad():
            found.append([run(model, IMAGES), *model.buffers()])
    torch.testing.assert_close(*found)


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


def test_statistics_that_are_switched_off_stay():
    found = []
    for model in paired_and_plain():
        for norm in model.norms:
            norm.track_running_stats = False
        found.append([run(model, IMAGES), *model.buffers()])
    torch.testing.assert_close(*found)


def test_compilers_see_plain_modules():
    model = quantized()
    plain = copy.deepcopy(model)
    pair(model, IMAGES)
    for one in (model, plain):
        one.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), plain(IMAGES))
        exported = torch.export.export(model, (IMAGES,)).module()
        torch.testing.assert_close(exported(IMAGES), plain(IMAGES))


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


@pytest.mark.parametrize("top", [NO_TOP, 1.0])
@pytest.mark.parametrize("kind", [None, 0, (0, 3)])
def test_a_derivative_of_the_derivative(kind, top):
    x = torch.randn(60, generator=torch.Generator().manual_seed(2), requires_grad=True)
    table = {None: [0.0, 0.4, 0.9, 1.5], 0: [[0.4, 0.5, 0.6]], (0, 3): [0.4]}[kind]
    table = torch.tensor(table, requires_grad=True)
    found = []
    for way in (True, False):
        fast.use(way)
        if way:
            both = relu.relu_and_quantize(x, table, kind, top=top)
        else:
            y = rectified(x, top)
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
