"""ReLUs, and BatchNorms before them, that quantize what they hand on: all that anybody sees is that of one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nulsq_cli.layers import evaluating, standing_still
from nulsq_cli.methods import base
from nulsq_cli.methods.lsq import LSQ
from nulsq_cli.methods.nulsq import NuLSQ
from nulsq_cli.ops import fast, relu
from nulsq_cli.ops.native import NO_TOP
from nulsq_cli.pairing import pair
from nulsq_cli.rectified import QuantNorm, QuantReLU
from nulsq_cli.values import QuantSpec
from tests.paired import IMAGES, Net6, paired_and_plain, pairs, quantized, run, same

pytestmark = pytest.mark.usefixtures("loops")


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
            y = relu.rectify(x, top)
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
