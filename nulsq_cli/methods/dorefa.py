"""DoReFa-Net: fixed ranges, tanh-normalised weights, nothing to learn. Zhou et al., 2016, arXiv:1606.06160."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.methods.base import SMALLEST_STEP, Quantizer
from nulsq_cli.ops.estimators import from_unit, round_unit, to_unit
from nulsq_cli.values import Codebook, TensorStats


class DoReFa(Quantizer):
    """Weights become even levels in [-1, 1], activations even levels in [0, 1]. No range is measured.

    A layer's output is therefore on another scale than in float, which a BatchNorm behind it has to
    take up. Signed inputs, which the paper does not have, are clipped to [-1, 1] and get the weights'
    levels; that form is ours.

    Args:
        spec: what this quantizer has to be.
    """

    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Nothing: there are no parameters, whatever the rule."""

    def levels(self) -> Tensor:
        """(K,): even, from -1 if signed, else from 0, to 1."""
        return from_unit(torch.arange(self.spec.levels) / self.spec.gaps, self.spec.signed)

    def quantize(self, x: Tensor) -> Tensor:
        """Straight through the rounding; the largest tanh of a weight counts as a constant."""
        if self.spec.role == "weight":
            place = x.tanh() / (2 * _largest(x)) + 0.5
        else:
            low, high = x.new_tensor([-1.0 if self.spec.signed else 0.0]), x.new_ones(1)
            place = to_unit(x, low, high)
        return from_unit(round_unit(place, self.spec.gaps), self.spec.signed)

    @torch.no_grad()
    def own_codebook(self, x: Tensor) -> Codebook:
        """The thresholds of weights go back through tanh; they depend on the largest weight, so on x."""
        levels, thresholds = self.levels().to(x.device), self.thresholds().to(x.device)
        if self.spec.role == "weight":
            thresholds = (thresholds.double() * _largest(x).double()).atanh().float()
        return Codebook(levels, thresholds)


def _largest(weights: Tensor) -> Tensor:
    return weights.detach().tanh().abs().amax().clamp_min(SMALLEST_STEP)
