"""What co-study and the instability metric compute, against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nulsq_cli.initializers import measure
from nulsq_cli.jobs.stretches import hold_still
from nulsq_cli.layers import QuantLinear
from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.schemes import instability, mutual
from nulsq_cli.values import Bits, Phase, QuantSpec


def networks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def test_each_network_gets_the_gradient_of_its_own_loss_alone():
    student, teacher = networks()
    x, target = torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0])
    norm = ([0.0] * 3, [1.0] * 3)
    task = mutual.MutualTask(mutual.Both(student, teacher, norm, norm), nn.CrossEntropyLoss(), weight=0.5, task_weight=2.0,
                             temperature=3.0, device=torch.device("cpu"))  # fmt: skip
    task(x, target)["loss"].backward()
    for one, other in ((student, teacher), (teacher, student)):
        got = [p.grad.clone() for p in one.parameters()]
        with torch.no_grad():
            fixed = F.softmax(other(x) / 3, 1)
        soft = (fixed * (fixed.log() - F.log_softmax(one(x) / 3, 1))).sum(1).mean() * 9
        wanted = torch.autograd.grad(2 * F.cross_entropy(one(x), target) + 0.5 * soft, list(one.parameters()))
        torch.testing.assert_close(got, list(wanted), rtol=1e-4, atol=1e-6)


def test_the_teacher_sees_the_image_as_it_was_made_for():
    student, teacher = networks()
    both = mutual.Both(student, teacher, ([0.5] * 3, [0.25] * 3), ([0.1] * 3, [0.5] * 3))
    pixels = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(both((pixels - 0.5) / 0.25)[1], teacher((pixels - 0.1) / 0.5))


def test_the_divergence_of_two_gaussians_by_hand():
    # Channel 0: mean 0, sd 1 -> mean 1, sd 2. Channel 1 does not vary and is left out.
    before = torch.tensor([[-1.0, 3.0], [0.0, 3.0], [1.0, 3.0]])
    after = torch.tensor([[-1.0, 3.0], [1.0, 3.0], [3.0, 3.0]])
    assert abs(instability.divergence(before, after, 1) - (math.log(1 / 2) + (4 + 1) / 2 - 0.5)) < 1e-12
    assert instability.divergence(before[:, 1:], after[:, 1:], 1) is None


def test_only_training_forwards_that_change_codes_are_measured():
    layer = QuantLinear(nn.Linear(6, 3), make_quantizer("lsq", QuantSpec(2, True, "weight")), None)
    layer.weight_quantizer.step.data.fill_(0.2)
    model, x = nn.Sequential(layer), torch.randn(50, 6)
    watch = instability.Instability(model)
    model.train()(x)
    model(x)
    assert watch.scores() == {"0": 0.0}  # nothing changed between the two
    old = layer.quantized_weight().detach()
    layer.weight.data[0, 0] = -layer.weight.data[0, 0].sign() * 0.5
    model.eval()(x)
    assert watch.scores() == {"0": 0.0}
    model.train()(x)
    wanted = instability.divergence(F.linear(x, old, layer.bias), model(x).detach(), 1)
    assert 0 < wanted <= instability.LARGEST and watch.scores() == {"0": wanted}
    fresh = instability.Instability(model)
    fresh.load_state_dict(watch.state_dict())
    assert fresh.scores() == watch.scores()
    watch.close()
    assert instability.most_unstable({"a": 0.1, "b": 0.3, "c": 0.3}, 2 / 3) == ["b", "c"]


@pytest.mark.parametrize("method", METHODS)
def test_watching_changes_no_quantizer_and_no_penalty(method):
    """LQ-Nets moves its basis in every training forward, and LLSQ's penalty is of the last one."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        sides = [make_quantizer(method, QuantSpec(3, role == "weight", role)) for role in ("weight", "activation")]
        layer, x = QuantLinear(nn.Linear(6, 3), *sides), torch.randn(50, 6).relu()
        for quantizer, tensor in zip(sides, (layer.weight, x), strict=True):
            quantizer.initialize(measure(tensor.detach(), 1), "nmse")
        model = nn.Sequential(layer).train()
        watch = instability.Instability(model) if watched else None
        for _ in range(3):
            loss = model(x).square().sum()
            for quantizer in sides:
                loss = loss if quantizer.penalty() is None else loss + quantizer.penalty()
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            layer.weight.data[0, 0] = -layer.weight.data[0, 0].sign() * 0.5
        assert watch is None or 0 < watch.scores()["0"] < 1
        found.append([*model.state_dict().values(), loss.detach(), *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_phase_does_not_train_stands_still_and_steps_never_do():
    quantizer = make_quantizer("nulsq-wa", QuantSpec(2, True, "weight", "channel", 3))
    model = nn.Sequential(QuantLinear(nn.Linear(6, 3), quantizer, None), nn.BatchNorm1d(3), nn.Linear(3, 2))
    names = {p: name for name, p in model.named_parameters()}
    stopped = hold_still(model, Phase("norms", 1, Bits(2, 2), only_norms=True), {})
    assert [names[p] for p in stopped] == ["0.weight", "2.weight"]
    assert model[0].weight_quantizer.gaps.requires_grad and model[0].bias.requires_grad and model[1].weight.requires_grad
    for p in stopped:
        p.requires_grad_(True)
    frozen = hold_still(model, Phase("frozen", 1, Bits(2, 2), frozen_share=0.5), {"0": 0.4, "2": 0.1})
    assert [names[p] for p in frozen] == ["0.weight"]
