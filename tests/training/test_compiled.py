"""The whole model in one graph: no breaks, the numbers of the model that is not compiled, and a way back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.layers import quantizers
from nulsq_cli.training.compiled import compile_whole
from nulsq_cli.values import Bits


def model(method: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))  # fmt: skip
    convert(net, make_plan(net, Policy(Bits(3, 3), method), (3, 8, 8)))
    for quantizer in quantizers(net).values():
        for p in quantizer.steps():
            p.data.mul_(0.2)
    return net.train()


def step(net: nn.Module) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    y = net(torch.randn(4, 3, 8, 8, generator=draw))
    y.backward(torch.randn(4, 3, generator=draw))
    return [y.detach(), *(p.grad for p in net.parameters() if p.requires_grad)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "nulsq-a", "nulsq-wa"])
def test_one_graph_without_a_break_computes_the_same(method):
    eager = model(method)
    whole = copy.deepcopy(eager)
    torch._dynamo.reset()
    found, truth = step(torch.compile(whole, fullgraph=True, backend="aot_eager")), step(eager)
    assert len(found) > 12
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


def test_a_compiled_model_keeps_its_names_and_its_copies_are_plain():
    net, calls = model("lsq"), []
    names = list(net.state_dict())

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_whole(net, backend=backend)
    with torch.no_grad():
        y = net.eval()(torch.ones(1, 3, 8, 8))
        twin = copy.deepcopy(net)
        assert torch.equal(twin(torch.ones(1, 3, 8, 8)), y)
    assert len(calls) == 1 and list(net.state_dict()) == list(twin.state_dict()) == names


def test_what_cannot_be_compiled_is_said_once_and_runs_as_before(caplog):
    def broken(graph, _):
        raise OSError("no compiler at all")

    net, truth = model("lsq"), step(model("lsq"))
    torch._dynamo.reset()
    compile_whole(net, backend=broken)
    with caplog.at_level(logging.WARNING, "nulsq_cli"):
        found = step(net)
        net(torch.ones(1, 3, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(found[:1], truth[:1], strict=True))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("nulsq_cli")]
    assert len(said) == 1 and "uncompiled" in said[0] and "no compiler at all" in said[0]
