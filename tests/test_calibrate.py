from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from nulsq_cli import calibrate
from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.errors import InputError
from nulsq_cli.layers import quant_layers
from nulsq_cli.models import create_float_model
from nulsq_cli.values import Bits

IMAGES = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return create_float_model("resnet8_cifar")


def chunks(size, rank=0, world=1):
    return lambda: [(k, IMAGES[k * size : (k + 1) * size]) for k in range(rank, 48 // size, world)]


def test_statistics_are_those_of_the_inputs():
    net, seen = model(), []
    net.layer2[0].conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    stats = calibrate.measure_inputs(net, ["layer2.0.conv1"], chunks(16), 3)["layer2.0.conv1"]
    x = torch.cat(seen[:3]).double()
    assert stats.count == x.numel() and float(stats.mass.sum()) == x.numel()
    assert float(stats.least[0]) == x.min() and float(stats.largest[0]) == x.max()
    torch.testing.assert_close(stats.mean_abs[0], x.abs().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.std[0], x.std(), rtol=1e-6, atol=0)
    assert float(stats.mass[0, 0]) >= float((x == 0).sum()) and float(stats.points[0, 0]) == 0


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))  # fmt: skip


class Team:
    """Threads that reduce together, as processes do."""

    def __init__(self, size):
        self.size, self.door, self.brought = size, threading.Barrier(size), {}

    def member(self, rank):
        def reduce(values, how):
            self.brought[rank] = values
            self.door.wait(60)
            stacked = torch.stack([self.brought[r] for r in range(self.size)])
            self.door.wait(60)
            return {"sum": stacked.sum(0), "min": stacked.amin(0), "max": stacked.amax(0)}[how]

        return reduce

    def run(self, work):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(rank, self.member(rank)), range(self.size)))


def test_several_processes_and_a_second_time_give_the_same_bytes():
    names = ["conv1", "layer1.0.conv1", "linear"]
    alone = calibrate.measure_inputs(model(), names, chunks(8), 6)
    again = calibrate.measure_inputs(model(), names, chunks(8), 6)
    nets = [model() for _ in range(3)]
    for size in (2, 3):
        shares = Team(size).run(lambda rank, reduce, size=size: calibrate.measure_inputs(
            nets[rank], names, chunks(8, rank, size), 6, reduce))  # fmt: skip
        assert all(same(alone[name], found[name]) for name in names for found in (again, *shares))


def test_an_input_that_is_not_finite_is_named_in_all_processes():
    def work(rank, reduce):
        net = nets[rank]
        images = [(k, torch.where(torch.arange(3)[:, None, None] == rank, math.nan, x)) for k, x in chunks(8, rank, 2)()]
        with pytest.raises(InputError, match="not finite") as caught:
            calibrate.measure_inputs(net, ["conv1", "linear"], lambda: images if rank else chunks(8, 0, 2)(), 6, reduce)
        return caught.value.where

    nets = [model(), model()]
    assert Team(2).run(work) == ["conv1", "conv1"]


def test_calibration_leaves_the_model_as_it_was():
    net = model().train()
    before = copy.deepcopy(net.state_dict())
    calibrate.measure_inputs(net, ["linear"], chunks(16), 3)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.linear._forward_pre_hooks


def test_reestimated_statistics_are_means_over_chunks():
    net = model()
    outputs = []
    net.conv1.register_forward_hook(lambda m, args, out: outputs.append(out.detach()))
    assert calibrate.reestimate_batchnorm(net, chunks(16), 3) == 7
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    var = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(net.bn1.running_mean, mean)
    torch.testing.assert_close(net.bn1.running_var, var)
    assert net.bn1.momentum == 0.1 and not net.training


def test_starting_twice_gives_the_same_steps():
    results = []
    for _ in range(2):
        net = model()
        plan = make_plan(net, Policy(Bits(2, 2), "nulsq-wa"), (3, 16, 16))
        stats = calibrate.measure_inputs(net, calibrate.layers_to_measure(plan), chunks(16), 3)
        calibrate.initialize(convert(net, plan), stats, "lloyd", "lloyd")
        results.append(net.state_dict())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_a_model_without_batchnorm_is_fine():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    assert calibrate.reestimate_batchnorm(net, lambda: [(0, torch.randn(2, 3, 32, 32))], 1) == 0


def scaled_model(reduce=calibrate.alone, rank=0, world=1, started=True):
    net = model()
    torch.nn.init.normal_(net.linear.bias)
    plan = make_plan(net, Policy(Bits(3, 3), "ewgs", first_last_method="ewgs"), (3, 16, 16))
    stats = calibrate.measure_inputs(net, calibrate.layers_to_measure(plan), chunks(16), 3)
    calibrate.initialize(convert(net, plan), stats, "paper", "paper")
    if started:
        calibrate.match_output_scales(net, chunks(8, rank, world), 6, reduce)
    return net


def test_layers_with_an_output_scale_keep_the_size_of_their_output():
    exact, net, inputs = model(), scaled_model(), {}
    for name in quant_layers(net):
        exact.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    exact(IMAGES)
    for name, layer in quant_layers(net.eval()).items():
        layer.bias, twin = None, exact.get_submodule(name)
        twin.bias = None
        sizes = [m.forward(inputs[name]).abs().mean() for m in (layer, twin)]
        torch.testing.assert_close(*sizes, rtol=1e-5, atol=0)


def test_matching_leaves_everything_else_as_it_was():
    before, net = scaled_model(started=False), scaled_model()
    after = net.state_dict()
    assert list(after) == list(before.state_dict()) and not net.conv1._forward_hooks
    moved = {k for k, v in before.state_dict().items() if not torch.equal(v, after[k])}
    assert moved == {f"{name}.weight_quantizer.output_scale" for name in quant_layers(net)}


def test_two_processes_match_the_same_scales():
    halves = []
    for rank in (0, 1):
        seen = []
        scaled_model(lambda v, how, seen=seen: (seen.append(v.clone()), v)[1], rank, 2)
        halves.append(seen)
    together = iter([a + b for a, b in zip(*halves, strict=True)])
    shared = scaled_model(lambda v, how: next(together), 0, 2)
    assert all(torch.equal(v, shared.state_dict()[k]) for k, v in scaled_model().state_dict().items())


def test_without_an_output_scale_no_image_is_read():
    net = model()
    convert(net, make_plan(net, Policy(Bits(3, 3), "lsq"), (3, 16, 16)))
    assert calibrate.match_output_scales(net, lambda: 1 / 0, 3) == 0


@pytest.mark.parametrize("training", [True, False])
def test_every_module_has_its_mode_back(training):
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar", num_classes=10).train(training)
    model.bn1.train(not training)
    modes = [m.training for m in model.modules()]
    calibrate.reestimate_batchnorm(model, lambda: [(0, torch.randn(4, 3, 8, 8))], 1)
    assert [m.training for m in model.modules()] == modes
