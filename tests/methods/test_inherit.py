"""What a quantizer keeps of the one whose place it takes when the widths of a model change."""

from __future__ import annotations

import pytest
import torch

from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.values import QuantSpec


def trained(method: str, bits: int, role: str = "weight"):
    quantizer = make_quantizer(method, QuantSpec(bits, role == "weight", role))
    for number, tensor in enumerate(quantizer.state_dict().values(), 2):
        tensor.fill_(number)
    return quantizer


@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("method", METHODS)
def test_at_the_same_width_everything_goes_on(method, role):
    before, now = trained(method, 4, role), make_quantizer(method, QuantSpec(4, role == "weight", role))
    now.inherit(before)
    for name, value in before.state_dict().items():
        assert torch.equal(now.state_dict()[name], value), name


@pytest.mark.parametrize(("method", "role", "kept"), [
    ("duq", "weight", {"raw_scale_in", "raw_scale_out"}), ("duq", "activation", {"raw_scale_in", "raw_scale_out"}),
    ("pact", "activation", {"alpha"}), ("apot", "weight", {"clip"}), ("lcq", "activation", {"clip", "theta"}),
    ("ewgs", "weight", {"lower", "upper", "output_scale", "delta"}), ("lsq", "weight", set()), ("nulsq-wa", "weight", set()),
    ("lq-nets", "activation", set()),
])  # fmt: skip
def test_at_another_width_what_does_not_depend_on_it(method, role, kept):
    before, now = trained(method, 5, role), make_quantizer(method, QuantSpec(4, role == "weight", role))
    start = {name: value.clone() for name, value in now.state_dict().items()}
    now.inherit(before)
    moved = {name for name, value in now.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == kept


def test_another_quantizer_leaves_nothing():
    now = make_quantizer("uniq", QuantSpec(4, True, "weight"))
    now.inherit(trained("lsq", 4))
    assert now.step.item() == 1
