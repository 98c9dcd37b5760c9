from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from nulsq_cli import calibrate
from nulsq_cli.cli.show import Show
from nulsq_cli.convert import Plan, Policy, Rule, convert, make_plan, with_signs
from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.layers import LAYERS, QuantConv2d, quant_layers, quantizers
from nulsq_cli.values import Bits


def policy(bits="3/3", method="nulsq-wa", **more):
    return Policy(Bits.parse(bits), method, **more)


def small():
    return timm.create_model("resnet18", num_classes=10)


SIZE = (3, 64, 64)


def quantized(model, size, pol=None, images=None, rule="lloyd"):
    pol = pol or policy()
    plan = make_plan(model, pol, size)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1)) if images is None else images
    stats = calibrate.measure_inputs(model, calibrate.layers_to_measure(plan), lambda: [(0, images)], 1)
    plan = with_signs(plan, {n: bool(s.least[0] < 0) for n, s in stats.items()}, pol)
    convert(model, plan)
    calibrate.initialize(model, stats, rule, rule)
    return model, plan


def test_first_and_last_get_their_own_bits_by_timms_notes():
    plan = {p.name: p for p in make_plan(small(), policy(), SIZE).layers}
    assert (plan["conv1"].weight_bits, plan["conv1"].method, plan["conv1"].reason) == (8, "lsq", "first layer")
    assert (plan["fc"].weight_bits, plan["fc"].reason) == (8, "last layer")
    assert {p.weight_bits for n, p in plan.items() if n not in ("conv1", "fc")} == {3}
    assert plan["conv1"].signed and not plan["layer1.0.conv2"].signed


def test_the_step_of_8_bit_images_is_measured_well_and_not_learned():
    model, plan = quantized(small(), SIZE, rule="lsq")
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))
    assert [p.name for p in plan.layers if not p.input_learned] == ["conv1"]
    assert Plan.from_json(plan.to_json()) == plan
    step = model.conv1.input_quantizer.step.detach().clone()
    assert step * 127 == pytest.approx(float(images.abs().max()), rel=0.1)  # the rule `lsq` would be several times as wide
    model.train()(images).sum().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None}
    assert still == {"conv1.input_quantizer.step"} and model.conv1.weight_quantizer.step.grad.abs().sum() > 0
    behind = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    assert all(p.input_learned for p in make_plan(behind, policy(), SIZE).layers)  # what it reads is learned
    for rule in (Rule("conv1", bits=Bits(8, 4)), Rule("conv1", method="nulsq-wa", bits=Bits(4, 4))):
        few = make_plan(small(), policy(rules=(rule,)), SIZE)
        assert all(p.input_learned for p in few.layers)  # a few levels have to be placed with care


def test_rules_change_what_they_match_and_the_last_one_wins():
    rules = (Rule("layer1.*", bits=Bits(4, 4)), Rule("re:layer1\\.0\\..*", method="lsq"), Rule("layer2.0.conv1", skip=True),
             Rule("layer1.1.conv1", bits=Bits(2, 8), granularity="channel", signed=True))  # fmt: skip
    plan = {p.name: p for p in make_plan(small(), policy(rules=rules), SIZE).layers}
    assert (plan["layer1.0.conv1"].weight_bits, plan["layer1.0.conv1"].method) == (4, "lsq")
    assert not plan["layer2.0.conv1"].quantized and plan["layer2.0.conv1"].reason == "rule layer2.0.conv1"
    changed = plan["layer1.1.conv1"]
    assert (changed.weight_bits, changed.input_bits, changed.granularity, changed.signed) == (2, 8, "channel", True)


def test_a_rule_that_matches_nothing_is_an_error_with_a_suggestion():
    with pytest.raises(UsageError, match="matches no layer") as error:
        make_plan(small(), policy(rules=(Rule("layer1.0.conv11"),)), SIZE)
    assert "layer1.0.conv1" in error.value.fix
    with pytest.raises(UsageError, match="regular expression"):
        make_plan(small(), policy(rules=(Rule("re:layer1("),)), SIZE)


def test_a_subclass_that_computes_something_else_is_left_in_float_and_said_aloud(capsys):
    class Odd(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))
    plan = {p.name: p for p in make_plan(model, policy(), (3, 8, 8)).layers}
    assert plan["1"].method == "float" and "no quantized form" in plan["1"].reason
    Show().plan(make_plan(model, policy(), (3, 8, 8)).to_json())
    assert "! left in float: 1 Odd, 25.2 % of the weights (no quantized form of this type)" in capsys.readouterr().out
    for rule in (Rule("1", skip=True), Rule("*", bits=Bits(4, 4))):
        make_plan(model, policy(rules=(rule,)), (3, 8, 8))
    with pytest.raises(UsageError, match=r"changes nothing: 1 \(Odd\) stays in float, no quantized form"):
        make_plan(model, policy(rules=(Rule("1", bits=Bits(4, 4)),)), (3, 8, 8))
    convert(model, Plan(tuple(plan.values()), "3/3", "nulsq-wa", {}, 0))
    assert type(model[1]) is Odd and type(model[0]) is QuantConv2d


def test_a_layer_whose_weight_is_used_without_calling_it_is_left_in_float():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(nn.functional.linear(self.first(x.flatten(1)), self.hidden.weight))

    plan = {p.name: p for p in make_plan(Sneaky(), policy(), (6, 1, 1)).layers}
    assert plan["hidden"].method == "float" and "without calling" in plan["hidden"].reason


def test_plan_survives_json_and_counts_bits_over_all_weights():
    plan = make_plan(small(), policy("2/2"), SIZE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    weights = {p.name: p.weights for p in plan.layers}
    by_hand = (sum(weights.values()) * 2 + (weights["conv1"] + weights["fc"]) * 6) / sum(weights.values())
    assert plan.average_weight_bits == pytest.approx(by_hand)
    assert plan.packed_bytes < plan.float_bytes / 10
    with pytest.raises(InputError, match="damaged"):
        Plan.from_json({"layers": [{}]})


def test_the_float_parameters_are_taken_over_and_keep_their_names():
    model = small()
    before = dict(model.named_parameters())
    quantized(model, SIZE)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all("_quantizer." in name for name in after.keys() - before.keys())


def test_32_bits_leave_that_side_in_float():
    model, plan = quantized(small(), SIZE, policy("4/32", first_last_bits=Bits(32, 32)))
    assert all(layer.input_quantizer is None for layer in quant_layers(model).values())
    assert {p.method for p in plan.layers if p.reason in ("first layer", "last layer")} == {"float"}
    assert quantizers(quantized(small(), SIZE, policy("32/32"))[0]) == {}


def test_more_bits_come_closer_to_the_float_model():
    torch.manual_seed(0)
    reference, images = small().eval(), torch.randn(8, *SIZE)
    with torch.no_grad():
        truth, errors = reference(images), []
        for bits in ("2/2", "4/4", "8/8"):
            model = small()
            model.load_state_dict(reference.state_dict())
            errors.append((quantized(model, SIZE, policy(bits), images)[0].eval()(images) - truth).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_tf_padding_is_kept():
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5).eval()
    kinds = {p.type for p in make_plan(model, policy(), SIZE).layers}
    assert "Conv2dSame" in kinds and set(LAYERS) >= {nn.Conv2d, nn.Linear}
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        truth = model(images)
        close = quantized(model, SIZE, policy("8/8"), images)[0].eval()(images)
    assert (close - truth).square().mean() < 0.05 * truth.var()
