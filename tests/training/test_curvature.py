"""The measured curvature against Hessians written out entry by entry, and what measuring must not touch."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nulsq_cli import calibrate
from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import quantizers
from nulsq_cli.training import curvature
from nulsq_cli.values import Bits

ALONE = SimpleNamespace(device=torch.device("cpu"), rank=0, size=1, reduce=lambda values, how: values)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    images, target = torch.randn(4, 1, 3, 3), torch.randint(3, (4,))
    plan = make_plan(model, Policy(Bits(3, 3), "ewgs", first_last_method="ewgs", first_last_bits=Bits(3, 3),
                                   options={"every": 2}), (1, 3, 3))  # fmt: skip
    stats = calibrate.measure_inputs(model, calibrate.layers_to_measure(plan), lambda: [(0, images)], 1)
    convert(model, plan)
    calibrate.initialize(model, stats, "mse", "mse")
    return model.train(), images, target


def exact(model, images, target):
    """Trace of the Hessian over n, over the deviation of the gradient, by one second derivative per entry."""
    found = []
    for q in quantizers(model).values():
        q.watched = True
    loss = F.cross_entropy(model(images), target)
    for q in quantizers(model).values():
        (slope,) = torch.autograd.grad(loss, q.rounded, create_graph=True)
        rows = [torch.autograd.grad(g, q.rounded, retain_graph=True)[0].flatten()[i] for i, g in enumerate(slope.flatten())]
        found.append((torch.stack(rows).double().mean() / slope.double().std()).item())
        q.watched = False
    return found


def test_signs_that_are_orthogonal_give_the_trace_of_each_tensor(net, monkeypatch):
    """The mean of v v' over all rows of a Hadamard matrix is the identity, so what is an estimate for random signs is exact."""
    expected, place = exact(*net), 0

    def signs(low, high, shape, **_):
        nonlocal place
        probe, first = divmod(place, 100)
        place += shape.numel()
        return torch.tensor([(probe & i).bit_count() % 2 for i in range(first, first + shape.numel())]).view(shape)

    monkeypatch.setattr(torch, "randint", signs)
    got = curvature.ratios(net[0], list(quantizers(net[0]).values()), *net[1:], torch.Generator(), probes=128, tolerance=0)
    assert place == 128 * (8 + 36 + 24 + 32)
    assert len(expected) == 4 and max(map(abs, expected)) > 0.1
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_it_stops_when_the_mean_has_settled(net, monkeypatch):
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn.append(1) or randint(*a, **k))
    for probes, tolerance, expected in ((7, 0.0, 7), (7, 1e9, 2)):
        drawn.clear()
        curvature.ratios(net[0], list(quantizers(net[0]).values()), *net[1:], torch.Generator(), probes, tolerance)
        assert len(drawn) == 4 * expected


def test_deltas_follow_and_nothing_else_moves(net):
    model, images, target = net
    before, every = copy.deepcopy(model.state_dict()), list(quantizers(model).values())
    model._compiled_call_impl = compiled = lambda *_: pytest.fail("a compiled model was asked")
    passes = []

    def loader():
        passes.append(1)
        return iter([(images, target)] * 5)

    for epoch in (0, 1):
        curvature.follow(model, every, loader, epoch, 42, ALONE)
    assert not passes and all(q.delta == 0 for q in every)
    curvature.follow(model, every, loader, 2, 42, ALONE)
    deltas = [float(q.delta) for q in every]
    assert len(passes) == 1 and any(d > 0 for d in deltas)
    for name, value in model.state_dict().items():
        assert name.endswith("delta") or torch.equal(value, before[name]), name
    assert model._compiled_call_impl is compiled
    assert all(q.rounded is None and not q.watched for q in every) and all(p.grad is None for p in model.parameters())
    model.load_state_dict(before)
    curvature.follow(model, every, loader, 2, 42, ALONE)
    assert deltas == [float(q.delta) for q in every]  # it is a function of the model, the images and the seed


def test_a_tensor_that_the_loss_does_not_see_has_none():
    q = SimpleNamespace(rounded=None)

    def model(images):
        q.rounded = torch.rand(3, requires_grad=True)
        return images

    got = curvature.ratios(model, [q], torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.Generator())
    assert got.tolist() == [0.0]
