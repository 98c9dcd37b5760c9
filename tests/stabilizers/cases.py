"""Layers of every method for the tests of stabilizers."""

from __future__ import annotations

import torch
from torch import nn

from nulsq_cli.initializers import measure
from nulsq_cli.layers import QuantConv2d
from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.ops import codebook
from nulsq_cli.stabilizers import make_stabilizers
from nulsq_cli.values import QuantSpec


def spec(method: str, bits: int = 3, granularity: str = "tensor") -> QuantSpec:
    return QuantSpec(
        min(bits, METHODS[method].largest_weights), True, "weight", granularity, 4 if granularity == "channel" else 1
    )


def layer(method: str, bits: int = 3, granularity: str = "tensor", seed: int = 0) -> QuantConv2d:
    """A convolution of 4 x 2 x 5 x 5 weights that has been quantized and started."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 4, 5)
    conv.weight.data.mul_(torch.tensor([0.5, 1, 2, 3]).view(-1, 1, 1, 1)).add_(0.01)
    quantizer = make_quantizer(method, spec(method, bits, granularity))
    quantizer.initialize(measure(conv.weight, quantizer.spec.channels), "paper")
    return QuantConv2d(conv, quantizer, None).train()


def granularities(method: str) -> list[str]:
    return ["tensor", "channel"] if METHODS[method].per_channel else ["tensor"]


CASES = [(method, granularity) for method in METHODS for granularity in granularities(method)]


def stabilizer(name: str, one: QuantConv2d, **options):
    (made,) = make_stabilizers({"conv": one}, [{"name": name, **options}])
    return made


def targets_and_codes(one: QuantConv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Found apart from the code under test: the bin of every weight and the point that it is drawn to."""
    weight = one.weight.detach()
    tables = one.weight_quantizer.codebook(weight)
    rows = weight.reshape(tables.levels.view(-1, tables.levels.shape[-1]).shape[0], -1)
    codes = (rows[..., None] > tables.thresholds.view(len(rows), 1, -1)).sum(-1)
    points = one.weight_quantizer.targets(weight).detach().view(len(rows), -1)
    return points, codes


def at_targets(one: QuantConv2d) -> torch.Tensor:
    points, codes = targets_and_codes(one)
    return points.gather(1, codes).view(one.weight.shape)


def nearest(one: QuantConv2d) -> bool:
    """Whether the method rounds its weights to the nearest level, judged by its tables."""
    tables = one.weight_quantizer.codebook(one.weight.detach())
    return torch.equal(tables.thresholds, codebook.midpoints(tables.levels))
